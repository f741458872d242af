"""Checkpoints that cannot be read or written: the training goes on or starts anew, and says what happened."""

import errno
import gc
import math

import pytest
import torch

import tiny
from attune.config.plan import StagePlan
from attune.training import checkpoint as checkpoints
from attune.training.checkpoint import Checkpoint, damage, resumable
from attune.training.guard import NonFiniteError
from trainables import Line, equal, method, run_until


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(share):
    def flipped(file):
        data = bytearray(file.read_bytes())
        data[int(share * len(data))] ^= 0x40
        file.write_bytes(bytes(data))

    return flipped


def make_folder(file):
    file.unlink()
    file.mkdir()


DAMAGES = {
    "truncated": truncate,
    "empty": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "another dictionary": lambda file: torch.save({"a": 1}, file),
    "no dictionary": lambda file: torch.save(torch.zeros(3), file),
    "a folder": make_folder,
    "flipped at 25 %": flip(0.25),
    "flipped at 75 %": flip(0.75),
}


def test_every_bit_that_torch_would_stumble_over_is_found(tmp_path):
    """What passes the check can be read: bits of dates and paddings alone."""
    file = tmp_path / "state.pt"
    torch.save({"parameters": [torch.arange(4.0)], "optimizer": {}, "progress": {"batch": 1}}, file)
    whole = file.read_bytes()
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1
        file.write_bytes(bytes(changed))
        if damage(file) is None:
            state = torch.load(file, weights_only=True)
            assert state["parameters"][0].tolist() == [0, 1, 2, 3]
            assert state["progress"] == {"batch": 1}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state_is_set_aside_and_the_training_starts_anew(new_policy, data, tmp_path, caplog, name):
    policy = new_policy()
    history = tiny.run(method("sft", policy), data)
    run_until(method("sft", new_policy()), data, tmp_path, stop=2)
    gc.collect()  # the dead process's lock
    checkpoint = Checkpoint(tmp_path, "align@x", "key")
    DAMAGES[name](checkpoint.file)
    again = new_policy()
    assert tiny.run(method("sft", again), data, checkpoint=checkpoint) == history
    assert equal(policy.parameters(), again.parameters())
    (aside,) = checkpoint.folder.glob("damaged-*.pt")
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{checkpoint.file} is damaged (")
    assert str(aside) in message


def test_every_byte_of_the_weights_is_under_the_checksum(tmp_path):
    file = tmp_path / "state.pt"
    weights = torch.arange(40.0)
    torch.save({"parameters": [weights], "optimizer": {}, "progress": {}}, file)
    whole = file.read_bytes()
    first = whole.index(weights.numpy().tobytes())
    for at in range(first, first + 160):
        changed = bytearray(whole)
        changed[at] ^= 1
        file.write_bytes(bytes(changed))
        assert damage(file) is not None, at
    file.write_bytes(whole)
    assert damage(file) is None


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_the_save_and_not_the_training(tmp_path, caplog, monkeypatch):
    """The state saved before stays, and no part of the new one takes up room."""
    line = Line([1.0], [1.0], [1.0])
    checkpoint = Checkpoint(tmp_path, "a", "k", every_seconds=0)
    real, calls = torch.save, []

    def save(state, stream):
        calls.append(1)
        if len(calls) > 1:
            stream.write(b"half a state")
            full_disk()
        real(state, stream)

    monkeypatch.setattr(checkpoints.torch, "save", save)
    history, _ = line.train(3, {"checkpoint": checkpoint})
    assert len(history) == 3
    assert [file.name for file in checkpoint.folder.iterdir()] == ["state.pt"]
    assert torch.load(checkpoint.file, weights_only=True)["progress"]["batch"] == 1
    message = caplog.records[0].getMessage()
    assert message.startswith(f"{checkpoint.file} could not be saved ([Errno 28] No space left on device)")
    assert "MB are free" in message


def test_weights_that_are_not_finite_are_neither_saved_nor_returned(tmp_path):
    """The last step of a training makes them so: no later loss would tell."""
    line = Line([1.0], [1.0])
    checkpoint = Checkpoint(tmp_path, "a", "k", every_seconds=0)
    line.train(1, {"checkpoint": checkpoint})
    before = checkpoint.file.read_bytes()
    line.module.weight.data.fill_(math.inf)
    with pytest.raises(NonFiniteError, match=r"trained tensor 1 of 1, of shape \(1, 1\)"):
        checkpoint.maybe_save(line.parameters(), torch.optim.SGD(line.parameters()), {}, now=True)
    assert checkpoint.file.read_bytes() == before
    overshoot = Line([math.inf])
    with pytest.raises(NonFiniteError):
        overshoot.train(1, max_grad_norm=None)


def key_of(root, plan, folder):
    with resumable(root, "align@x", plan, [folder]) as checkpoint:
        return checkpoint.folder.name


def test_what_a_checkpoint_is_of(tmp_path, monkeypatch):
    """Plan, code, local files, library versions and what other stages made: a change of any is another training."""
    inputs = tmp_path / "prepared"
    inputs.mkdir()
    (inputs / "pairs").write_text("a")
    plan = StagePlan(profile="tiny", files={"models/b": "1"}, code={"attune.methods.dpo": "1"})
    names = [key_of(tmp_path, plan, inputs)]
    assert key_of(tmp_path, plan, inputs) == names[0]
    names += [
        key_of(tmp_path, plan.model_copy(update=change), inputs)
        for change in ({"profile": "other"}, {"files": {"models/b": "2"}}, {"code": {"attune.methods.dpo": "2"}})
    ]
    (inputs / "pairs").write_text("b")
    names.append(key_of(tmp_path, plan, inputs))
    monkeypatch.setattr(checkpoints, "versions", lambda: {"torch": "another"})
    names.append(key_of(tmp_path, plan, inputs))
    assert len(set(names)) == 6


def test_a_checkpoint_stays_until_everything_after_the_training_is_done(tmp_path):
    inputs = tmp_path / "prepared"
    inputs.mkdir()
    saved = []

    def training():
        with resumable(tmp_path, "align@x", StagePlan(profile="tiny"), [inputs]) as checkpoint:
            saved.append(checkpoint.file)
            Line([1.0]).train(1, {"checkpoint": checkpoint})
            full_disk()  # say, the curves could not be written

    with pytest.raises(OSError, match="No space"):
        training()
    assert saved[0].exists()
    gc.collect()
    with resumable(tmp_path, "align@x", StagePlan(profile="tiny"), [inputs]) as checkpoint:
        drawn = []
        Line([1.0]).train(1, {"checkpoint": checkpoint}, lambda b, shard: drawn.append(b))
    assert drawn == []
    assert not checkpoint.folder.exists()
