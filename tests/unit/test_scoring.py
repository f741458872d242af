"""The evaluate stage and what it says about a scorer: identity, pins, expected ranges, batches, features."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import params
from attune import build
from attune.config.plan import EvaluatePlan, Plugin
from attune.config.plugins import plugin_config
from attune.config.schema import ConfigError, Float
from attune.config.settings import Location, ScorerConfig, Sha256
from attune.evaluation import scoring
from attune.evaluation.images import read_images
from attune.evaluation.protocol import Protocol, hash_prompts, read_made_with, read_scores, scorer_identity
from attune.evaluation.report.page import to_html
from attune.evaluation.signs import measure_signs
from attune.evaluation.summarise import summarise
from attune.files import values_sha
from attune.rewards import aesthetic, clipscore, hpsv2, imagereward, pickscore
from attune.stages.evaluate import evaluate
from attune.world.grammar import all_scenes

ROOT = Path(__file__).parents[2]
COMMIT = "a4e4367c6dfa7288a00c550414478f865b875800"
HPS = {
    "version": "2.1",
    "path": "models/embedded/hpsv2/open_clip_model.safetensors",
    "tokenizer": "models/embedded/hpsv2",
}


# ---------------------------------------------------------------- identity


class Example(ScorerConfig):
    """A scorer with everything a block can have."""

    path: Location
    head: Location | None = None
    head_sha256: Sha256 | None = None
    license: str = "none"
    sharpness: Float = 1.0
    mode: str = "plain"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "weights").write_text("w")
    (tmp_path / "head.pt").write_text("h")
    return {"path": str(tmp_path / "clip"), "head": str(tmp_path / "head.pt")}


def test_identity_names_weights_and_settings(files):
    name, weights, settings = scorer_identity("example", Example(**files))
    assert name == "example"
    main, head = weights.split(" ")
    assert len(main) == 12
    assert head.startswith("head:")
    assert settings == "mode=plain sharpness=1.0"
    pinned = Example(path=f"owner/model@{COMMIT}", head=f"owner/model/head.pt@{COMMIT}")
    assert scorer_identity("example", pinned)[1] == f"{COMMIT[:12]} head:{COMMIT[:12]}/head.pt"


def test_the_embedded_scorers_are_known_by_the_names_they_were_published_under(monkeypatch):
    """A protocol's hash covers these strings: another way of writing them would set all old scores apart."""
    monkeypatch.chdir(ROOT)
    published = json.loads((ROOT / "reports/tiny/summary.json").read_text())["protocol"]["scorers"]
    blocks = params.shipped()[1]["scorers"]
    configs = {name: plugin_config("rewards", name, block, name) for name, block in blocks.items()}
    assert sorted(list(scorer_identity(name, config)) for name, config in configs.items()) == published


@pytest.mark.parametrize("change", [{"sharpness": 2}, {"mode": "other"}])
def test_every_setting_changes_the_identity(files, change):
    assert scorer_identity("x", Example(**files)) != scorer_identity("x", Example(**files, **change))


def test_place_licence_and_expected_range_do_not_change_it(files, tmp_path):
    (tmp_path / "head.pt").rename(tmp_path / "moved.pt")
    moved = files | {"head": str(tmp_path / "moved.pt"), "license": "MIT", "expected_range": [0, 1]}
    after = scorer_identity("x", Example(**moved))
    (tmp_path / "moved.pt").rename(tmp_path / "head.pt")
    assert scorer_identity("x", Example(**files)) == after


@pytest.mark.parametrize("file", ["clip/weights", "head.pt", "head.json"])
def test_other_weights_or_another_layout_change_it(files, tmp_path, file):
    before = scorer_identity("x", Example(**files))
    (tmp_path / file).write_text("other")
    assert scorer_identity("x", Example(**files)) != before


def test_weights_that_are_not_there_are_named(files):
    with pytest.raises(FileNotFoundError, match=r"no weights at .*nowhere"):
        scorer_identity("x", Example(**files | {"path": "/tmp/nowhere/at/all"}))


@pytest.mark.parametrize("change", [{"version": "2.0"}, {"antialias": False}, {"preprocess": "square"}])
def test_hpsv2_versions_and_resizes_never_share_a_table(monkeypatch, change):
    monkeypatch.chdir(ROOT)
    assert scorer_identity("hpsv2", hpsv2.Config(**HPS)) != scorer_identity("hpsv2", hpsv2.Config(**HPS | change))


