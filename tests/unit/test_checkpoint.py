"""Checkpoints: a resumed training is the interrupted one bit for bit; whose folder it is; what is left."""

import gc
import subprocess
import sys

import pytest
import torch

import tiny
from attune.training.checkpoint import Checkpoint
from trainables import HalfLine, Interrupted, equal, halved, interrupted, method, numbers, run_until


@pytest.mark.parametrize(("name", "accumulation"), [("sft", 1), ("sft", 2), ("dpo", 1), ("spo", 1)])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(new_policy, data, tmp_path, name, accumulation):
    """The process dies before the last batch. With two batches per step, the last but one is lost with it."""
    policy, asked = new_policy(), {"batches": 2 + accumulation, "accumulation": accumulation}
    history = tiny.run(method(name, policy, **asked), data)
    run_until(method(name, new_policy(), **asked), data, tmp_path, stop=1 + accumulation)
    gc.collect()  # the dead process's lock
    torch.rand(7)  # another process has another global state
    again, drawn = new_policy(seed=99), []  # another start, which the checkpoint must replace
    resumed = method(name, again, **asked)
    batches = tiny.batches(data, resumed)

    def counted(b, generator):
        drawn.append(b)
        return batches(b, generator)

    checkpoint = Checkpoint(tmp_path, "align@x", "key", every_seconds=0)
    assert tiny.run(resumed, data, batches=counted, checkpoint=checkpoint) == history
    assert equal(policy.parameters(), again.parameters())
    assert drawn == list(range(2, 2 + accumulation))  # resumed, not begun again
    checkpoint.discard()
    assert list(tmp_path.iterdir()) == []


def adapted(new_policy, seed):
    return new_policy(seed=seed)


def unfrozen(new_policy, seed):
    policy = new_policy(adapter=False)
    policy.unfreeze()
    tiny.move(policy, 0.01 * (seed > 0))
    return policy


