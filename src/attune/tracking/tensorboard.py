"""A run in TensorBoard: event files, which `tensorboard --logdir .checkpoints/tensorboard` shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

EVENTS = Path(".checkpoints/tensorboard")


class TensorBoard:
    """An open run: a folder of events. One that goes on has its points and images once."""

    def __init__(self, root: Path, name: str, params: Mapping[str, str], part: str):
        from torch.utils.tensorboard import SummaryWriter

        folder = root / EVENTS / name / part
        self._reached = reached(folder)  # tag -> last step that is there
        self._writer = SummaryWriter(str(folder))
        rows = [f"| {key} | {text.replace('|', chr(92) + '|')} |" for key, text in params.items()]
        self._writer.add_text("parameters", "\n".join(["| key | value |", "|---|---|", *rows]))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for key, value in metrics.items():
            if step > self._reached.get(key, -1):
                self._writer.add_scalar(key, value, step)

    def image(self, key: str, picture: Any, step: int) -> None:
        if step > self._reached.get(key, -1):
            self._writer.add_image(key, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


def reached(folder: Path) -> dict[str, int]:
    """The last step of every curve and image in a folder of events; {} where there is none."""
    if not folder.is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), {"scalars": 1, "images": 1})  # keeps the last of each
    events.Reload()
    last = {tag: events.Scalars(tag)[-1].step for tag in events.Tags()["scalars"]}
    return last | {tag: events.Images(tag)[-1].step for tag in events.Tags()["images"]}