def test_clipscore_says_which_clip(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = clipscore.Config(model="ViT-B/32", path=f"openai/clip-vit-base-patch32@{COMMIT}")
    assert "model=ViT-B/32" in scorer_identity("clipscore", config)[2]


# ---------------------------------------------------------------- pins


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"path": "yuvalkirstain/PickScore_v1"}, r"here\.path: .* on the Hub it needs its full commit: yuval"),
        ({"path": f"x/y@{COMMIT}", "tokenizer": "laion/clip"}, r"here\.tokenizer: .* needs its full commit"),
        ({"path": "x/y@main"}, r"here\.path: .*'main' is no full commit"),
        ({"path": f"x/y@{COMMIT[:12]}"}, r"here\.path: .* is no full commit"),
    ],
)
def test_hub_addresses_must_be_pinned(block, message):
    with pytest.raises(ConfigError, match=message):
        plugin_config("rewards", "pickscore", block, "here")


def test_files_on_the_hub_must_be_pinned():
    address = "xswu/HPSv2/HPS_v2.1_compressed.pt"
    with pytest.raises(ConfigError, match=r"here\.path: .* needs its full commit: xswu/HPSv2/HPS_v2.1_compressed.pt@"):
        plugin_config("rewards", "hpsv2", HPS | {"path": address}, "here")
    with pytest.raises(ConfigError, match=r"version is 2\.0, but HPS_v2\.1_compressed is 2\.1"):
        plugin_config("rewards", "hpsv2", HPS | {"path": f"{address}@{COMMIT}", "version": "2.0"}, "here")


# ---------------------------------------------------------------- expected ranges

TOKENIZER = {"tokenizer": f"google-bert/bert-base-uncased@{COMMIT}"}


@pytest.mark.parametrize(
    ("module", "block", "expected"),
    [
        (pickscore, {"path": f"yuvalkirstain/PickScore_v1@{COMMIT}"}, (17, 25)),
        (pickscore, {"path": f"yuvalkirstain/PickScore_v1@{COMMIT}", "expected_range": [1, 2]}, (1, 2)),
        (hpsv2, HPS | {"path": f"xswu/HPSv2/HPS_v2.1_compressed.pt@{COMMIT}"}, (0.15, 0.36)),
        (hpsv2, HPS | {"path": f"xswu/HPSv2/HPS_v2_compressed.pt@{COMMIT}", "version": "2.0"}, (0.15, 0.36)),
        (
            aesthetic,
            {
                "path": f"openai/clip-vit-large-patch14@{COMMIT}",
                "head": "/data/heads/sac+logos+ava1-l14-linearMSE.pth",
            },
            (3, 9),
        ),
        (imagereward, {"path": f"zai-org/ImageReward/ImageReward.pt@{COMMIT}"} | TOKENIZER, (-2, 2)),
        (clipscore, {"path": f"openai/clip-vit-large-patch14@{COMMIT}", "model": "ViT-L/14"}, (15, 40)),
    ],
)
def test_published_weights_bring_their_expected_range(module, block, expected):
    assert module.Config(**block).range_of_mean(module.PUBLISHED) == expected


def test_other_weights_have_none_unless_stated():
    config = pickscore.Config(path=str(ROOT / "models/embedded/pickscore"))
    assert config.range_of_mean(pickscore.PUBLISHED) is None
    assert pickscore.load(config).expected_range is None


def test_a_mean_out_of_range_stops_and_says_what_to_check():
    scoring.check_mean("pickscore", 21.0, (17.0, 25.0))
    scoring.check_mean("anything", 1e9, None)
    for mean in (0.21, float("nan")):
        with pytest.raises(
            scoring.UnexpectedMean, match=r"pickscore: mean .* outside 17 to 25.* hidden_act .*expected_range sets"
        ):
            scoring.check_mean("pickscore", mean, (17.0, 25.0))


# ---------------------------------------------------------------- the stage