OPTIONS = {
    "adafactor": (adapted, {"optimizer": "adafactor"}),
    "linear schedule": (adapted, {"schedule": "linear"}),
    "gradient checkpointing": (adapted, {"gradient_checkpointing": True}),
    "float16, loss scaled": (lambda new, seed: halved(new(seed=seed)), {"max_grad_norm": None}),
    "full fine-tuning": (unfrozen, {"lr": 1e-4}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_resuming_is_exact_under_every_option(new_policy, data, tmp_path, name):
    make, options = OPTIONS[name]
    options = options | {"batches": 4}
    policy = make(new_policy, 0)
    history = tiny.run(method("dpo", policy, **options), data)
    run_until(method("dpo", make(new_policy, 0), **options), data, tmp_path, stop=2)
    gc.collect()  # the dead process's lock
    again = make(new_policy, 0 if name == "full fine-tuning" else 99)  # there the start is the reference
    if name == "full fine-tuning":
        tiny.move(again, 0.1)
    checkpoint = Checkpoint(tmp_path, "align@x", "key", every_seconds=0)
    assert tiny.run(method("dpo", again, **options), data, checkpoint=checkpoint) == history
    assert equal(policy.parameters(), again.parameters())


def test_a_large_state_is_saved_less_often(tmp_path, monkeypatch):
    """A save that takes 10 s is not repeated before 200 s have passed, though 60 would do; one of 0 s is after 60."""
    clock = iter([0, 100, 110, 200, 310, 310, 370, 370])  # begun at 0
    monkeypatch.setattr("attune.training.checkpoint.time.monotonic", lambda: next(clock))
    checkpoint, saved = Checkpoint(tmp_path, "a", "k", every_seconds=60), []
    optimizer = torch.optim.SGD([torch.zeros(1)])
    for step in range(4):  # begun at 100 and done at 110; 200 is too early; 310; then 370
        checkpoint.maybe_save([], optimizer, {"step": step})
        saved.append(torch.load(checkpoint.file, weights_only=True)["progress"]["step"])
    assert saved == [0, 0, 2, 3]


def test_the_first_saves_come_early(tmp_path, monkeypatch):
    """After 5 s, then each time the training has run twice as long, until that is every 60 s."""
    now = [0.0]
    monkeypatch.setattr("attune.training.checkpoint.time.monotonic", lambda: now[0])
    checkpoint, saved = Checkpoint(tmp_path, "a", "k", every_seconds=60), []
    optimizer = torch.optim.SGD([torch.zeros(1)])
    for second in range(1, 260):
        now[0] = float(second)
        checkpoint.maybe_save([], optimizer, {"second": second})
        last = checkpoint.file.exists() and torch.load(checkpoint.file, weights_only=True)["progress"]["second"]
        saved += [last] if last and last not in saved else []
    assert saved == [5, 10, 20, 40, 80, 140, 200]


def test_the_loss_scale_is_resumed(tmp_path):
    """One overflow brings it from 65,536 to 512 for good; a resumed run does not begin anew."""
    slopes = ([100.0], [100.0], [1.0], [1.0])
    whole, cut, again = (HalfLine(*slopes) for _ in range(3))
    kept = Checkpoint(tmp_path, "a", "k")
    whole.train(4, {"checkpoint": kept}, max_grad_norm=None)
    assert torch.load(kept.file, weights_only=True)["progress"]["scaler"]["scale"] == 512
    checkpoint = Checkpoint(tmp_path, "b", "k", every_seconds=0)
    with pytest.raises(Interrupted):
        cut.train(4, {"checkpoint": checkpoint}, interrupted(numbers, 2), max_grad_norm=None)
    del checkpoint
    gc.collect()
    checkpoint = Checkpoint(tmp_path, "b", "k", every_seconds=0)
    again.train(4, {"checkpoint": checkpoint}, max_grad_norm=None)
    states = [torch.load(c.file, weights_only=True)["progress"] for c in (kept, checkpoint)]
    assert states[0] == states[1]
    assert torch.equal(whole.module.weight, again.module.weight)


def test_a_finished_run_is_not_run_again(new_policy, data, tmp_path):
    """Killed between the last batch and the outputs: nothing is drawn, the history is complete."""
    policy = new_policy()
    checkpoint = Checkpoint(tmp_path, "align@x", "key")  # saves at the end even if a minute has not passed
    history = tiny.run(method("sft", policy), data, checkpoint=checkpoint)
    del checkpoint
    gc.collect()
    again = new_policy()
    checkpoint = Checkpoint(tmp_path, "align@x", "key")
    trained = method("sft", again)
    assert tiny.run(trained, data, batches=interrupted(None, 0), checkpoint=checkpoint) == history
    assert equal(policy.parameters(), again.parameters())


def test_a_changed_key_does_not_resume(new_policy, data, tmp_path):
    run_until(method("sft", new_policy()), data, tmp_path, stop=2)
    assert (tmp_path / "align-x-key" / "state.pt").exists()
    checkpoint = Checkpoint(tmp_path, "align@x", "other")
    history = tiny.run(method("sft", new_policy()), data, checkpoint=checkpoint)
    assert [row["batch"] for row in history] == [0, 1, 2]


def test_nothing_half_written_is_left(new_policy, data, tmp_path):
    run_until(method("sft", new_policy()), data, tmp_path, stop=2)
    assert [file.name for file in (tmp_path / "align-x-key").iterdir()] == ["state.pt"]


HOLD = """
import filelock, sys
with filelock.FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_that_another_process_holds_is_refused(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "align-x-key.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match=r"another process is already running align@x: .*align-x-key\.lock"):
            Checkpoint(tmp_path, "align@x", "key")
        Checkpoint(tmp_path, "align@x", "different")  # another run is not in the way
        other.communicate()
    Checkpoint(tmp_path, "align@x", "key")  # and it is free once that process has ended
