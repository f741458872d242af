"""The training loop: what a step does, what a checkpoint keeps, what stops it."""

import gc
import math
import subprocess
import sys
from collections import Counter
from functools import partialmethod

import pytest
import torch
from torch import nn

import tiny
from attune.config.settings import TrainingConfig
from attune.diffusion.noised import NoisedBatch
from attune.diffusion.policy import fingerprint
from attune.methods import dpo, sft, spo
from attune.training.checkpoint import Checkpoint
from attune.training.guard import NonFiniteError
from attune.training.loop import View, Watch, batch_generator, epoch_rows, train

OWN = {
    "sft": {},
    "dpo": {"beta": 500.0, "caption_dropout": 0.0},
    "spo": {"beta": 10.0, "clip": 0.1, "candidates": 2, "threshold": 0.0, "steps": 3, "start_step": 1}
    | {"minibatch_size": 2, "guidance_scale": 2.0, "inner_steps": 0},
}
METHODS = {"sft": sft, "dpo": dpo, "spo": spo}


def method(name, policy, **changes):
    loop = {"lora": None, "lr": 1e-3, "batches": 3, "batch_size": 2, "warmup": 2}
    config = METHODS[name].Config(**(tiny.PLAIN | loop | OWN[name] | changes))
    return METHODS[name].Method(config, policy, *([tiny.brightness] if name == "spo" else []))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------- arithmetic, on one weight


class Line:
    """One weight w, starting at 0; the loss of minibatch x is x w, so its gradient is x."""

    def __init__(self, *per_batch):
        self.module, self.per_batch = nn.Linear(1, 1, bias=False), per_batch
        self.module.weight.data.zero_()

    def parameters(self):
        return list(self.module.parameters())

    def minibatches(self, batch, generator):
        return self.per_batch[batch % len(self.per_batch)]

    def loss(self, x):
        loss = self.module(torch.tensor([x])).sum()
        return loss, {"loss": loss, "x": x}

    def train(self, batches, **config):
        plain = {"lr": 0.1, "batch_size": 1, "weight_decay": 0.0}
        config = TrainingConfig(batches=batches, **(plain | config))
        history, _ = train(self, self, lambda b, generator: b, config, seed=0)
        return history, self.module.weight.item()


def test_warm_up_by_hand():
    """A constant gradient makes AdamW move by its rate: 0.1 (1/4 + 2/4 + 3/4 + 1 + 1) = 0.35 downhill."""
    history, w = Line([1.0]).train(5, warmup=4)
    assert [row["lr"] for row in history] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert w == pytest.approx(-0.35, abs=1e-6)
    assert Line([1.0]).train(5)[1] == pytest.approx(-0.5, abs=1e-6)


def test_linear_schedule_by_hand():
    """Two steps up, then down over the four batches that are left: 1, 3/4, 2/4, 1/4 of the rate."""
    history, _ = Line([1.0]).train(6, warmup=2, schedule="linear")
    assert [row["lr"] for row in history] == pytest.approx([0.05, 0.1, 0.1, 0.075, 0.05, 0.025])
    history, _ = Line([1.0]).train(4, schedule="linear")
    assert [row["lr"] for row in history] == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_linear_schedule_of_rollouts():
    """Several steps in a batch share its rate; a batch without any passes all the same."""
    history, _ = Line([1.0, 2.0], [], [1.0]).train(6, schedule="linear")
    assert [row["lr"] for row in history] == pytest.approx([0.1 * left / 6 for left in (6, 6, 4, 3, 3, 1)])
    history, _ = Line([1.0, 2.0]).train(2, warmup=3, schedule="linear")  # warm-up ends inside the last batch
    assert [row["lr"] for row in history] == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1])


def test_adafactor_goes_downhill_at_the_given_rate():
    """Its update is gradient / root mean square: for a constant gradient the rate itself, as with AdamW."""
    assert Line([1.0]).train(5, optimizer="adafactor")[1] == pytest.approx(-0.5, abs=1e-4)


def test_weight_decay_by_hand():
    """No gradient, w = 1: each step leaves 1 - lr * decay = 0.95."""
    line = Line([0.0])
    line.module.weight.data.fill_(1.0)
    assert line.train(2, weight_decay=0.5)[1] == pytest.approx(0.95**2)


def test_clipping_by_hand():
    """Gradients 1 and 100 clipped to norm 1 are gradients 1 and 1; the logged norm is the true one."""
    history, w = Line([1.0, 100.0]).train(1, max_grad_norm=1.0)
    assert [row["grad_norm"] for row in history] == pytest.approx([1, 100])
    assert w == pytest.approx(Line([1.0, 1.0]).train(1)[1], abs=1e-6)
    history, free = Line([1.0, 100.0]).train(1, max_grad_norm=None)
    assert [row["grad_norm"] for row in history] == pytest.approx([1, 100])
    assert abs(free - w) > 1e-3


