"""Samples and packages of a run that was trained here, by the commands a person types."""

import json
import stat

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import stages
from attune.build import load_backbone, load_policy
from attune.config.resolve import load
from attune.diffusion.generate import generate_images
from attune.diffusion.lora_files import ADAPTER_FILE
from attune.sharing import package as packaging
from attune.weights import read_header

RUNS = {
    "base": {"after": "data"},
    "dpo": {"method": "dpo", "after": "data"},
    "whole": {"method": "sft", "after": "data"},
    "later": {"method": "sft", "after": "data"},
}
WHOLE = {"lora": None, "lr": 1e-4, "batches": 1, "batch_size": 4}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two trained runs, their images and scores; one that was not trained."""
    folder = stages.write(tmp_path_factory.mktemp("sharing"), RUNS, methods__whole=WHOLE, methods__later=WHOLE)
    with stages.inside(folder):
        stages.write_plans()
        stages.call("prepare")
        for run in ("base", "dpo", "whole"):
            stages.call("align", run=run)
            stages.call("generate", run=run)
    return folder


def said(capsys, *words):
    """What a command that ends well prints."""
    capsys.readouterr()
    stages.call(*words)
    return capsys.readouterr().out


def refusal(*words):
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as ended:
        stages.call(*words)
    assert "\n" not in str(ended.value)
    return str(ended.value)


# ---------------------------------------------------------------- sample


def test_a_sample_shows_models_side_by_side(here, capsys, tmp_path):
    out = tmp_path / "new" / "sheet.png"
    words = ("--run", "dpo", "--against", "base", "--prompt", "a red circle", "--prompt", "x" * 3000, "--n", "2")
    text = said(capsys, "sample", *words, "--out", str(out))
    assert str(out) in text
    assert "longer than the text encoder reads" in text
    picture = np.asarray(Image.open(out).convert("RGB"))
    cells = [(row, column) for row in (60, 200) for column in (240, 380, 540, 680)]
    assert picture.shape == (2 * 20 + 34 + 2 * 138 - 10, 2 * 20 + 210 + 2 * 266 + 30, 3)
    assert all(picture[y : y + 60, x : x + 60].std() > 1 for y, x in cells)


def test_a_folder_is_laid_out_as_the_reports_images_with_the_same_noise(here, capsys, tmp_path):
    """A run's images of test prompts, generated again, are those that `generate` wrote."""
    generated = here / "data/short/generated"
    index = pd.read_parquet(generated / "dpo/index.parquet")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(dict.fromkeys(index.prompt)))
    words = ("--run", "dpo", "whole", "--against", "base", "--prompts", str(prompts), "--n", "2")
    said(capsys, "sample", *words, "--out", str(tmp_path / "out"))
    assert {folder.name for folder in (tmp_path / "out").iterdir()} == {"base", "dpo", "whole"}
    for run in ("base", "dpo", "whole"):
        found = pd.read_parquet(tmp_path / "out" / run / "index.parquet")
        assert found.equals(index)
        for file in index.file:
            again, before = (np.asarray(Image.open(folder / run / file)) for folder in (tmp_path / "out", generated))
            assert np.array_equal(again, before)


def test_an_adapter_of_zeros_generates_what_the_base_generates(here, capsys, tmp_path):
    policy = load_policy(load().model)
    policy.add_adapter(2, 0)  # a fresh LoRA is zero
    run = here / "models/short/later"
    policy.save(run)
    (run / "run.json").write_text(json.dumps({"base": load().model.model_dump(mode="json")}))
    try:
        said(
            capsys, "sample", "--run", "later", "--against", "base", "--prompt", "a blue square", "--out", str(tmp_path)
        )
    finally:
        for file in run.iterdir():
            file.unlink()
        run.rmdir()
    for number in range(4):
        later, base = (np.asarray(Image.open(tmp_path / name / f"0000{number}.png")) for name in ("later", "base"))
        assert np.array_equal(later, base)


def test_a_file_is_a_model_too_and_the_default_place_is_with_the_reports(here, capsys):
    text = said(capsys, "sample", "--run", f"models/short/dpo/{ADAPTER_FILE}", "--prompt", "a cat!", "--n", "1")
    assert text.startswith("reports/short/samples/pytorch_lora_weights-a-cat-")
    assert (here / text.split(" (")[0]).is_file()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--run", "nope", "--prompt", "x"], "no run and no file 'nope'; runs of params.yaml: base, dpo, whole, later"),
        (["--run", "later", "--prompt", "x"], "later is not trained yet: `dvc repro align@later`"),
        (["--run", "owner/name", "--prompt", "x"], "on the Hub it needs its full commit"),
        (["--run", "dpo", "--prompt", " "], "prompt 1 is empty"),
        (["--run", "dpo"], "no prompt: say --prompt"),
        (["--run", "dpo", "--prompts", "none.txt"], "none.txt"),
        (["--run", "dpo", "--prompt", "x", "--n", "600", "--against", "base"], "too many for one picture"),
        (["--run", "dpo", "--prompt", "x", "--out", "data/short"], "holds no index.parquet"),
    ],
)
def test_what_cannot_be_generated_is_said_before_a_model_loads(here, monkeypatch, words, says):
    monkeypatch.setattr("attune.build.load_backbone", lambda model: pytest.fail("a model was loaded"))
    (here / "data/short/dpo").mkdir(exist_ok=True)
    (here / "data/short/dpo/mine").touch()
    assert says in refusal("sample", *words)


