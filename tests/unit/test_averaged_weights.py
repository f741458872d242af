"""A moving average of the trained weights as the result of a training: validated, sampled and saved in their place."""

import gc
from pathlib import Path

import pytest
import torch

import params
import tiny
from attune.averages import exchange
from attune.config.plugins import plugin_config
from attune.config.resolve import load
from attune.config.schema import ConfigError
from attune.planning.costs import rows
from attune.training.checkpoint import Checkpoint
from attune.training.early_stopping import EarlyStopping
from attune.training.loop import Callbacks
from forked import together
from trainables import Interrupted, Line, equal, flat, interrupted, method, numbers, run_until

ROOT = Path(__file__).parents[2]
SLOPES = ([1.0], [1.0], [-3.0], [1.0])
DECAYS = (2 / 11, 3 / 12, 4 / 13, 5 / 14)  # the warm-up, which is below a decay of 0.9


def trained(decay, **loop):
    """A line and its weight after each step."""
    line, path = Line(*SLOPES), [0.0]
    line.train(4, {"callbacks": Callbacks(log=lambda metrics, step: path.append(line.w))} | loop, ema_decay=decay)
    return line, path


def averages(path):
    found = [path[0]]
    for decay, w in zip(DECAYS, path[1:], strict=True):
        found.append(decay * found[-1] + (1 - decay) * w)
    return found


def test_the_result_is_the_average_and_the_way_there_is_the_same():
    line, path = trained(0.9)
    plain, same = trained(None)
    assert path == same
    assert plain.w == path[-1]
    assert line.w == pytest.approx(averages(path)[-1], rel=1e-6)
    assert abs(line.w - plain.w) > 0.01


def test_a_decay_below_the_warm_up_is_taken_as_it_is():
    line, path = trained(0.1)
    expected = path[0]
    for w in path[1:]:
        expected = 0.1 * expected + 0.9 * w
    assert line.w == pytest.approx(expected, rel=1e-6)
    assert trained(0.0)[0].w == path[-1]


def test_scores_and_sample_images_are_of_the_average():
    line, scored, sampled = Line(*SLOPES), [], []
    path = [0.0]

    def score():
        scored.append(line.w)
        return line.w

    seen = Callbacks(log=lambda metrics, step: path.append(line.w), sample_images=lambda step: sampled.append(line.w))
    line.train(4, {"early_stopping": EarlyStopping(score, every=1), "callbacks": seen}, ema_decay=0.9)
    assert scored == pytest.approx(averages(path), rel=1e-6)
    assert sampled == scored
    assert len(set(path) & set(scored[1:])) == 0


def test_the_best_average_is_kept():
    """The scores are as they are set; the third is best, and no new best follows."""
    line, path, scores = Line(*SLOPES), [0.0], iter([0.0, 1.0, 5.0, 1.0, 1.0])
    stopping = EarlyStopping(lambda: next(scores), every=1, patience=9)
    seen = Callbacks(log=lambda metrics, step: path.append(line.w))
    line.train(4, {"early_stopping": stopping, "callbacks": seen}, ema_decay=0.9)
    assert line.w == pytest.approx(averages(path)[2], rel=1e-6)


def test_an_error_while_it_is_looked_at_leaves_the_weights_in_training_in_their_place():
    line = Line(*SLOPES)

    def fails():
        raise ZeroDivisionError

    kept = []
    seen = Callbacks(log=lambda metrics, step: kept.append(line.w))
    stopping = EarlyStopping(fails, every=2, at_start_and_end=False)
    with pytest.raises(ZeroDivisionError):
        line.train(4, {"early_stopping": stopping, "callbacks": seen}, ema_decay=0.9)
    assert line.w == kept[-1]


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_training_has_the_average_of_one_that_was_not_stopped(tmp_path, stop):
    whole, _ = trained(0.9)
    first, again = Line(*SLOPES), Line(*SLOPES)
    with pytest.raises(Interrupted):
        first.train(4, {"checkpoint": Checkpoint(tmp_path, "a", "k", 0)}, interrupted(numbers, stop), ema_decay=0.9)
    gc.collect()  # the dead process's lock
    again.module.weight.data += 1
    again.train(4, {"checkpoint": Checkpoint(tmp_path, "a", "k", 0)}, ema_decay=0.9)
    assert again.w == whole.w


