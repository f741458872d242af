"""What every training decides: its learner, its batches, its validation and its checkpoint."""

import gc
import math
import os
import stat
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import preparing
import tiny
from attune.build import load_learner, shards_weights
from attune.config.plan import StagePlan
from attune.config.settings import AIFeedback, Lora, MethodConfig, Model
from attune.data.labels import with_ai_feedback
from attune.diffusion.noise import keyed_generator
from attune.distributed import Shard
from attune.files import write_atomically
from attune.finetune import training_batches
from attune.spm.accuracy import TIMESTEPS, accuracy_by_t
from attune.spm.model import StepAwareCLIP, from_clip
from attune.spm.objective import Config as PreferenceConfig
from attune.spm.objective import SPMObjective
from attune.training.checkpoint import Checkpoint, resumable
from attune.training.early_stopping import EarlyStopping
from attune.training.loop import epoch_batches, epoch_rows
from trainables import Interrupted, Line, equal, interrupted, method, numbers

# ---------------------------------------------------------------- the learner


def learner(folder, **changes):
    model, seed = {key: changes.pop(key) for key in ("dtype",) if key in changes}, changes.pop("seed", 0)
    config = MethodConfig(**({"lora": Lora(rank=2), "lr": 1e-3, "batches": 1, "batch_size": 1} | changes))
    return load_learner(config, Model(backbone="sd", path=folder, **model), seed=seed)


def trained_names(policy):
    return {name for name, weight in policy.denoiser.named_parameters() if weight.requires_grad}


def test_the_learner_has_the_adapter_that_is_asked_for(tiny_folder):
    for rank, targets in ((1, "attention"), (3, ["to_q"])):
        policy = learner(tiny_folder, lora=Lora(rank=rank, targets=targets))
        factors = {name: w for name, w in policy.denoiser.named_parameters() if w.requires_grad}
        assert {w.shape[0] for name, w in factors.items() if "lora_A" in name} == {rank}
        layers = {name.split(".lora_")[0].rpartition(".")[2] for name in factors}
        assert layers == ({"to_q"} if targets == ["to_q"] else {"to_q", "to_k", "to_v", "0"})
        assert policy.reference_model is None


def test_the_seed_decides_where_an_adapter_starts(tiny_folder, new_policy):
    starts = [tiny.adapter(learner(tiny_folder, seed=seed)) for seed in (0, 1, 1)]
    assert equal(starts[1], starts[2])
    assert not equal(starts[0], starts[1])
    assert equal(starts[1], tiny.adapter(new_policy(rank=2, seed=1)))


def test_without_lora_every_weight_is_trained_in_float32_and_computed_in_the_models_type(tiny_folder):
    plain, half = learner(tiny_folder, lora=None), learner(tiny_folder, lora=None, dtype="bfloat16")
    for policy, computes in ((plain, None), (half, torch.bfloat16)):
        assert trained_names(policy) == {name for name, _ in policy.denoiser.named_parameters()}
        assert {w.dtype for w in policy.parameters()} == {torch.float32}
        assert policy.autocast is computes
        assert policy.reference_model is not None
    adapted = learner(tiny_folder, dtype="bfloat16")
    assert {w.dtype for w in adapted.parameters()} == {torch.float32}
    assert {w.dtype for w in adapted.denoiser.parameters() if not w.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("processes", "sharded", "changes", "expected"),
    [
        ("2", None, {"lora": None}, True),
        ("2", "1", {"lora": None}, True),
        ("2", "0", {"lora": None}, False),
        ("1", "1", {"lora": None}, False),
        ("2", None, {"lora": Lora(rank=2)}, False),
        ("2", None, {"lora": None, "optimizer": "adafactor"}, False),
    ],
)
def test_several_processes_that_train_every_weight_share_them(monkeypatch, processes, sharded, changes, expected):
    for name, value in {"RANK": "0", "WORLD_SIZE": processes, "ATTUNE_SHARDED": sharded}.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    assert shards_weights(MethodConfig(lr=1e-3, batches=1, batch_size=1, **changes)) is expected


def test_another_wish_is_refused_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setenv("ATTUNE_SHARDED", "yes")
    with pytest.raises(SystemExit, match="ATTUNE_SHARDED: 0 or 1 is wanted, not 'yes'"):
        learner(str(tmp_path))  # where there is no model