# ---------------------------------------------------------------- package


def test_a_package_holds_both_layouts_the_card_and_a_picture(here, capsys):
    text = said(capsys, "package", "--run", "dpo")
    folder = here / "packages/short/dpo"
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    layouts = {f"diffusers/{ADAPTER_FILE}", "dpo.safetensors"}
    assert files == layouts | {"README.md", "run.json", "samples.png"}
    for layout in layouts:
        assert f"{layout}: largest pixel difference" in text
        told = read_header(folder / layout)
        assert (told["run"], told["method"], told["base_model"]) == ("dpo", "dpo", "models/embedded/base")
        assert json.loads(told["settings"])["lora"]["rank"] == 8
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.rglob("*") if file.is_file()} == {0o644}
    assert "Not scored yet" in (folder / "README.md").read_text()
    first = (folder / "dpo.safetensors").read_bytes()
    said(capsys, "package", "--run", "dpo")
    assert (folder / "dpo.safetensors").read_bytes() == first


def test_scores_are_in_the_card_while_they_are_of_this_very_model(mine, capsys):
    for run in ("base", "dpo"):
        stages.call("evaluate", run=run)
    plan = json.loads((mine / "plan/report.json").read_text()) | {"runs": ["base", "dpo"]}
    (mine / "plan/report.json").write_text(json.dumps(plan))
    stages.call("report")
    said(capsys, "package", "--run", "dpo")
    card = (mine / "packages/short/dpo/README.md").read_text()
    summary = json.loads((mine / "reports/short/summary.json").read_text())
    low, high = summary["methods"]["dpo"]["vs_base"]["pickscore"]["difference_ci95"]
    assert f"{low:+.3f} to {high:+.3f}" in card
    assert "Signs of reward hacking" in card
    assert "protocol" in read_header(mine / "packages/short/dpo/dpo.safetensors")
    assert "generate.model" not in (mine / "reports/short/report.md").read_text()
    adapter = mine / "models/short/dpo" / ADAPTER_FILE
    save_file({name: 2 * value for name, value in load_file(adapter).items()}, adapter, metadata={"format": "pt"})
    assert "are not known to be of this very model" in said(capsys, "package", "--run", "dpo")
    assert "95 % CI" not in (mine / "packages/short/dpo/README.md").read_text()


def test_a_model_of_all_weights_is_packaged_without_kohyas_file(here, capsys):
    text = said(capsys, "package", "--run", "whole")
    assert "kohya's layout holds LoRA alone" in text
    folder = here / "packages/short/whole"
    assert (folder / "unet/diffusion_pytorch_model.safetensors").is_file()
    assert not list(folder.glob("*.safetensors"))


def test_a_layout_that_diffusers_reads_as_another_model_is_an_error_and_nothing_is_left(here, capsys, monkeypatch):
    right = packaging.kohya.to_kohya
    wrong = lambda *given: {name: value * 1.5 for name, value in right(*given).items()}  # noqa: E731
    monkeypatch.setattr(packaging.kohya, "to_kohya", wrong)
    says = refusal("package", "--run", "dpo", "--out", "packages/wrong")
    assert "dpo.safetensors: largest pixel difference" in says
    assert "diffusers makes other images with it than the model does" in says
    assert not (here / "packages/wrong").exists()
    assert not [file for file in (here / "packages").iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--run", "base"], "runs.base: nothing is trained"),
        (["--run", "later"], "`dvc repro align@later`"),
        (["--run", "nope"], "no run 'nope'"),
        (["--run", "dpo", "--out", "models"], "is there and is no package"),
    ],
)
def test_what_cannot_be_packaged_is_said(here, words, says):
    assert says in refusal("package", *words)


# ---------------------------------------------------------------- what align leaves


def test_a_trained_model_has_a_card_and_is_the_same_twice(mine):
    folder = mine / "models/short/dpo"
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert set(first) == {ADAPTER_FILE, "run.json", "README.md"}
    assert read_header(folder / ADAPTER_FILE)["run"] == "dpo"
    stages.call("align", run="dpo")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == first
    assert not (mine / "models/short/base/README.md").exists()


def test_images_do_not_depend_on_what_was_generated_before(here):
    settings = load()
    backbone = load_backbone(settings.model)
    policy = load_policy(settings.model)
    given = (["a red circle"], [0], settings.generate.sampling, 0, None)
    from attune.sharing.models import NamedModel
    from attune.sharing.sample import generate, image_rows

    models = [NamedModel("dpo", "models/short/dpo", own=True), NamedModel("base", None)]
    generated = dict(generate(backbone, models, image_rows(["a red circle"], 1), settings.generate.sampling, 0))
    assert np.array_equal(generated["base"], generate_images(policy, *given))
    assert not np.array_equal(generated["base"], generated["dpo"])
