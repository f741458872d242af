"""One optimizer step: the gradient of a group of minibatches, its precision, and what stops it."""

import math

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

import tiny
from attune.diffusion.noised import NoisedBatch
from attune.diffusion.path import VP
from attune.distributed import Part
from attune.training.checkpoint import Checkpoint
from attune.training.guard import NonFiniteError
from attune.training.step import minibatch_weights
from trainables import METHODS, HalfLine, Line, at_batch, halved, method

# ---------------------------------------------------------------- arithmetic, on one weight


def test_adafactor_goes_downhill_at_the_given_rate():
    """Its update is gradient / root mean square: for a constant gradient the rate itself, as with AdamW."""
    line = Line([1.0])
    line.train(5, optimizer="adafactor")
    assert line.w == pytest.approx(-0.5, abs=1e-4)


def test_weight_decay_by_hand():
    """No gradient, w = 1: each step leaves 1 - lr * decay = 0.95."""
    line = Line([0.0])
    line.module.weight.data.fill_(1.0)
    line.train(2, weight_decay=0.5)
    assert line.w == pytest.approx(0.95**2)


def test_clipping_by_hand():
    """Gradients 1 and 100 clipped to norm 1 are gradients 1 and 1; the logged norm is the true one."""
    clipped, ones, free = Line([1.0, 100.0]), Line([1.0, 1.0]), Line([1.0, 100.0])
    history, _ = clipped.train(1, max_grad_norm=1.0)
    assert [row["grad_norm"] for row in history] == pytest.approx([1, 100])
    ones.train(1)
    assert clipped.w == pytest.approx(ones.w, abs=1e-6)
    history, _ = free.train(1, max_grad_norm=None)
    assert [row["grad_norm"] for row in history] == pytest.approx([1, 100])
    assert abs(free.w - clipped.w) > 1e-3


# ---------------------------------------------------------------- accumulation


def test_accumulation_is_the_mean_gradient():
    """Minibatches 1 and 3 make one step with gradient 2, and their mean is logged."""
    history, _ = Line([1.0, 3.0]).train(1, accumulation=2, max_grad_norm=None)
    assert [(row["step"], row["grad_norm"], row["x"]) for row in history] == [(1, pytest.approx(2), 2)]


def test_accumulation_weighs_rows_alike():
    """10 rows of 1 and 1 row of 100 are 11 rows: (10 * 1 + 1 * 100) / 11 = 10, where the mean of means is 50.5."""
    history, _ = Line([(1.0,) * 10, (100.0,)]).train(1, accumulation=2, max_grad_norm=None)
    assert [(row["grad_norm"], row["x"]) for row in history] == [(pytest.approx(10), pytest.approx(10))]
    assert minibatch_weights([Part(None, 10), Part(None, 1)]) == pytest.approx([20 / 11, 2 / 11])


def test_equal_minibatches_weigh_exactly_one():
    """So that their gradients are not rounded otherwise than without weights."""
    assert all(minibatch_weights([Part(None, n)] * k) == [1.0] * k for n in range(1, 50) for k in range(1, 50))


class Fed:
    """A method's loss on minibatches that were made beforehand."""

    def __init__(self, inner):
        self.policy, self.config, self.loss = inner.policy, inner.config, inner.loss

    def minibatches(self, batch, draws):
        return iter(batch)