@pytest.mark.parametrize("wanted", [True, False])
def test_gradient_checkpointing_reaches_the_network(tiny_folder, wanted):
    assert learner(tiny_folder, gradient_checkpointing=wanted).denoiser.is_gradient_checkpointing == wanted


# ---------------------------------------------------------------- batches


def test_an_epochs_order_comes_from_another_generator_than_any_batchs():
    """The first number a batch draws would else decide which rows it is of."""
    n = 50
    for seed in (0, 1):
        orders = [torch.cat([epoch_rows(n, 10, 5 * e + i, seed) for i in range(5)]) for e in range(4)]
        by_batches = [torch.randperm(n, generator=keyed_generator(seed, b)) for b in range(60)]
        assert not [1 for order in orders for other in by_batches if torch.equal(order, other)]
        assert len({tuple(order.tolist()) for order in orders}) == 4


@pytest.mark.parametrize("seed", [0, 5])
def test_batches_are_the_rows_of_the_trainings_own_seed(new_policy, data, tmp_path, seed):
    preparing.write_split(tmp_path, data, data.pairs, "train")
    trained = method("sft", new_policy(), batch_size=5)
    n, batches = training_batches(trained, tmp_path, torch.device("cpu"), seed)
    assert n == len(data.pairs) == 24
    for b in (0, 4):
        expected = data.pair_batch(epoch_rows(24, 5, b, seed))
        assert torch.equal(batches(b, Shard()).rows.latents, expected.chosen)


class Counted:
    """Rows of a tensor or of a conditioning, which notes how many are read."""

    def __init__(self, rows, read):
        self.rows, self.read = rows, read

    def __getitem__(self, index):
        self.read.append(len(index))
        return self.rows[index]


@pytest.mark.parametrize(
    ("consumes", "latents"), [("pairs", 2), ("images", 2), ("liked images", 2), ("groups", 3), ("prompts", 0)]
)
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_a_process_reads_its_own_rows_and_no_others(data, consumes, latents, world_size):
    """Of eight rows, whose prompts and latents are counted: together the processes read what one reads alone."""
    read, seen = [], []
    counted = replace(data, cond=Counted(data.cond, read), latents=Counted(data.latents, read))
    n, draw = counted.rows_for(consumes)
    batches = epoch_batches(n, 8, 0, draw)
    for rank in range(world_size):
        shard, before = Shard(rank, world_size), sum(read)
        part = batches(1, shard)
        assert part.n == 8
        assert sum(read) - before == (1 + latents) * shard.count(8)
        seen += part.rows.prompts[: shard.count(8)]
    whole = epoch_batches(n, 8, 0, data.rows_for(consumes)[1])(1, Shard()).rows
    assert seen == list(whole.prompts[:8])


@pytest.mark.parametrize(("options", "w"), [({"lr": 0.1}, -0.3), ({"lr": 0.02}, -0.06)])
def test_adamws_first_steps_are_of_the_rate(options, w):
    """A gradient that is always 1 moves the weight by the rate in every step."""
    line = Line([1.0])
    line.train(3, **options)
    assert line.w == pytest.approx(w, abs=1e-6)


@pytest.mark.parametrize(("accumulation", "steps"), [(1, 6), (2, 3), (4, 2), (6, 1), (9, 1)])
def test_accumulation_is_how_many_minibatches_make_a_step(accumulation, steps):
    """Six minibatches; what is left over at the end makes a step as well."""
    line = Line([1.0, 2.0])
    history, _ = line.train(3, accumulation=accumulation)
    assert len(history) == steps
    assert history[0]["x"] == pytest.approx(sum([1, 2, 1, 2, 1, 2][:accumulation]) / min(accumulation, 6))


# ---------------------------------------------------------------- validation


def scored(values, batches, **options):
    given = iter(values)
    line = Line([1.0])
    history, scores = line.train(batches, {"early_stopping": EarlyStopping(lambda: next(given), **options)})
    return line.w, history, [row["batch"] for row in scores]


def test_of_two_equal_best_scores_the_first_is_kept():
    """0.1, then 0.3 after one batch and after two: the weights are those after one, -0.1."""
    w, history, _ = scored([0.1, 0.3, 0.3, 0.2], 20, every=1, patience=2)
    assert len(history) == 3
    assert w == pytest.approx(-0.1, abs=1e-6)