@pytest.fixture
def generated(tmp_path, monkeypatch):
    """70 images, which are two batches and a bit, in data/tiny/generated/base, and plans that score them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    folder = tmp_path / "data/tiny/generated/base"
    folder.mkdir(parents=True)
    rng, prompts = np.random.default_rng(0), [scene.prompt for scene in all_scenes()[::20][:35]]
    rows = [(prompt, k, f"{i}_{k}.png") for i, prompt in enumerate(prompts) for k in range(2)]
    for _, _, file in rows:
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / file)
    pd.DataFrame(rows, columns=["prompt", "ordinal", "file"]).to_parquet(folder / "index.parquet")
    made = Protocol(hash_prompts(prompts), 35, 2, "ddim", 4, 0, 1, 32, "float32", 0, (), "v float32")
    (folder / "made_with.json").write_text('{"torch": "2.13.0"}')
    (folder / "protocol.json").write_text(json.dumps(made.to_dict() | {"scorers": []}))
    blocks = params.shipped()[1]["scorers"]

    def plan(*names: str, **changes: dict) -> EvaluatePlan:
        settings = {name: blocks[name] | changes.get(name, {}) for name in (*names, *changes)}
        scorers = {name: Plugin(kind="rewards", name=name, settings=block) for name, block in settings.items()}
        parts = {name: values_sha(block) for name, block in settings.items()}
        return EvaluatePlan(profile="tiny", run="base", scorers=scorers, parts=parts)

    return plan


def test_batches_give_the_scores_of_one_call(generated):
    frame = evaluate(generated("oracle", "pickscore", "aesthetic"))
    stored, protocol = read_scores("reports/tiny/scores/base.parquet")
    assert protocol.scorer_names == ("aesthetic", "oracle", "pickscore")
    made_with = read_made_with("reports/tiny/scores/base.parquet")
    assert made_with["generate.torch"] == "2.13.0"
    assert made_with["evaluate.torch"] == torch.__version__
    assert made_with["evaluate.device"] == "cpu"
    assert list(stored) == list(frame.columns)
    assert {"oracle.faithfulness", "oracle.appeal"} <= set(stored)
    scorer = pickscore.load(pickscore.Config(path="models/embedded/pickscore"))
    pixels = scoring.as_pixels(read_images(Path("data/tiny/generated/base"), frame.file))
    with torch.no_grad():
        whole = scorer(pixels, frame.prompt.tolist()).double().numpy()
    np.testing.assert_allclose(stored.pickscore, whole, rtol=1e-5, atol=1e-5)


def test_only_a_scorer_that_is_new_is_asked(generated, monkeypatch):
    """Images, weights and settings that were scored before are not scored again, whoever is asked beside them."""
    first = evaluate(generated("oracle", "pickscore"))
    asked, load = [], build.load_scorer
    monkeypatch.setattr(build, "load_scorer", lambda scorer: asked.append(scorer.name) or load(scorer))
    second = evaluate(generated("oracle", "pickscore", "aesthetic"))
    assert asked == ["aesthetic"]
    pd.testing.assert_frame_equal(second[first.columns], first, check_exact=True)
    black = Image.fromarray(np.zeros((32, 32, 3), np.uint8))
    black.save("data/tiny/generated/base/34_1.png")  # the last of 70 images: the third batch
    third = evaluate(generated("oracle", pickscore={"expected_range": [-50, 50]}))
    assert asked == ["aesthetic", "oracle", "pickscore"]
    assert (third.oracle[:69] == second.oracle[:69]).all()
    assert third.oracle[69] != second.oracle[69]
    kept = list(Path(".checkpoints/scores/tiny/base").iterdir())
    assert len(kept) == 6  # three batches by two scorers; what nobody asks for any more is gone


def test_images_that_are_all_alike_have_all_their_scores(generated):
    """Two equal batches, as of a model that has collapsed, are one shard and not one batch."""
    folder = Path("data/tiny/generated/base")
    frame = pd.read_parquet(folder / "index.parquet")
    made = json.loads((folder / "protocol.json").read_text()) | {"n_prompts": 1, "images_per_prompt": 70}
    made["prompt_set_sha"] = hash_prompts([frame.prompt[0]])
    (folder / "protocol.json").write_text(json.dumps(made))
    frame.assign(prompt=frame.prompt[0], ordinal=range(70), file=frame.file[0]).to_parquet(folder / "index.parquet")
    assert evaluate(generated("oracle")).oracle.nunique() == 1


def test_features_come_from_the_first_scorer_that_offers_them(generated):
    evaluate(generated("oracle", "pickscore", "aesthetic"))
    features = np.load("reports/tiny/features/base.npy")
    assert features.shape == (70, 64)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("scorer", ["oracle", "aesthetic"])
def test_variety_is_measured_where_a_scorer_offers_features(generated, scorer):
    evaluate(generated(scorer))
    frame, protocol = read_scores("reports/tiny/scores/base.parquet")
    shutil.copytree("data/tiny/generated/base", "data/tiny/generated/same")
    shutil.copy("reports/tiny/features/base.npy", "reports/tiny/features/same.npy")
    tables = {"base": frame, "same": frame}
    signs = measure_signs(tables, Path("data/tiny/generated"), Path("reports/tiny/features"))
    assert {"saturation", "high_frequency"} <= set(signs["same"])
    assert ("vendi" in signs["same"]) == (scorer == "aesthetic")
    assert all(sign.change == 0 and not sign.has_moved for sign in signs["same"].values())
    page = to_html(summarise(tables, protocol, signs=signs))
    assert ("Variety was not measured" in page) == (scorer == "oracle")


def test_an_unexpected_mean_ends_the_stage_and_writes_nothing(generated):
    with pytest.raises(SystemExit, match=r"scorer pickscore: mean .* lies outside 100 to 200"):
        evaluate(generated("oracle", pickscore={"expected_range": [100, 200]}))
    assert not Path("reports").exists()
