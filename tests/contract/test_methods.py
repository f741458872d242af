"""What every file of attune/methods owes the rest: parametrised over whatever files there are."""

import gc
import inspect
import math
from pathlib import Path

import pytest
import torch

import params
import tiny
from attune.build import build_method
from attune.config import plugins
from attune.config.plan import Plugin
from attune.config.plugins import plugin_config
from attune.config.resolve import method_of
from attune.diffusion.noise import Draws
from attune.distributed import Shard
from attune.spm.model import from_clip, save
from attune.training.checkpoint import Checkpoint
from attune.training.step import TrainStep
from forked import together

ROOT = Path(__file__).parents[2]
PROFILES = {path.stem: params.shipped(path.stem)[1] for path in (ROOT / "params").glob("*.yaml")}
METHODS = plugins.available("methods")

pytestmark = pytest.mark.parametrize("name", METHODS)


def blocks(profile: str, method: str) -> dict[str, dict]:
    """The settings of every run of a method, by the run's name."""
    return {name: block for name, block in PROFILES[profile]["methods"].items() if method_of(name, {}) == method}


@pytest.fixture(scope="session")
def preference(tiny_clip, tmp_path_factory) -> Path:
    """An untaught step-aware preference model, as train_preference leaves one."""
    folder = tmp_path_factory.mktemp("preference")
    save(*from_clip(tiny_clip), folder)
    return folder


@pytest.fixture
def build(preference, monkeypatch):
    """Builds a method as the align stage does, from its block of the short profile, for three batches."""
    monkeypatch.chdir(ROOT)  # where the paths of params.yaml start

    def build(name, policy):
        block = {"lora": {"rank": 2}, **next(iter(blocks("short", name).values()), {}), "batches": 3, "batch_size": 2}
        method = Plugin(kind="methods", name=name, settings=block)
        return build_method(method, policy, preference, params.scorers(PROFILES["short"]))

    return build


def test_its_defaults_are_complete_and_described(name):
    """A profile need only write what differs; the descriptions make up the reference of settings."""
    config = plugins.load("methods", name).Config
    assert config().batch_size * config().accumulation > 1
    own = [field for field in config.model_fields if field in config.__annotations__]
    assert [field for field in own if not config.model_fields[field].description] == []


def test_it_names_the_scorers_it_trains_on(name):
    config = plugins.load("methods", name).Config
    rewards, scorer = (config.model_fields.get(name) for name in ("rewards", "scorer"))
    assert config().trained_on == tuple(rewards.default if rewards else [scorer.default] if scorer else ())


@pytest.mark.parametrize("profile", PROFILES)
def test_every_block_is_read_and_written_alike(name, profile):
    for run, block in blocks(profile, name).items():
        where = f"params/{profile}.yaml:methods.{run}"
        config = plugin_config("methods", name, block, where)
        again = plugins.load("methods", name).Config.model_validate(config.model_dump())
        assert again.model_dump() == config.model_dump()
        with pytest.raises(ValueError, match=rf"{where}\.no_such_key"):
            plugin_config("methods", name, {**block, "no_such_key": 1}, where)


def test_it_says_what_it_consumes_and_needs(name):
    method = plugins.load("methods", name).Method
    assert method.consumes in ("pairs", "images", "liked images", "prompts", "groups")
    assert set(method.needs) <= {"preference_model", "rewards"}
    assert list(inspect.signature(method).parameters) == ["config", "policy", *method.needs]


def test_three_steps_change_the_adapter_and_nothing_else(name, new_policy, data, build):
    ends = []
    for _ in range(2):
        policy = new_policy()
        method = build(name, policy)
        before, base = tiny.weights(policy), tiny.fingerprint(policy.denoiser)
        history = tiny.run(method, data)
        assert len(history) >= 3
        assert all(math.isfinite(row["loss"]) and 0 < row["grad_norm"] < math.inf for row in history)
        assert tiny.fingerprint(policy.denoiser) == base
        after = tiny.weights(policy)
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert moved == {key for key in before if "lora_" in key}
        ends.append((after, history))
    (weights, history), (again, same) = ends
    assert same == history
    assert all(torch.equal(value, again[key]) for key, value in weights.items())


def test_a_resumed_run_is_the_run_that_was_interrupted(name, new_policy, data, build, tmp_path):
    """The process dies after two of three batches; another, with other weights, goes on from the checkpoint."""
    policy = new_policy()
    history = tiny.run(build(name, policy), data)
    method = build(name, new_policy())
    batches = tiny.batches(data, method)

    def dies(b, shard):
        if b == 2:
            raise InterruptedError
        return batches(b, shard)

    with pytest.raises(InterruptedError):
        tiny.run(method, data, batches=dies, checkpoint=Checkpoint(tmp_path, "align", "key", every_seconds=0))
    gc.collect()  # the dead process's lock
    again = new_policy(seed=99)
    checkpoint = Checkpoint(tmp_path, "align", "key", every_seconds=0)
    tiny.assert_same(tiny.run(build(name, again), data, checkpoint=checkpoint), history)
    tiny.assert_same(list(again.parameters()), list(policy.parameters()))


def losses(method, data):
    """Loss and metrics of every minibatch of the first batch."""
    batch = tiny.batches(data, method)(0, method.policy.shard).rows
    return [method.loss(minibatch) for minibatch in tiny.minibatches(method, batch)]


def test_processes_can_share_its_minibatches(name, new_policy, data, build, tmp_path):
    """Loss, metrics and gradient of three rows of data are what they are, whichever of two processes has which."""
    policy = new_policy(moved=0.1)
    method = build(name, policy)

    def step(shard):
        policy.shard = shard
        batch = data.rows_for(method.consumes)[1]([0, 3, 5][shard.rows(3)])
        made = list(method.minibatches(batch, Draws.of_batch(0, 0, 3, shard)))
        return [part.n for part in made], TrainStep(policy, method.config)(method, made, 1, 1e-3)

    found = together(2, tmp_path, step)
    sizes, alone = step(Shard())
    assert max(sizes) >= 3
    for others, row in found:
        assert others == sizes
        assert row == pytest.approx(alone, rel=1e-3, abs=1e-4)


def test_its_loss_starts_where_it_says(name, policy, data, build):
    """A loss that compares policy and reference is a known number while they are one; another method names none."""
    expected = getattr(plugins.load("methods", name), "LOSS_AT_REFERENCE", None)
    found = [loss.item() for loss, _ in losses(build(name, policy), data)]
    assert found
    if expected is not None:
        assert found == pytest.approx([expected] * len(found), abs=1e-7)
    else:
        assert found != pytest.approx([math.log(2)] * len(found), abs=1e-7)


def test_its_page_explains_what_it_logs(name, policy, data, build):
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
    _, metrics = losses(build(name, policy), data)[0]
    assert [metric for metric in metrics if f"`{metric}`" not in page] == []


def test_the_random_numbers_are_all_from_the_generator(name, new_policy, data, build):
    """Otherwise a resumed run would not be the run that was interrupted."""
    method, seen = build(name, new_policy(moved=0.1)), []
    for state in (1, 2):
        torch.manual_seed(state)
        seen.append([loss.item() for loss, _ in losses(method, data)])
    assert seen[0] == seen[1]