def test_a_tie_is_no_new_best_for_patience_either():
    assert scored([1.0, 1.0], 20, every=1, patience=1)[2] == [0, 1]
    assert scored([1.0, 1.0, 1.0], 20, every=1, patience=2)[2] == [0, 1, 2]


@pytest.mark.parametrize(("patience", "ended"), [(1, 3), (2, 4), (3, 5)])
def test_patience_counts_scores_since_the_best(patience, ended):
    """Scores 0, 1, 2, then falling: the best is the third, after two batches."""
    w, history, _ = scored([0, 1, 2, 1.5, 1.4, 1.3], 20, every=1, patience=patience)
    assert len(history) == ended
    assert w == pytest.approx(-0.2, abs=1e-6)


# ---------------------------------------------------------------- checkpoints


def folders(root):
    return {path.name for path in (root / ".checkpoints").iterdir() if path.is_dir()}


def broken_off(root, stage="align@x", profile="tiny", inputs=()):
    """The name of the folder that a training leaves which breaks off."""
    before = folders(root) if (root / ".checkpoints").exists() else set()
    with pytest.raises(Interrupted), resumable(root, stage, StagePlan(profile=profile), list(inputs)):
        raise Interrupted
    gc.collect()
    return folders(root) - before


def test_only_the_same_plan_and_the_same_content_of_inputs_find_a_checkpoint(tmp_path):
    data, root = tmp_path / "data", tmp_path / "root"
    data.mkdir()
    (data / "a.npy").write_bytes(b"one")
    first = broken_off(root, inputs=[data])
    assert len(first) == 1
    assert broken_off(root, inputs=[data]) == set()  # found again
    os.utime(data / "a.npy", (1, 1))
    assert broken_off(root, inputs=[data]) == set()  # whenever it was written
    (data / "a.npy").write_bytes(b"two")
    assert len(broken_off(root, inputs=[data])) == 1
    (data / "b.npy").write_bytes(b"new")
    assert len(broken_off(root, inputs=[data])) == 1
    assert len(broken_off(root, profile="other", inputs=[data])) == 1
    assert len(broken_off(root, stage="align@y", inputs=[data])) == 1


def test_a_training_that_succeeds_leaves_nothing(tmp_path):
    with resumable(tmp_path, "align@x", StagePlan(profile="tiny"), []) as checkpoint:
        assert checkpoint.folder.is_dir()
    assert list((tmp_path / ".checkpoints").iterdir()) == []


def test_a_process_that_does_not_write_reads_and_removes_nothing(tmp_path):
    line = Line([1.0])
    with pytest.raises(Interrupted):
        line.train(3, {"checkpoint": Checkpoint(tmp_path, "a", "k", every_seconds=0)}, interrupted(numbers, 2))
    gc.collect()
    other, drawn = Line([1.0]), []
    reader = Checkpoint(tmp_path, "a", "k", every_seconds=0, writes=False)
    before = reader.file.read_bytes()
    other.train(3, {"checkpoint": reader}, lambda b, shard: drawn.append(b) or numbers(b, shard))
    assert drawn == [2]
    assert reader.file.read_bytes() == before
    reader.discard()
    assert reader.file.exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_is_written_for_those_whom_the_umask_lets_read(tmp_path, umask, mode):
    """And nothing of the temporary file is left."""
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "report.html", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "report.html").st_mode) == mode
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


# ---------------------------------------------------------------- labels of a scorer


def judged(gap, label=1.0, **feedback):
    pairs = pd.DataFrame({"label_0": [label], "judge_0": [gap], "judge_1": [0.0]})
    return with_ai_feedback(pairs, AIFeedback(scorer="judge", **feedback)).label_0[0]


@pytest.mark.parametrize(
    ("gap", "feedback", "label"),
    [
        (1.0, {}, 1 / (1 + math.exp(-1))),
        (1.0, {"temperature": 0.5}, 1 / (1 + math.exp(-2))),
        (-1.0, {"weight": 0.25}, 0.75 + 0.25 / (1 + math.exp(1))),
        (-1.0, {"weight": 0.0}, 1.0),
        (0.01, {"threshold": 0.0}, 1.0),  # 0 is a threshold: hard labels, however small the gap
        (-0.01, {"threshold": 0.0}, 0.0),
        (0.0, {"threshold": 0.0}, 0.5),
        (1.0, {"threshold": 0.5}, 0.5),  # tanh(1 / 2) = 0.462
        (1.2, {"threshold": 0.5}, 1.0),  # tanh(0.6) = 0.537
        (1.0, {"threshold": 0.5, "temperature": 0.5}, 1.0),
        (-3.0, {"threshold": 0.5, "weight": 0.4}, 0.6),
    ],
    ids=str,
)
def test_a_label_is_moved_towards_the_scorers_opinion(gap, feedback, label):
    """People said 1; the scorer's probability is sigmoid(gap / temperature), or hard beyond the threshold."""
    assert judged(gap, **feedback) == pytest.approx(label, abs=1e-6)


