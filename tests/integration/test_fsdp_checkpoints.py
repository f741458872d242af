"""Checkpoints of sharded weights: exact with as many processes, right with more or fewer, and whole at any moment."""

from __future__ import annotations

import gc
import json
import logging
import resource
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import tiny
from attune.distributed import Shard
from attune.fsdp import shard_with_frozen_copy
from attune.stop import Stopped
from attune.training import pieces
from attune.training.checkpoint import Checkpoint
from attune.training.early_stopping import EarlyStopping
from attune.training.step import init_distributed
from forked import together
from trainables import Interrupted, Line, at_batch, every_weight, flat, interrupted, method, numbers

pytestmark = pytest.mark.integration

BATCHES = 5
SCORES = [0.0, 2.0, 1.0, 1.0, 1.0, 1.0]  # before each batch and at the end; the second is the best


class Net(Line):
    """A small network: its pieces are unequal, and of the last weight, which has one row, only one process has any."""

    def __init__(self, shard: Shard):
        super().__init__([(1.0, 2.0, 3.0)], [(0.5, -1.0)])
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
        self.shard = replace(shard, sharded_weights=shard.world_size > 1)
        if self.shard.sharded_weights:
            init_distributed(self.shard)
            self.reference_model = shard_with_frozen_copy(self.module)

    def loss(self, rows):
        x = torch.tensor(rows)[:, None] * torch.tensor([1.0, 0.5, -2.0])
        loss = self.module(x).square().mean()
        return loss, {"loss": loss}


def training(shard, root=None, stop=None, first=0, batches=BATCHES):
    """History, last and best weights of a training that has a checkpoint in `root`, and may die before batch `stop`.

    Args:
        first: the batch at which it goes on; then its own weights are others, which the checkpoint must replace.
    """
    net = Net(shard)
    for weight in net.parameters() if first else []:
        weight.data += 1
    kept = None if root is None else Checkpoint(root, "align@x", "key", 0, writes=shard.is_main_process)
    scores = iter(SCORES[first:])
    options = {"checkpoint": kept, "early_stopping": EarlyStopping(lambda: next(scores), every=1, patience=9)}
    drawn = numbers if stop is None else interrupted(numbers, stop)
    try:
        history, _ = net.train(batches, options, drawn, batch_size=3, weight_decay=0.1)
    except Interrupted:
        history = []
    return history, flat(net.parameters())


def new_folder(tmp_path):
    """One in which processes find each other."""
    folder = tmp_path / f"together-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    return folder


def begun(n, tmp_path, stop=3):
    """Folder of a checkpoint that n processes left when they died before batch `stop`."""
    root = tmp_path / "root"
    if n == 1:
        training(Shard(), root, stop)
        gc.collect()  # the dead process's lock
    else:
        together(n, new_folder(tmp_path), lambda shard: training(shard, root, stop))
    return root


def saved_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_with_as_many_processes_every_bit_is_that_of_a_training_that_was_never_stopped(tmp_path):
    """History, and weights: those of the best score, which was taken before the stop, so they are in the checkpoint."""
    whole = together(2, new_folder(tmp_path), training)
    root = begun(2, tmp_path)
    folder = root / "align-x-key"
    assert len(list(folder.glob("pieces-*/"))) == 1  # those before it are gone
    assert {file.suffix for file in folder.glob("pieces-*/*")} == {".safetensors"}
    assert json.loads((folder / "pieces.json").read_text())["progress"]["batch"] == 3
    again = together(2, new_folder(tmp_path), partial(training, root=root, first=3))
    for (history, after), (expected, ended) in zip(again, whole, strict=True):
        assert history == expected
        assert [row["batch"] for row in history] == list(range(BATCHES))
        assert torch.equal(after, ended)


def test_the_same_of_a_denoiser(new_policy, data, tmp_path):
    def work(shard, root=None, stop=None):
        policy = every_weight(new_policy(adapter=False), replace(shard, sharded_weights=True))
        built = method("dpo", policy, batches=2)
        kept = None if root is None else Checkpoint(root, "align@x", "key", 60, writes=shard.is_main_process)
        if stop is not None and not shard.is_main_process:
            at_batch(built, stop, lambda: signal.raise_signal(signal.SIGTERM))  # it saves after this batch, and ends
        try:
            return tiny.run(built, data, checkpoint=kept), flat(policy.parameters())
        except Stopped:
            return "stopped"

    whole = together(2, new_folder(tmp_path), work)
    root = tmp_path / "root"
    assert together(2, new_folder(tmp_path), partial(work, root=root, stop=0)) == ["stopped"] * 2
    again = together(2, new_folder(tmp_path), partial(work, root=root))
    for (history, after), (expected, ended) in zip(again, whole, strict=True):
        assert history == expected
        assert torch.equal(after, ended)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 3), (1, 2)])
