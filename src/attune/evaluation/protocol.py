"""The protocol: everything that decides a score besides the weights, as one frozen and hashed value.

The same checkpoint scored by two papers differs by more than the gains they claim, because samplers, steps,
guidance and scorer versions differ. Here a score is not stored without its protocol, and scores of different
protocols are not put into one table.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from attune.config.settings import Model, ScorerConfig
from attune.files import values_sha, write_atomically
from attune.hub import identity, parse

_METADATA_KEY, _MADE_WITH_KEY = b"attune.protocol", b"attune.made_with"
MODEL = "model"  # in `made_with` of images: what tells the model that generated them from any other
KEY_COLUMNS = ("prompt", "ordinal", "file")
"""What identifies an image in a score table; every other column is a score."""
SCORER_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
"""Names of scorers, whole. No dot: the column `name.part` is a part of scorer `name`."""


@dataclass(frozen=True)
class Protocol:
    """How images were made and scored; equal protocols are what makes two scores comparable."""

    prompt_set_sha: str  # see `hash_prompts`
    n_prompts: int  # distinct prompts
    images_per_prompt: int
    sampler: str
    steps: int  # sampling steps
    eta: float  # DDIM stochasticity
    guidance_scale: float  # 1 = off
    resolution: int  # pixels
    dtype: str
    seed: int
    scorers: tuple[tuple[str, str, str], ...]  # (name, weights, settings), see `scorer_identity`
    autoencoder: str  # what tells its weights from any others, and its dtype; see `autoencoder_identity`

    def __post_init__(self) -> None:
        """Makes equal protocols equal values (5 or 5.0, any order of scorers); refuses impossible ones."""
        for name in ("eta", "guidance_scale"):
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "scorers", tuple(sorted(tuple(scorer) for scorer in self.scorers)))
        if min(self.n_prompts, self.images_per_prompt, self.steps, self.resolution) < 1:
            raise ValueError(f"n_prompts, images_per_prompt, steps and resolution must be positive: {self}")
        if any(len(scorer) != 3 for scorer in self.scorers):
            raise ValueError(f"a scorer is (name, revision or hash of its weights, settings), found {self.scorers}")
        if wrong := [name for name in self.scorer_names if not SCORER_NAME.fullmatch(name)]:
            raise ValueError(f"a scorer's name is letters, digits, _ and -, a letter first; found {wrong}")
        if len(set(self.scorer_names)) < len(self.scorers):
            raise ValueError(f"scorer named twice: {self.scorer_names}")

    @property
    def scorer_names(self) -> tuple[str, ...]:
        return tuple(name for name, _, _ in self.scorers)

    @property
    def sha(self) -> str:
        """First 12 hex digits of the sha256 of the canonical JSON."""
        return values_sha(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is its inverse."""
        return asdict(self) | {"scorers": [list(scorer) for scorer in self.scorers]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Protocol:
        """Raises: ValueError naming the keys that are missing or unknown."""
        expected = {field.name for field in fields(cls)}
        if wrong := sorted(expected ^ set(values)):
            raise ValueError(f"protocol with missing or unknown keys: {', '.join(wrong)}")
        return cls(**{**values, "scorers": tuple(tuple(scorer) for scorer in values["scorers"])})

    def describe(self) -> str:
        """One line for the foot of a table."""
        scorers = ", ".join(f"{name}@{weights} ({settings})" for name, weights, settings in self.scorers)
        images = "image" if self.images_per_prompt == 1 else "images"
        return (
            f"{self.sha}: {self.n_prompts} prompts (set {self.prompt_set_sha[:12]}) x "
            f"{self.images_per_prompt} {images}, {self.sampler} {self.steps} steps, eta {self.eta:g}, "
            f"guidance {self.guidance_scale:g}, "
            f"{self.resolution} px, {self.dtype}, autoencoder {self.autoencoder}, seed {self.seed}; scorers {scorers}"
        )


def hash_prompts(prompts: Iterable[str]) -> str:
    """Name of a set of prompts: 12 hex digits, whatever their order and repetition."""
    return values_sha(sorted(set(prompts)))


def scorer_identity(name: str, config: ScorerConfig) -> tuple[str, str, str]:
    """What a scorer's numbers depend on, for a protocol: its name, its weights and its settings.

    Weights are identified by `hub.identity`, for each of the scorer's locations. Where local ones lie, their licence
    and the expected range do not count; every other field of the scorer's block does.

    Raises: FileNotFoundError for a local location that is not there.
    """
    weights = [f"{_plus(field)}{identity(source)}" for field, source in config.locations().items()]
    settings = [f"{key}={value}" for key, value in sorted(config.settings().items())]
    return name, " ".join(weights) or "built-in", " ".join(settings) or "default"


def autoencoder_identity(model: Model) -> str:
    """What decodes the latents: the model's own autoencoder or another one, and the precision it computes in.

    Raises: FileNotFoundError where it is local and not there.
    """
    if model.vae is not None:
        return f"{identity(parse(model.vae))} {model.vae_dtype}"
    own = parse(model.path)
    if own.commit is None:  # so that the same autoencoder in another base's folder is the same
        own = replace(own, place=str(Path(own.place) / "vae"))
    return f"{identity(own)} {model.vae_dtype}"


def _plus(field: str) -> str:
    """Names every location but the main one."""
    return "" if field == "path" else f"{field}:"


def assert_comparable(protocols: Mapping[str, Protocol]) -> None:
    """Raises ValueError naming the first two methods whose protocols differ, and the fields that do."""
    names = list(protocols)
    for other in names[1:]:
        first, second = protocols[names[0]], protocols[other]
        differing = [f.name for f in fields(Protocol) if getattr(first, f.name) != getattr(second, f.name)]
        if differing:
            details = "; ".join(f"{f}: {getattr(first, f)!r} != {getattr(second, f)!r}" for f in differing)
            raise ValueError(f"{names[0]} and {other} were scored under different protocols ({details})")


def score_columns(frame: pd.DataFrame) -> list[str]:
    """Columns that hold scores, in the table's order: `scorer`, or `scorer.part` for a part of it."""
    return [column for column in frame.columns if column not in KEY_COLUMNS]


def check_scores(frame: pd.DataFrame, protocol: Protocol) -> None:
    """Refuses a table that is not exactly what its protocol announces.

    Args:
        frame: one row per image; columns prompt, ordinal, file, and one number per scorer or `scorer.part`.
        protocol: names the scorers and counts the images.

    Raises:
        ValueError: columns, images or scores are missing, unknown, repeated, or not finite.
    """
    if missing := [c for c in (*KEY_COLUMNS, *protocol.scorer_names) if c not in frame.columns]:
        raise ValueError(f"score table lacks columns: {', '.join(missing)}")
    known = set(protocol.scorer_names)
    if unknown := [c for c in score_columns(frame) if c not in known and c.partition(".")[0] not in known]:
        raise ValueError(f"score columns of no scorer of the protocol: {', '.join(unknown)}")
    if frame.duplicated(["prompt", "ordinal"]).any():
        raise ValueError("two rows of the score table share prompt and ordinal; prompts must be distinct")
    counts = frame.groupby("prompt").size()
    if len(counts) != protocol.n_prompts or (counts != protocol.images_per_prompt).any():
        raise ValueError(
            f"{len(frame)} images of {len(counts)} prompts, but the protocol says "
            f"{protocol.n_prompts} prompts x {protocol.images_per_prompt}"
        )
    for column in score_columns(frame):
        if bad := int((~np.isfinite(frame[column].to_numpy(dtype=float))).sum()):
            raise ValueError(f"{bad} of {len(frame)} {column} scores are not finite")


def write_scores(
    path: str | Path, frame: pd.DataFrame, protocol: Protocol, made_with: Mapping[str, str] | None = None
) -> None:
    """Stores one method's scores with the protocol they were made under, as parquet, atomically.

    `made_with` (versions, device) is stored beside it. It does not decide whether scores may be compared, because it
    moves last digits only; but the report says where it differs.

    Raises: ValueError as in `check_scores`.
    """
    check_scores(frame, protocol)
    scores = score_columns(frame)
    ordered = frame[[*KEY_COLUMNS, *scores]].astype(dict.fromkeys(scores, "float64"))
    table = pa.Table.from_pandas(ordered, preserve_index=False)
    metadata = {**(table.schema.metadata or {}), _METADATA_KEY: json.dumps(protocol.to_dict()).encode()}
    metadata[_MADE_WITH_KEY] = json.dumps(dict(made_with or {})).encode()
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), buffer)
    write_atomically(path, buffer.getvalue())