# ---------------------------------------------------------------- the preference model's accuracy


@pytest.fixture
def objective(new_policy, clip_folder):
    config = PreferenceConfig(clip=clip_folder, lr=1e-4, batches=1, batch_size=5)
    return SPMObjective(config, *from_clip(clip_folder), new_policy(adapter=False))


def test_equal_scores_are_not_right(objective, data, tmp_path):
    """Both images of every pair are one: whatever people said, the model does not tell them apart."""
    preparing.write_split(tmp_path, data, data.pairs.assign(image_1=data.pairs.image_0), "validation")
    curves = accuracy_by_t(objective, tmp_path, seed=0)
    assert {name: curve["accuracy"] for name, curve in curves.items()} == {
        name: [0.0] * len(TIMESTEPS) for name in ("spm", "untimed")
    }


def test_accuracy_goes_by_the_utility_where_it_is_known(objective, data, tmp_path):
    """Where the noise-free utility says the opposite of people everywhere, shares of right answers add up to 1."""
    people, utility = data.pairs, data.pairs.assign(utility_0=1 - data.pairs.label_0, utility_1=data.pairs.label_0)
    found = []
    for i, pairs in enumerate((people, utility)):
        (tmp_path / str(i)).mkdir()
        preparing.write_split(tmp_path / str(i), data, pairs, "validation")
        found.append(accuracy_by_t(objective, tmp_path / str(i), seed=0)["spm"]["accuracy"])
    assert np.add(*found) == pytest.approx(np.ones(len(TIMESTEPS)))
    assert all(0 < share < 1 for share in found[0])


def test_the_model_that_training_started_from_does_not_know_the_time(objective, data, tmp_path):
    """At the start both are one model; once the modulation has moved, only the trained one has changed."""
    preparing.write_split(tmp_path, data, data.pairs, "validation")
    before = accuracy_by_t(objective, tmp_path, seed=0)
    assert before["spm"]["accuracy"] == before["untimed"]["accuracy"]
    assert before["spm"]["t"] == [0, 251, 501, 701, 951]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in objective.model.adaln_parameters():
            weight += torch.randn(weight.shape, generator=generator)
    after = accuracy_by_t(objective, tmp_path, seed=0)
    assert after["untimed"] == before["untimed"]
    assert after["spm"]["accuracy"] != before["spm"]["accuracy"]


def test_texts_are_encoded_once_for_all_timesteps(objective, data, tmp_path, monkeypatch):
    """Both models, 24 pairs in batches of 5; image towers are asked at every t, and scores are those of `forward`."""
    preparing.write_split(tmp_path, data, data.pairs, "validation")
    calls = {"text": 0, "image": 0}

    def counted(name, method):
        def call(self, *args):
            calls[name] += 1
            return method(self, *args)

        return call

    for name in calls:
        method = getattr(StepAwareCLIP, f"{name}_features")
        monkeypatch.setattr(StepAwareCLIP, f"{name}_features", counted(name, method))
    accuracy_by_t(objective, tmp_path, seed=0)
    assert calls == {"text": 2 * 5, "image": 2 * 5 * len(TIMESTEPS)}
    pixels, ids, t = torch.rand(2, 3, 3, 16, 16), torch.tensor([[52, 1, 53]] * 3), torch.tensor([1, 5, 900])
    model = objective.model
    assert torch.equal(model(pixels, ids, t), model.candidate_scores(pixels, model.text_features(ids), t))


def test_a_policys_parameters_are_what_moves(new_policy):
    """The learning rate reaches every trained weight and no other."""
    policy = new_policy()
    assert {id(w) for w in policy.parameters()} == {id(w) for w in policy.denoiser.parameters() if w.requires_grad}
    assert len(tiny.adapter(policy)) == len(trained_names(policy)) > 0