def test_another_number_of_processes_goes_on(tmp_path, before, after):
    """Pieces are put together or cut anew; and what was saved in the other way is removed by the next save."""
    expected, ended = training(Shard())
    root = begun(before, tmp_path)
    assert ("state.pt" in saved_in(root)) == (before == 1)
    go_on = partial(training, root=root, first=3)
    found = [go_on(Shard())] if after == 1 else together(after, new_folder(tmp_path), go_on)
    for history, weights in found:
        assert [row["batch"] for row in history] == list(range(BATCHES))
        for row, wanted in zip(history, expected, strict=True):
            assert row == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        torch.testing.assert_close(weights, ended, rtol=1e-4, atol=1e-5)
    assert ("state.pt" in saved_in(root)) == (after == 1)
    assert bool(list(root.glob("*/pieces*"))) == (after > 1)


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


DAMAGES = {
    "a bit": lambda folder: flip(max(folder.glob("pieces-*/*"))),
    "a file is missing": lambda folder: max(folder.glob("pieces-*/*")).unlink(),
    "half a pointer": lambda folder: (folder / "pieces.json").write_bytes((folder / "pieces.json").read_bytes()[:99]),
    "another folder": lambda folder: (folder / "pieces.json").write_text('{"folder":"/", "files":{}, "progress":{}}'),
    "no dictionary": lambda folder: (folder / "pieces.json").write_text("[1]"),
}


def test_damage_is_noticed_and_nothing_is_lost(tmp_path, caplog):
    root = begun(2, tmp_path, stop=1)
    folder, before = root / "align-x-key", saved_in(root)
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name, harm in DAMAGES.items():
        assert pieces.damage(folder / "pieces.json") is None
        harm(folder)
        with caplog.at_level(logging.WARNING):
            Checkpoint(root, "align@x", "key").set_aside_if_damaged()
        gc.collect()
        assert not (folder / "pieces.json").exists(), name
        message = caplog.records[-1].getMessage()
        (aside,) = folder.glob("damaged-*/")
        assert message.startswith(f"{folder}/pieces.json is damaged ("), name
        assert message.endswith(f"the file is now {aside}/pieces.json")
        assert len(saved_in(root)) >= len(before) - (name == "a file is missing")
        for path in [path for path in aside.rglob("*") if path.is_file()]:
            path.unlink()
        for path in sorted(aside.rglob("*"), reverse=True):
            path.rmdir()
        aside.rmdir()
        for path, content in kept.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)


def test_a_full_disk_of_one_process_costs_the_save_and_not_the_training(tmp_path):
    """The system refuses the second process files over 100 bytes from the second save on; the first one's stay."""
    root, real = tmp_path / "root", pieces._written

    def written(target, tensors, rank):
        if rank == 1 and list(target.parent.glob("pieces-*/")):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        return real(target, tensors, rank)

    def work(shard):
        lines = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())
        logging.getLogger("attune.checkpoint").addHandler(handler)
        pieces._written = written
        return [row["batch"] for row in training(shard, root)[0]], lines

    (first, said), (second, nothing) = together(2, new_folder(tmp_path), work)
    assert first == second == list(range(BATCHES))
    assert "pieces.json could not be saved (process 1: " in said[0]
    assert "File too large" in said[0]
    assert nothing == []
    assert json.loads((root / "align-x-key/pieces.json").read_text())["progress"]["batch"] == 1
    assert len(list(root.glob("*/pieces-*/"))) == 1
    assert pieces.damage(root / "align-x-key/pieces.json") is None


@pytest.mark.parametrize("moment", ["_written", "_pointed", "remove"])
def test_killed_while_it_saves_it_has_the_last_whole_state(tmp_path, moment):
    """Before anything of the third state is written, before it is pointed at, and before the second is removed."""
    root, real, saves = tmp_path / "root", getattr(pieces, moment), []

    def dies(*args, **options):
        saves.append(1)
        if len(saves) == 3:
            raise SystemExit  # nothing catches it, and nothing tidies up
        return real(*args, **options)

    def work(shard):
        if shard.is_main_process:
            setattr(pieces, moment, dies)
        try:
            training(shard, root)
        except SystemExit:
            return "killed"
        except RuntimeError as error:
            return str(error)

    killed, other = together(2, new_folder(tmp_path), work)
    assert killed == "killed"
    assert "process 1 of the 2 that work together cannot go on: another is gone. " in other
    pointer = root / "align-x-key/pieces.json"
    assert pieces.damage(pointer) is None
    assert json.loads(pointer.read_text())["progress"]["batch"] == (3 if moment == "remove" else 2)
    found = together(2, new_folder(tmp_path), lambda shard: training(shard, root)[0])
    assert [row["batch"] for row in found[0]] == list(range(BATCHES))
    assert len(list(root.glob("*/pieces-*/"))) == 1