def test_accumulation_is_the_mean_gradient():
    """Minibatches 1 and 3 make one step with gradient 2, and their mean is logged."""
    history, _ = Line([1.0, 3.0]).train(1, accumulation=2, max_grad_norm=None)
    assert [(row["step"], row["grad_norm"], row["x"]) for row in history] == [(1, pytest.approx(2), 2)]


def test_accumulation_runs_across_batches():
    """Offline methods yield one minibatch per batch: five batches, two per step, and the last alone."""
    history, _ = Line([1.0], [3.0], [5.0], [7.0], [9.0]).train(5, accumulation=2)
    assert [(row["step"], row["batch"], row["x"]) for row in history] == [(1, 1, 2), (2, 3, 6), (3, 4, 9)]


def test_batches_may_yield_nothing():
    """As when the preference model is confident of no pair; training continues."""
    history, w = Line([], [1.0, 2.0], []).train(3)
    assert [(row["step"], row["batch"]) for row in history] == [(1, 1), (2, 1)]
    assert w < 0
    assert Line([]).train(2) == ([], 0.0)


def test_what_is_logged_is_the_history():
    logged, shown = [], []
    line = Line([1.0, 2.0])
    config = TrainingConfig(lr=0.1, batches=4, batch_size=1)
    view = View("a line", lambda row, step: logged.append({**row, "step": step}), shown.append, 2)
    history, _ = train(line, line, lambda b, generator: b, config, seed=0, view=view)
    assert [{k: v for k, v in row.items() if k != "batch"} for row in history] == logged
    assert [row["batch"] for row in history] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {"loss", "x", "grad_norm", "lr", "step"} == set(logged[0])
    assert shown == [4, 8]  # the optimizer step after batches 2 and 4


def test_an_infinite_gradient_of_a_finite_loss_stops():
    class Root(Line):
        def loss(self, x):
            loss = self.module(torch.tensor([x])).sum().sqrt()  # slope infinite at 0
            return loss, {"loss": loss}

    with pytest.raises(NonFiniteError, match="grad_norm is inf at step 1"):
        Root([1.0]).train(1, max_grad_norm=None)


# ---------------------------------------------------------------- randomness


def test_batch_generators_differ():
    draws = {torch.rand(1, generator=batch_generator(seed, b)).item() for seed in range(3) for b in range(-2, 3)}
    assert len(draws) == 15
    assert torch.equal(*(torch.rand(4, generator=batch_generator(1, 2)) for _ in range(2)))


@pytest.mark.parametrize(("n", "batch_size"), [(7, 3), (4, 4), (3, 8), (5, 1)])
def test_every_epoch_shows_every_row_once(n, batch_size):
    """Batches run across epochs: n batches of any size are exactly `batch_size` epochs."""
    rows = torch.cat([epoch_rows(n, batch_size, b, seed=0) for b in range(n)])
    assert len(rows) == n * batch_size
    for epoch in rows.split(n):
        assert sorted(epoch.tolist()) == list(range(n))
    assert Counter(rows.tolist()) == Counter(dict.fromkeys(range(n), batch_size))
    if batch_size > 1 and n > 3:
        assert not torch.equal(*rows.split(n)[:2])  # shuffled anew
    assert not torch.equal(rows, torch.cat([epoch_rows(n, batch_size, b, seed=1) for b in range(n)]))


# ---------------------------------------------------------------- real methods on a real network


@pytest.mark.parametrize("name", METHODS)
def test_same_seed_same_bits_and_only_the_adapter_moves(new_policy, data, name):
    ends = []
    for seed in (0, 0, 1):
        policy = new_policy()
        before, base = tiny.weights(policy), fingerprint(policy.denoiser)
        history = tiny.run(method(name, policy), data, seed=seed)
        assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in history)
        assert fingerprint(policy.denoiser) == base
        after = policy.denoiser.state_dict()
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert moved == {key for key in before if "lora_" in key}
        ends.append((tiny.adapter(policy), history))
    assert equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert not equal(ends[0][0], ends[2][0])