def test_two_minibatches_accumulated_are_one_of_twice_the_size(new_policy, data):
    whole = data.pair_batch(range(6))
    t, noise = whole.draw_noise(VP(torch.zeros(1000)), tiny.draws(6))

    def part(rows):
        return Part(NoisedBatch(whole.chosen[rows], t[rows], noise[rows], whole.cond[rows]), len(t[rows]))

    ends = []
    for minibatches in ([part(slice(6))], [part(slice(3)), part(slice(3, 6))]):
        policy = new_policy(moved=0.1)
        inner = method("sft", policy, accumulation=len(minibatches), batches=1, warmup=0)
        history = tiny.run(Fed(inner), data, batches=lambda b, shard, fed=minibatches: Part(fed, 6))
        ends.append((history, tiny.adapter(policy)))
    (one, many) = (history for history, _ in ends)
    assert len(one) == len(many) == 1
    assert many[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5)
    assert many[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)
    for a, b in zip(ends[0][1], ends[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)  # one step moves by 1e-2


# ---------------------------------------------------------------- what the environment says


def forget_accelerate_state():
    """Accelerate reads the environment once per process, and keeps it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def fresh_accelerate():
    forget_accelerate_state()
    yield
    forget_accelerate_state()


@pytest.mark.parametrize(
    "environment",
    [
        {"ACCELERATE_MIXED_PRECISION": "bf16"},
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        {"ACCELERATE_DYNAMO_BACKEND": "inductor"},
    ],
    ids=lambda environment: next(iter(environment)),
)
def test_the_environment_changes_no_number(monkeypatch, fresh_accelerate, environment):
    """`accelerate launch` exports these from the user's default configuration."""
    ends = []
    for variables in ({}, environment):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        forget_accelerate_state()
        line = Line([0.3], [0.7])
        module = line.module
        history, _ = line.train(4)
        assert line.module is module  # neither wrapped nor compiled
        ends.append(([(row["loss"], row["grad_norm"]) for row in history], line.w))
    assert ends[0] == ends[1]


# ---------------------------------------------------------------- float16


def test_small_gradients_survive_float16():
    """A gradient of 2e-8 is 0 in float16 unless the loss is scaled."""
    line, unscaled = HalfLine([2e-8]), HalfLine([2e-8])
    history, _ = line.train(3)
    assert [row["grad_norm"] for row in history] == pytest.approx([2e-8] * 3, rel=0.01)
    assert line.w < -0.1
    unscaled.autocast = None
    history, _ = unscaled.train(3)
    assert [row["grad_norm"] for row in history] == [0] * 3


def test_an_overflow_costs_a_repeat_and_no_minibatch():
    """A gradient of 100 overflows float16 (65,504) at scale 65,536; the scale is halved until it does not."""
    line = HalfLine([100.0])
    history, _ = line.train(3, max_grad_norm=None)
    assert [row["grad_norm"] for row in history] == [100] * 3
    assert line.w == pytest.approx(-0.3, abs=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_methods_train_on_a_float16_base(new_policy, data, name):
    policy = halved(new_policy())
    base = tiny.fingerprint(policy.denoiser)
    history = tiny.run(method(name, policy), data)
    assert all(math.isfinite(row["loss"]) and 0 < row["grad_norm"] < math.inf for row in history)
    assert tiny.fingerprint(policy.denoiser) == base
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}


# ---------------------------------------------------------------- losses and gradients that are not finite


class Root(Line):
    """The loss is sqrt(x w): at w = 0 it is 0 and its slope is infinite."""

    def loss(self, rows):
        loss = self.module(torch.tensor(rows)).sum().sqrt()
        return loss, {"loss": loss}


@pytest.mark.parametrize("autocast", [None, torch.float16], ids=["unscaled", "at any scale"])
def test_an_infinite_gradient_of_a_finite_loss_stops(autocast):
    root = Root([1.0])
    root.autocast = autocast
    with pytest.raises(NonFiniteError, match="grad_norm is inf at step 1"):
        root.train(1, max_grad_norm=None)


def broken(policy, data, trained, tmp_path, damage):
    """Does `damage` before batch 2; returns the error and the checkpoint before and after."""
    before = []
    checkpoint = Checkpoint(tmp_path, "align@x", "key", every_seconds=0)

    def act():
        before.append(checkpoint.file.read_bytes())
        damage(policy.denoiser)

    at_batch(trained, 2, act)
    with pytest.raises(NonFiniteError) as error:
        tiny.run(trained, data, checkpoint=checkpoint)
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