def test_a_training_that_was_stopped_after_its_last_batch_leaves_the_average_once_more(tmp_path):
    expected, _ = trained(0.9, checkpoint=Checkpoint(tmp_path, "a", "k", 0))
    gc.collect()
    again, _ = trained(0.9, checkpoint=Checkpoint(tmp_path, "a", "k", 0))
    assert again.w == expected.w


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_of_a_policy_with_a_moving_reference_both_averages_are_resumed(new_policy, data, tmp_path, full):
    options = {"batches": 4, "ema_decay": 0.8, "reference": {"ema_decay": 0.5}}

    def start():
        policy = new_policy(adapter=not full)
        if full:
            policy.unfreeze()
        return policy

    whole, plain, again = start(), start(), start()
    history = tiny.run(method("dpo", whole, **options), data)
    assert tiny.run(method("dpo", plain, **(options | {"ema_decay": None})), data) == history
    assert not equal(whole.parameters(), plain.parameters())
    run_until(method("dpo", start(), **options), data, tmp_path, stop=2)
    gc.collect()
    checkpoint = Checkpoint(tmp_path, "align@x", "key", every_seconds=0)
    assert tiny.run(method("dpo", again, **options), data, checkpoint=checkpoint) == history
    assert equal(whole.parameters(), again.parameters())
    whole.save(tmp_path / "saved")
    loaded = new_policy(adapter=False)
    loaded.load(tmp_path / "saved")
    assert equal(tiny.weights(loaded).values(), tiny.weights(whole).values())


def test_two_processes_have_the_average_that_one_has(new_policy, data, tmp_path):
    def work(shard):
        policy = new_policy()
        policy.shard = shard
        tiny.run(method("sft", policy, batch_size=3, ema_decay=0.8), data)
        return flat(policy.parameters())

    first, second = together(2, tmp_path, work)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, work(new_policy().shard), rtol=1e-4, atol=1e-6)


def test_weights_change_places_and_stay_the_tensors_that_they_are():
    some, others = [torch.ones(2, requires_grad=True)], [torch.zeros(2)]
    before = some[0].data_ptr()
    exchange(some, others)
    assert (some[0].tolist(), others[0].tolist()) == ([0, 0], [1, 1])
    assert some[0].data_ptr() == before


def test_the_plan_counts_4_bytes_of_every_weight_that_has_an_average(tmp_path, monkeypatch):
    """2,567 million weights of SDXL; an adapter has rank times 1,451,520, and a moving reference a copy of it."""
    monkeypatch.chdir(ROOT)
    given, profile = params.shipped("sdxl")

    def memory(name, **changes):
        settings = load(params.write(tmp_path, given, params.changed(profile, **changes)))
        return next(row.gpu for row in rows(settings, {}, {}, {}) if row.stage == name)

    full = {"methods__dpo__lora": None, "methods__dpo__optimizer": "adamw"}
    more = memory("align@dpo", **full, methods__dpo__ema_decay=0.9) - memory("align@dpo", **full)
    assert more == pytest.approx(4 * 2.567e9, rel=1e-3)
    adapter = {"methods__dpo__lora": {"rank": 5000}}
    averages = {"methods__dpo__ema_decay": 0.9, "methods__dpo__reference": {"ema_decay": 0.9}}
    more = memory("align@dpo", **adapter, **averages) - memory("align@dpo", **adapter)
    assert more == 2 * 4 * 5000 * 1_451_520
    more = memory("train_preference", preference__ema_decay=0.9) - memory("train_preference")
    assert more == pytest.approx(4 * 1.3e9)


@pytest.mark.parametrize("wrong", [1.0, -0.1])
def test_a_wrong_decay_names_its_key(wrong):
    with pytest.raises(ConfigError, match=r"^here\.ema_decay"):
        plugin_config("methods", "sft", {"ema_decay": wrong}, "here")