@pytest.mark.parametrize("name", METHODS)
def test_optimizer_steps_are_as_many_as_asked(new_policy, data, name):
    """SPO: 2 prompts, 2 steps with candidates, all pairs confident: 4 pairs, 2 minibatches of 2."""
    per_batch = {"sft": 1, "dpo": 1, "spo": 2}[name]
    for accumulation in (1, 2):
        policy = new_policy()
        history = tiny.run(method(name, policy, accumulation=accumulation, batches=2), data)
        assert [row["step"] for row in history] == list(range(1, 2 * per_batch // accumulation + 1))


class Fed:
    """A method's loss on minibatches that were made beforehand."""

    def __init__(self, inner):
        self.policy, self.config, self.loss = inner.policy, inner.config, inner.loss

    def minibatches(self, batch, generator):
        return iter(batch)


def test_two_minibatches_accumulated_are_one_of_twice_the_size(new_policy, data):
    t, noise = data.pair_batch(range(6)).draw_noise(torch.zeros(1000), batch_generator(0, 0))
    whole = data.pair_batch(range(6))
    rows = NoisedBatch(whole.chosen, t, noise, whole.cond)
    half = [rows[:3], rows[3:]]
    ends = []
    for minibatches in ([rows], half):
        policy = new_policy(moved=0.1)
        inner = method("sft", policy, accumulation=len(minibatches), batches=1, warmup=0)
        history = tiny.run(Fed(inner), data, batches=lambda b, g, fed=minibatches: fed)
        ends.append((history, tiny.adapter(policy)))
    (one, many) = (history for history, _ in ends)
    assert len(one) == len(many) == 1
    assert many[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5)
    assert many[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)
    for a, b in zip(ends[0][1], ends[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)  # one step moves by 1e-2


# ---------------------------------------------------------------- lighter and faster, and the same


@pytest.mark.parametrize("name", METHODS)
def test_gradient_checkpointing_changes_nothing(new_policy, new_xl_policy, data, name):
    ends = []
    for wanted in (False, True):
        policy, calls = new_policy(moved=0.1), []
        if wanted:
            policy.denoiser.enable_gradient_checkpointing()
        policy.denoiser.mid_block.resnets[1].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        history = tiny.run(method(name, policy), data)
        ends.append((history, tiny.adapter(policy), len(calls)))
    (history, weights, calls), (again, same, more) = ends
    assert history == again
    assert equal(weights, same)
    assert more > calls  # computed twice


@pytest.mark.parametrize("full", [False, True])
def test_a_compiled_network_is_the_same_network(new_policy, data, tmp_path, monkeypatch, full):
    """Adapters are switched, losses stay, the reference too, and names in the file are plain.

    Everything but the generation of machine code, which takes a minute and rounds differently.
    """
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    ends = []
    for wanted in (False, True):
        policy = new_policy(adapter=not full)
        if full:
            policy.unfreeze()
        base, names = fingerprint(policy.reference_model or policy.denoiser), list(policy.denoiser.state_dict())
        history = tiny.run(method("dpo", policy, compile=wanted, lr=1e-4), data)
        assert (policy.denoiser._compiled_call_impl is not None) == wanted
        assert fingerprint(policy.reference_model or policy.denoiser) == base
        assert list(policy.denoiser.state_dict()) == names
        policy.save(tmp_path / str(wanted))
        ends.append(history)
    plain, compiled = ends
    assert compiled[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in compiled] == pytest.approx([row[key] for row in plain], rel=1e-3)
    files = [{file.relative_to(tmp_path / x) for file in (tmp_path / x).rglob("*")} for x in ("False", "True")]
    assert files[0] == files[1]
    new_policy(adapter=False).load(tmp_path / "True")


@pytest.mark.parametrize("name", METHODS)
def test_every_weight_trains_and_the_reference_does_not(new_policy, data, name):
    policy = new_policy(adapter=False)
    policy.unfreeze()
    base, before = fingerprint(policy.reference_model), tiny.weights(policy)
    history = tiny.run(method(name, policy, lr=1e-4), data)
    assert fingerprint(policy.reference_model) == base
    if name == "dpo":
        assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    after = policy.denoiser.state_dict()
    assert not [key for key in before if torch.equal(before[key], after[key])]


# ---------------------------------------------------------------- float16


def halved(policy):
    """The policy on a float16 base, its adapter left in float32."""
    for weight in policy.denoiser.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.half()
    policy.backbone.dtype = torch.float16
    return policy


class Steep(Line):
    """A line through float16, with a gradient of 3e-8 there: nothing, unless the loss is scaled up."""

    def __init__(self, *per_batch):
        super().__init__(*per_batch)
        self.autocast = torch.float16

    def loss(self, x):
        through = (self.module.weight * 1.0).half()
        loss = (through.float() * x).sum()
        return loss, {"loss": loss}


def test_small_gradients_survive_float16():
    history, w = Steep([2e-8]).train(3)
    assert [row["grad_norm"] for row in history] == pytest.approx([2e-8] * 3, rel=0.01)
    assert w < -0.1
    line = Steep([2e-8])
    line.autocast = None
    history, w = line.train(3)
    assert [row["grad_norm"] for row in history] == [0] * 3


def test_an_overflow_costs_a_repeat_and_no_minibatch():
    """A gradient of 100 overflows float16 (65,504) at scale 65,536; the scale is halved until it does not."""
    history, w = Steep([100.0]).train(3, max_grad_norm=None)
    assert [row["grad_norm"] for row in history] == [100] * 3
    assert w == pytest.approx(-0.3, abs=1e-3)


def test_a_gradient_that_is_infinite_at_any_scale_stops():
    class Root(Steep):
        def loss(self, x):
            loss = self.module(torch.tensor([x])).sum().sqrt()
            return loss, {"loss": loss}

    with pytest.raises(NonFiniteError, match="grad_norm is inf at step 1"):
        Root([1.0]).train(1, max_grad_norm=None)


@pytest.mark.parametrize("name", METHODS)
def test_methods_train_on_a_float16_base(new_policy, data, name):
    policy = halved(new_policy())
    base = fingerprint(policy.denoiser)
    history = tiny.run(method(name, policy), data)
    assert all(math.isfinite(row["loss"]) and 0 < row["grad_norm"] < math.inf for row in history)
    assert fingerprint(policy.denoiser) == base
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}


# ---------------------------------------------------------------- checkpoints


class Interrupted(Exception):
    """As if the process had been killed."""


def interrupted(drawn, at):
    def batches(b, generator):
        if b == at:
            raise Interrupted
        return drawn(b, generator)

    return batches


def run_until(trained, data, root, stop, key="key"):
    """Trains with a checkpoint after every batch; the process 'dies' before batch `stop`."""
    checkpoint = Checkpoint(root, "align@x", key, every_seconds=0)
    with pytest.raises(Interrupted):
        tiny.run(trained, data, batches=interrupted(tiny.batches(data, trained), stop), checkpoint=checkpoint)


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
    clock = iter([0, 100, 110, 200, 310, 310, 370, 370])
    monkeypatch.setattr("attune.training.checkpoint.time.monotonic", lambda: next(clock))
    checkpoint, saved = Checkpoint(tmp_path, "a", "k", every_seconds=60), []
    optimizer = torch.optim.SGD([torch.zeros(1)])
    for step in range(4):  # begun at 100 and done at 110; 200 is too early; 310; then 370
        checkpoint.maybe_save([], optimizer, {"step": step}, last=False)
        saved.append(torch.load(checkpoint.file, weights_only=True)["progress"]["step"])
    assert saved == [0, 0, 2, 3]


# ---------------------------------------------------------------- a held-out score


def watching(scores, told, **options):
    given = iter(scores)
    return Watch(lambda: next(given), told=lambda batch, step, score: told.append((batch, step, score)), **options)


def test_patience_ends_training_and_keeps_the_best():
    """Scores .1 before training, then .3, .2, .25 every 2 batches: two without a new best end it after 6 batches.

    The best was taken after 2 batches, where AdamW at rate .1 has brought the weight to -0.2.
    """
    line, told = Line([1.0]), []
    config = TrainingConfig(lr=0.1, batches=20, batch_size=1, weight_decay=0.0)
    watch = watching([0.1, 0.3, 0.2, 0.25], told, every=2, patience=2)
    history, scores = train(line, line, lambda b, generator: b, config, seed=0, watch=watch)
    assert len(history) == 6
    assert told == [(0, 0, 0.1), (2, 2, 0.3), (4, 4, 0.2), (6, 6, 0.25)]
    assert [tuple(row.values()) for row in scores] == told
    assert line.module.weight.item() == pytest.approx(-0.2, abs=1e-6)


def test_without_patience_a_falling_score_changes_nothing():
    line, told = Line([1.0]), []
    config = TrainingConfig(lr=0.1, batches=5, batch_size=1, weight_decay=0.0)
    train(line, line, lambda b, generator: b, config, seed=0, watch=watching([3, 2, 1, 0], told, every=2))
    assert [batch for batch, _, _ in told] == [0, 2, 4, 5]
    assert line.module.weight.item() == Line([1.0]).train(5)[1]


def test_without_its_ends_a_watch_looks_in_between_alone():
    line, told = Line([1.0]), []
    config = TrainingConfig(lr=0.1, batches=4, batch_size=1, weight_decay=0.0)
    train(line, line, lambda b, generator: b, config, seed=0, watch=watching([1], told, every=2, ends=False))
    assert told == [(2, 2, 1)]


def test_the_last_batch_is_scored_once_where_its_turn_comes():
    line, told = Line([1.0]), []
    config = TrainingConfig(lr=0.1, batches=4, batch_size=1, weight_decay=0.0)
    train(line, line, lambda b, generator: b, config, seed=0, watch=watching([0, 1, 2], told, every=2, patience=9))
    assert [batch for batch, _, _ in told] == [0, 2, 4]
    assert line.module.weight.item() == pytest.approx(-0.4, abs=1e-6)  # the last is the best


def test_a_score_that_is_no_number_stops_training():
    line = Line([1.0])
    config = TrainingConfig(lr=0.1, batches=4, batch_size=1)
    with pytest.raises(NonFiniteError, match="after batch 2"):
        train(line, line, lambda b, generator: b, config, seed=0, watch=watching([0.0, math.nan], [], every=2))


def test_a_resumed_training_stops_where_it_would_have(tmp_path):
    """The scores so far and the best weights are in the checkpoint: interrupted after 5 of 6 batches."""
    config = TrainingConfig(lr=0.1, batches=20, batch_size=1, weight_decay=0.0)
    curve = {0: 0.1, 2: 0.3, 4: 0.2, 6: 0.25}

    def run(line, batches, checkpoint=None, taken=()):
        watch = watching([score for batch, score in curve.items() if batch not in taken], [], every=2, patience=2)
        return train(line, line, batches, config, seed=0, checkpoint=checkpoint, watch=watch)

    whole, cut, again = Line([1.0]), Line([1.0]), Line([1.0])
    expected = run(whole, lambda b, generator: b)
    checkpoint = Checkpoint(tmp_path, "a", "k", every_seconds=0)
    with pytest.raises(Interrupted):
        run(cut, interrupted(lambda b, generator: b, 5), checkpoint)
    del checkpoint
    gc.collect()
    checkpoint = Checkpoint(tmp_path, "a", "k", every_seconds=0)
    assert run(again, lambda b, generator: b, checkpoint, taken=(0, 2, 4)) == expected
    assert torch.equal(whole.module.weight, again.module.weight)


def test_the_loss_scale_is_resumed(tmp_path):
    """One overflow brings it from 65,536 to 512 for good; a resumed run does not begin anew."""

    def line():
        return Steep([100.0], [100.0], [1.0], [1.0])

    def config():
        return TrainingConfig(lr=0.1, batches=4, batch_size=1, max_grad_norm=None)

    whole = line()
    train(whole, whole, lambda b, generator: b, config(), seed=0, checkpoint=(kept := Checkpoint(tmp_path, "a", "k")))
    assert torch.load(kept.file, weights_only=True)["progress"]["scaler"]["scale"] == 512
    cut = line()
    checkpoint = Checkpoint(tmp_path, "b", "k", every_seconds=0)
    with pytest.raises(Interrupted):
        train(cut, cut, interrupted(lambda b, generator: b, 2), config(), seed=0, checkpoint=checkpoint)
    del checkpoint
    gc.collect()
    again = line()
    checkpoint = Checkpoint(tmp_path, "b", "k", every_seconds=0)
    train(again, again, lambda b, generator: b, config(), seed=0, checkpoint=checkpoint)
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


# ---------------------------------------------------------------- numbers that stop being numbers


def broken(policy, data, trained, tmp_path, damage):
    """Does `damage` before batch 2; returns the error and the checkpoint before and after."""
    drawn, before = tiny.batches(data, trained), []
    checkpoint = Checkpoint(tmp_path, "align@x", "key", every_seconds=0)

    def batches(b, generator):
        if b == 2:
            before.append(checkpoint.file.read_bytes())
            damage(policy.denoiser)
        return drawn(b, generator)

    with pytest.raises(NonFiniteError) as error:
        tiny.run(trained, data, batches=batches, checkpoint=checkpoint)
    return str(error.value), before[0], checkpoint.file.read_bytes()


def nan_weight(network):
    network.mid_block.resnets[0].conv1.weight.data[0, 0, 0, 0] = math.nan


def overflow(network):
    network.mid_block.resnets[1].conv2.weight.data.fill_(3e38)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (nan_weight, "weight mid_block.resnets.0.conv1.weight is not finite"),
        (overflow, "first bad output in module mid_block.resnets.1.conv2"),
    ],
)
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_nan_stops_with_the_first_bad_module_and_spares_the_checkpoint(policy, data, tmp_path, name, damage, named):
    message, before, after = broken(policy, data, method(name, policy), tmp_path, damage)
    assert message.endswith(named)
    assert message.startswith("loss is ")
    assert "at step 3" in message
    assert before == after