def read_scores(path: str | Path) -> tuple[pd.DataFrame, Protocol]:
    """Scores of one method and the protocol stored with them.

    Raises: ValueError if the file carries no protocol, or not the table its protocol announces.
    """
    table = pq.read_table(io.BytesIO(Path(path).read_bytes()))
    stored = (table.schema.metadata or {}).get(_METADATA_KEY)
    if stored is None:
        raise ValueError(f"{path} carries no protocol: its scores cannot be compared with anything")
    frame, protocol = table.to_pandas(), Protocol.from_dict(json.loads(stored))
    check_scores(frame, protocol)
    return frame, protocol


def read_made_with(path: str | Path) -> dict[str, str]:
    """What generated and scored the images of a table; {} where that was not recorded."""
    return json.loads((pq.read_schema(path).metadata or {}).get(_MADE_WITH_KEY, b"{}"))


def read_comparable(paths: Mapping[str, str | Path]) -> tuple[dict[str, pd.DataFrame], Protocol]:
    """Score tables of several methods and the one protocol they share.

    Raises: ValueError if there are none, or as `read_scores` and `assert_comparable`.
    """
    if not paths:
        raise ValueError("no score tables to compare")
    read = {name: read_scores(path) for name, path in paths.items()}
    protocols = {name: protocol for name, (_, protocol) in read.items()}
    assert_comparable(protocols)
    return {name: frame for name, (frame, _) in read.items()}, next(iter(protocols.values()))
