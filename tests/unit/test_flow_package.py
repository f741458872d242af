"""Sharing a model of a flow base: the commands from data to a package, its files in diffusers and ComfyUI, its card."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

import stages
import tiny
import tiny_flow_models
from attune.backbones import sd3
from attune.config.resolve import load as load_settings
from attune.config.settings import Model, Sampling
from attune.diffusion.lora import add_lora, lora_ranks
from attune.diffusion.lora_files import ADAPTER_FILE
from attune.diffusion.policy import Policy
from attune.sharing.card import Evidence, card
from attune.sharing.models import UnknownModelError, find_model
from attune.sharing.package import PackageError, Trained, check_layouts, write_package
from attune.weights import read_header

RUNS = {name: {"method": method, "after": "data"} for name, method in (("dpo", "dpo"), ("whole", "sft"))}
SHORT = {"batches": 2, "batch_size": 4, "lr": 1e-3}
PROMPTS = ["a cat", "two owls"]
SAMPLING = {"steps": 3, "eta": 0.0, "guidance_scale": 3.0, "batch_size": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_flow_models.write_sd3_pipeline(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """A project on the flow model: an adapter and a whole transformer, trained and packaged."""
    blocks = {"methods__dpo": {**SHORT, "lora": {"rank": 2}}, "methods__whole": {**SHORT, "lora": None}}
    runs = {"base": {"after": "data"}, **RUNS}
    model = {"backbone": "sd3", "path": base, "density": "uniform"}
    folder = stages.write(tmp_path_factory.mktemp("flow"), runs, model=model, preference=..., **blocks)
    with stages.inside(folder):
        stages.write_plans()
        stages.call("prepare")
        for run in RUNS:
            stages.call("align", run=run)
            stages.call("package", "--run", run)
    return folder


def test_the_commands_make_a_package(made):
    files = {str(file.relative_to(made / "packages/short")) for file in (made / "packages/short").rglob("*.*")}
    shared = {"README.md", "run.json", "samples.png"}
    assert files == {f"{run}/{name}" for run in RUNS for name in shared} | {
        f"dpo/diffusers/{ADAPTER_FILE}",
        "dpo/dpo.safetensors",
        "whole/transformer/config.json",
        "whole/transformer/diffusion_pytorch_model.safetensors",
    }


def test_the_times_that_were_drawn_are_recorded_and_on_the_card(made):
    for folder in (made / "models/short/dpo", made / "packages/short/dpo"):
        known = json.loads((folder / "run.json").read_text())
        assert known["times"] == {
            "density": "uniform",
            "shift": 3.0,
            "sampled_at": "FlowMatchEulerDiscreteScheduler",
        }
        assert "**times of training**: uniform, shift 3.0" in (folder / "README.md").read_text()


@pytest.mark.parametrize("run", RUNS)
def test_the_code_on_the_card_loads_the_model(made, base, run):
    """The block is run as it stands, in the package's folder, and what it loads is the model that was trained."""
    folder = made / "packages/short" / run
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "DDIM" not in code
    with stages.inside(folder):
        found = {}
        exec(code, found)
    assert isinstance(found["image"], Image.Image)
    transformer = found["pipeline"].transformer
    assert found["pipeline"].text_encoder_3 is None
    if run == "whole":
        expected = SD3Transformer2DModel.from_pretrained(made / "models/short/whole/transformer")
        assert all(torch.equal(w, v) for w, v in zip(transformer.parameters(), expected.parameters(), strict=True))
    else:
        loaded = {f"transformer.{n.replace('.default_0', '')}": w for n, w in transformer.named_parameters()}
        expected = load_file(made / "models/short/dpo" / ADAPTER_FILE)
        assert len(expected) == 2 * 19
        assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_what_would_be_uploaded_is_the_package(made, capsys):
    with stages.inside(made):
        stages.call("push", "--run", "whole", "--repo", "owner/name", "--dry-run")
    listed = {line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if "bytes" in line}
    assert {"README.md", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"} <= listed


@pytest.mark.parametrize(("key", "is_same"), [("density", False), ("offload", True)])
def test_a_model_of_before_there_was_a_setting_is_still_its_own(made, tmp_path, key, is_same):
    """Without the key in run.json it means the default, and the default of a density is not uniform."""
    folder = tmp_path / "project"
    shutil.copytree(made, folder, symlinks=True)
    file = folder / "models/short/dpo/run.json"
    known = json.loads(file.read_text())
    del known["base"][key]
    file.write_text(json.dumps(known))
    with stages.inside(folder):
        settings = load_settings()
        if is_same:
            assert find_model("dpo", settings).source == "models/short/dpo"
        else:
            with pytest.raises(UnknownModelError, match="trained on another base model"):
                find_model("dpo", settings)


def test_samples_of_a_flow_model_stand_beside_those_of_its_base(made, tmp_path):
    with stages.inside(made):
        words = ("--run", "dpo", "--against", "base", "--prompt", "a cat", "--n", "1", "--out", str(tmp_path / "s.png"))
        stages.call("sample", *words)
    assert Image.open(tmp_path / "s.png").width > 2 * 16


# ---------------------------------------------------------------- the files


def trained(policy, folder, base, lora=True):
    policy.save(folder)
    settings = {"lora": {"rank": 2, "targets": "attention"} if lora else None}
    known = {"run": "dpo", "profile": "short", "method": "dpo", "settings": settings, "trained_on": [], "seed": 0}
    described = Model(backbone="sd3", path=base).model_dump(mode="json")
    return Trained(folder, known | {"base": described, "from": None, "starts_from": None}, {"source": "world"})


def fresh(base):
    backbone = sd3.load(Model(backbone="sd3", path=base), torch.device("cpu"))
    return Policy(backbone, backbone.encode_prompts([""]))


def on_cpu(settings):
    return sd3.load(settings, torch.device("cpu"))


def packaged(model, folder, base, load=on_cpu):
    evidence = Evidence(None, "Not scored.", None, SAMPLING)
    folder.mkdir()
    return write_package(folder, model, evidence, PROMPTS, Sampling(**SAMPLING), load)


def test_both_files_of_every_layer_and_of_different_ranks_are_the_model(base, tmp_path):
    """Attention of images and text, both of a double block, feed-forward layers and modulation; ranks 1 to 4."""
    policy = fresh(base)
    policy.add_adapter(2, 0, "all")
    names = sorted(lora_ranks(policy.denoiser))
    policy = fresh(base)
    add_lora(policy.denoiser, {name: 1 + i % 4 for i, name in enumerate(names)})
    tiny.move(policy, 0.1)
    checks = packaged(trained(policy, tmp_path / "model", base), tmp_path / "package", base)
    assert [check.layout for check in checks] == [f"diffusers/{ADAPTER_FILE}", "dpo.safetensors"]
    assert all(check.difference < 1e-4 < 0.01 < check.effect for check in checks)
    again = fresh(base)
    again.load(tmp_path / "package/dpo.safetensors")
    assert lora_ranks(again.denoiser) == lora_ranks(policy.denoiser)


def test_comfyuis_sum_of_the_file_is_the_merged_model(base, tmp_path):
    """Its rule, applied to the released file: W + B A for each `transformer.<module>`, and nothing is left over."""
    policy = fresh(base)
    policy.add_adapter(2, 0)
    tiny.move(policy, 0.1)
    packaged(trained(policy, tmp_path / "model", base), tmp_path / "package", base)
    file = tmp_path / "package/dpo.safetensors"
    tensors, weights = load_file(file), dict(fresh(base).denoiser.named_parameters())
    for name in lora_ranks(policy.denoiser):
        down, up = (tensors.pop(f"transformer.{name}.lora_{side}.weight") for side in "AB")
        weights[f"{name}.weight"].data += up @ down
    assert not tensors
    plain = fresh(base)
    plain.denoiser.load_state_dict({name: weight.detach() for name, weight in weights.items()}, strict=False)
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([900.0, 30.0])
    cond = policy.backbone.encode_prompts(PROMPTS)
    with torch.no_grad():
        torch.testing.assert_close(plain.predict(x, t, cond), policy.predict(x, t, cond), rtol=0, atol=1e-5)
    told = read_header(file)
    assert told["modelspec.architecture"] == "stable-diffusion-3/lora"
    assert (told["lora_rank"], told["lora_alpha"], told["method"]) == ("2", "2", "dpo")


@pytest.mark.parametrize("change", ["value", "module"])
def test_a_file_that_diffusers_reads_as_another_model_is_an_error(base, tmp_path, change):
    policy = fresh(base)
    policy.add_adapter(2, 0)
    tiny.move(policy, 0.1)
    model = trained(policy, tmp_path / "model", base)
    packaged(model, tmp_path / "package", base)
    file = tmp_path / "package/dpo.safetensors"
    tensors = load_file(file)
    if change == "value":
        tensors = {name: 1.5 * value for name, value in tensors.items()}
    else:
        tensors = {name: value for name, value in tensors.items() if "attn2.to_q" not in name}
    save_file(tensors, file)
    says = "diffusers makes other images" if change == "value" else "diffusers read 18 modules of 19"
    backbone = fresh(base).backbone
    with pytest.raises(PackageError, match=rf"dpo\.safetensors: .*{says}"):
        check_layouts(tmp_path / "package", model, backbone, sd3.in_diffusers(backbone.model), PROMPTS, 3.0)


def test_the_tokens_in_the_place_of_the_t5_are_those_of_the_setting(base, tmp_path):
    """The pipeline is told of them; with its own default of 256 the images would be others."""
    model = Model(backbone="sd3", path=base, max_sequence_length=16)
    backbone = sd3.load(model, torch.device("cpu"))
    policy = Policy(backbone, backbone.encode_prompts([""]))
    policy.add_adapter(2, 0)
    tiny.move(policy, 0.1)
    made = trained(policy, tmp_path / "model", base)
    made.made["base"] = model.model_dump(mode="json")
    checks = packaged(made, tmp_path / "package", base)
    assert all(check.difference < 1e-4 for check in checks)
    assert "max_sequence_length=16)" in (tmp_path / "package/README.md").read_text()


def test_networks_that_take_turns_are_in_one_place_for_the_check(base, tmp_path):
    """diffusers' pipeline would find its text encoder on the CPU, and the prompt's tokens on the GPU."""
    policy = fresh(base)
    policy.add_adapter(2, 0)
    tiny.move(policy, 0.1)
    made, asked = trained(policy, tmp_path / "model", base), []
    made.made["base"]["offload"] = True
    packaged(made, tmp_path / "package", base, load=lambda model: asked.append(model.offload) or on_cpu(model))
    assert asked == [True, False]


def test_a_backbone_that_says_nothing_of_itself_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.delattr(sd3, "in_diffusers")
    model = SimpleNamespace(made={"base": {"backbone": "sd3", "path": "nowhere"}}, folder="models/spo")
    with pytest.raises(ValueError, match="no package of sd3 yet; share models/spo"):
        write_package(tmp_path, model, None, [], None, load_backbone=None)


# ---------------------------------------------------------------- the card


def test_the_front_of_a_card_of_a_flow_model():
    place = "stabilityai/stable-diffusion-3.5-medium"
    known = trained(SimpleNamespace(save=lambda folder: None), None, f"{place}@{'b' * 40}").made
    text = card({**known, "base": {**known["base"], "resolution": 512}}, {"source": "world"})
    front = YAML(typ="safe").load(text.split("---\n")[1])
    assert (front["license"], front["license_name"]) == ("other", "stabilityai-ai-community")
    assert front["license_link"].startswith("https://huggingface.co/")
    assert front["base_model"] == place
    assert {"stable-diffusion-3", "lora"} <= set(front["tags"])
    assert "height=512, width=512)" in text
    assert "A1111" not in text
    assert "load_lora_weights(folder" in text
    assert StableDiffusion3Pipeline.__name__ in text
