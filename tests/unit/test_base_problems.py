"""Settings that a base model cannot have are told by the plan; which times a flow model is trained at."""

import dataclasses
import json
import re
import shutil
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import params
import stages
import tiny
import tiny_flow_models
from attune.backbones import sd, sd3, sdxl
from attune.backbones._diffusers import sampler_name
from attune.config import plugins
from attune.config.resolve import load
from attune.config.schema import ConfigError
from attune.config.settings import Model
from attune.planning.base_problems import base, notes
from attune.planning.costs import facts, rows
from attune.planning.local_files import Digests
from attune.planning.make import make

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
HUB = "stabilityai/stable-diffusion-3.5-medium@" + "b" * 40


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    return tiny_flow_models.write_sd3_pipeline(tmp_path_factory.mktemp("sd3"))


@pytest.fixture
def settings(tmp_path):
    """Those of the profile `tiny`, changed."""

    def made(**changes):
        given, profile = params.shipped()
        return load(params.write(tmp_path, given, params.changed(profile, **changes)))

    with chdir(ROOT):
        yield made


def of_flow(settings, path, **changes):
    return settings(model={"backbone": "sd3", "path": path, **changes.pop("model", {})}, **changes)


# ---------------------------------------------------------------- density


def drawn(flow, density):
    path = sd3.load(Model(backbone="sd3", path=flow, density=density), CPU).path
    return path.training_times(tiny.draws(20_000), 20_000)


def test_uniform_times_are_any_of_the_schedulers_table_as_likely(flow):
    """A thousand, of which half lie below 3 * 0.5 / (1 + 2 * 0.5) = 0.75; the least is 0.0029940, once shifted."""
    table = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas * 1000
    found = drawn(flow, "uniform")
    assert torch.isin(found, table).all()
    assert len(table) == 1000
    assert table.min().item() == pytest.approx(2.9940, abs=1e-4)
    assert len(found.unique()) > 990
    assert (found < 750.0).double().mean().item() == pytest.approx(0.5, abs=0.015)  # four standard errors
    assert (found > 900.0).double().mean().item() == pytest.approx(0.25, abs=0.013)  # 3 s / (1 + 2 s) > 0.9 at s > 0.75


def test_without_a_density_times_are_logit_normal(flow):
    assert torch.equal(drawn(flow, None), drawn(flow, "logit_normal"))
    assert not torch.equal(drawn(flow, None), drawn(flow, "uniform"))
    above = (drawn(flow, None) > 900.0).double().mean().item()  # logit(0.75) = 1.0986 is passed by 13.6 %
    assert above == pytest.approx(0.136, abs=0.01)


@pytest.mark.parametrize(("module", "backbone"), [(sd, "sd"), (sdxl, "sdxl")])
@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("density", "uniform", "only flow models have one, and {} is none; remove it"),
        (
            "max_sequence_length",
            32,
            "a CLIP reads as many tokens as it has positions for, and {} has no other; remove it",
        ),
    ],
)
def test_a_model_that_is_no_flow_has_none_of_its_settings(settings, module, backbone, key, value, says):
    """Told by the plan, and by the loading of the model before it reads a file."""
    says = says.format(backbone)
    with pytest.raises(ValueError, match=rf"model\.{key}: .*{says}"):
        module.load(Model(backbone=backbone, path="nowhere", **{key: value}), CPU)
    (line,) = base(settings(model={"backbone": backbone, "path": HUB, key: value}))
    assert line.startswith(f"params/tiny.yaml:model.{key}: ")
    assert line.endswith(says)


def test_another_word_for_a_density_is_refused_with_those_there_are(settings):
    with pytest.raises(ConfigError, match=r"model\.density.*logit_normal.*uniform"):
        settings(model__density="cosine")


def test_the_plan_says_and_holds_the_times(settings, flow):
    for given, shown in ((None, "logit_normal"), ("uniform", "uniform")):
        found = of_flow(settings, flow, model={"density": given})
        table = {row.stage: row.does for row in rows(found, {}, {}, {})}
        assert table["align@dpo"].endswith(f"pairs, times {shown}")
        assert "times" not in table["align@spo"], "it trains on the times that it samples at"
    assert not any(", times" in row.does for row in rows(settings(), {}, {}, {}))


def test_another_density_is_another_training(settings, flow, tmp_path):
    plans = [
        make(of_flow(settings, flow, model={"density": density}), Digests(tmp_path / "d.json"))
        for density in ("logit_normal", "uniform")
    ]
    differ = {file.stem for file in plans[0] if plans[0][file] != plans[1][file]}
    trainings = {f"{stage}-{run}" for stage in ("align", "sweep") for run in ("base", "sft", "dpo", "spo")}
    assert differ - {"report"} == trainings | {"preference"}, "no image is encoded or generated anew"


# ---------------------------------------------------------------- sizes


def test_a_resolution_must_be_a_multiple_of_what_the_files_say(settings, flow):
    """Two pixels to a latent and two latents to a patch."""
    assert facts(of_flow(settings, flow)).multiple == 4
    assert not list(base(of_flow(settings, flow, model={"resolution": 32})))
    (line,) = base(of_flow(settings, flow, model={"resolution": 30}))
    assert line.startswith("params/tiny.yaml:model.resolution: 30 is not a multiple of 4")
    assert line.endswith("write 28 or 32")


@pytest.mark.parametrize(("backbone", "multiple"), [("sd", 8), ("sdxl", 8), ("sd3", 16)])
def test_of_a_model_that_is_not_here_it_is_the_published_one(settings, backbone, multiple):
    wrong, right = (
        list(base(settings(model={"backbone": backbone, "path": HUB, "resolution": size})))
        for size in (512 + multiple // 2, 512 + multiple)
    )
    assert not right
    assert re.search(rf"{512 + multiple // 2} is not a multiple of {multiple}.*write 512 or {512 + multiple}", wrong[0])


def test_a_patch_that_is_no_number_is_an_error_with_its_file(settings, flow, tmp_path):
    copied = Path(shutil.copytree(flow, tmp_path / "copy"))
    file = copied / "transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"patch_size": "2"}))
    with pytest.raises(ValueError, match=rf"{file}: patch_size '2' is no number"):
        facts(of_flow(settings, str(copied)))


def test_sixteen_channels_take_four_times_the_disk(settings, flow):
    """Of 4 x 8 x 8 latents in float32, 1 KB; published ones of Stable Diffusion 3 have 16 channels, and so 4 KB."""
    disk = {}
    for channels, model in ((4, {"path": flow}), (16, {"path": HUB, "resolution": 64})):
        found = settings(model={"backbone": "sd3", **model})
        assert facts(found).channels == channels
        disk[channels] = next(rows(found, {}, {}, {"pairs": 1000})).disk
    assert disk[16] == 2 * 1000 * 16 * 8 * 8 * 4
    assert disk[4] == 2 * 1000 * 4 * (16 / 8) ** 2 * 4


def test_a_clip_that_is_there_twice_is_counted_once(settings, tmp_path):
    """As LAION's folders, which hold it in the layout of open_clip too; float32, gradients and AdamW: 16 bytes."""
    folder = Path(shutil.copytree(ROOT / "models/embedded/pickscore", tmp_path / "clip"))
    found = settings(preference__clip=str(folder))

    def needed():
        return next(row.gpu for row in rows(found, {}, {}, {}) if row.stage == "train_preference")

    once = needed()
    shutil.copy(folder / "model.safetensors", folder / "open_clip_model.safetensors")
    assert needed() == once > 0


@pytest.mark.parametrize(("prompts", "read"), [({"prompts": 300}, 300), ({}, 1000)])
def test_encoded_prompts_take_disk_also_before_they_are_counted(settings, prompts, read):
    """FLUX's of 128 tokens in bfloat16 have a megabyte each, where latents of a pair of 64 px have 8 KB."""
    model = {"backbone": "flux", "path": HUB, "resolution": 64, "dtype": "bfloat16", "max_sequence_length": 128}
    data = {"source": "pickapic", "path": HUB, "pairs": 1000, "score_with": ["pickscore"]}
    disk = next(rows(settings(model=model, data=data), {}, {}, prompts)).disk
    assert disk == 2 * 1000 * 16 * 8 * 8 * 4 + read * 128 * 4096 * 2


def test_a_prompt_counts_as_activations_of_a_transformer(settings, monkeypatch):
    """Two images of 64 latents and a prompt of 36: 2 * 100 * 1,000 bytes in half precision."""
    counted = dataclasses.replace(sd3.NOMINAL, activations=1000, text=36)
    monkeypatch.setattr(sd3, "NOMINAL", counted)
    dpo = {"lora": {"rank": 2}, "batches": 1, "batch_size": 1, "gradient_checkpointing": False}
    model = {"backbone": "sd3", "path": HUB, "resolution": 64, "dtype": "bfloat16"}
    table = {row.stage: row for row in rows(settings(model=model, methods__dpo=dpo), {}, {}, {})}
    assert table["align@dpo"].activations == 200_000


def test_the_protocol_names_the_step(settings, flow):
    names = [sampler_name(Model(backbone=kind, path=flow), eta) for kind, eta in (("sd", 1), ("sd3", 0), ("sd3", 1))]
    assert names == ["DDIM", "Euler", "DDIM's step on the flow"]


DAMAGE = {  # a file of the base, what becomes of it, and what is said
    "a patch": (
        "transformer/config.json",
        lambda text: text.replace(b'"patch_size": 2', b'"patch_size": "2"'),
        "no number",
    ),
    "weights that are cut": ("transformer/diffusion_pytorch_model.safetensors", lambda text: text[:900], "is damaged"),
    "no JSON": ("vae/config.json", lambda text: b"{", "is not JSON"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_base_ends_the_plan_with_its_file_and_no_traceback(settings, flow, tmp_path, name):
    file, damage, says = DAMAGE[name]
    copied = Path(shutil.copytree(flow, tmp_path / "copy"))
    (copied / file).write_bytes(damage((copied / file).read_bytes()))
    of_flow(settings, str(copied))
    (tmp_path / "models").symlink_to(ROOT / "models")
    with stages.inside(tmp_path), pytest.raises(SystemExit) as ended:
        stages.call("plan", "--show")
    assert str(ended.value).startswith(f"plan: {copied / file}")
    assert says in str(ended.value)


DISTILLED = {"flux": "black-forest-labs/FLUX.1-schnell", "sd3": "stabilityai/stable-diffusion-3.5-large-turbo"}


@pytest.mark.parametrize(("backbone", "name"), DISTILLED.items())
def test_a_distilled_model_is_refused_by_its_name_before_it_is_downloaded(settings, backbone, name):
    path = f"{name}@{'b' * 40}"
    (line,) = base(settings(model={"backbone": backbone, "path": path}))
    assert line.startswith(f"params/tiny.yaml:model.path: {path} ")
    with pytest.raises(ValueError, match=r"model\.path: .*distilled to"):
        plugins.load("backbones", backbone).load(Model(backbone=backbone, path=path), CPU)


@pytest.mark.parametrize(("backbone", "name"), [("flux", "flux-de-schnell"), ("sd3", "sd3.5_large_De-Turbo")])
def test_a_copy_that_is_no_longer_distilled_is_not_refused_by_its_name(settings, backbone, name):
    assert not list(base(settings(model={"backbone": backbone, "path": f"owner/{name}@{'b' * 40}"})))


def test_a_scheduler_of_another_family_is_told_by_the_plan(settings, flow, tmp_path):
    assert not list(base(of_flow(settings, flow)))
    file = Path(shutil.copytree(flow, tmp_path / "copy")) / "scheduler/scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    (line,) = base(of_flow(settings, str(tmp_path / "copy")))
    assert line.startswith(f"params/tiny.yaml:model.path: {file}: a model for 'DDIMScheduler' is no flow")


def test_stable_diffusion_3_5_large_is_counted_as_it_is():
    """Its transformer in bfloat16 has 16.3 GB, Medium's 4.9."""
    found = sd3.facts(Model(backbone="sd3", path=f"stabilityai/stable-diffusion-3.5-large@{'b' * 40}", t5=True))
    assert found.denoiser * 2 == pytest.approx(16.3e9, rel=0.01)
    assert found.prompt == 256 * 4096
    assert sd3.facts(Model(backbone="sd3", path=HUB)).denoiser * 2 == pytest.approx(4.9e9, rel=0.01)


def test_a_network_that_is_there_in_two_precisions_is_counted_once(flow, tmp_path):
    """As in Stability's repositories, of which a clone has both."""
    folder = Path(shutil.copytree(flow, tmp_path / "copy"))
    for name in ("text_encoder/model", "text_encoder_2/model", "vae/diffusion_pytorch_model"):
        shutil.copy(folder / f"{name}.safetensors", folder / f"{name}.fp16.safetensors")
    whole = sd3.facts(Model(backbone="sd3", path=flow))
    assert sd3.facts(Model(backbone="sd3", path=str(folder))) == whole
    halves = sd3.facts(Model(backbone="sd3", path=str(folder), variant="fp16"))
    assert halves.text_encoders == whole.text_encoders > 0


def test_a_base_without_safetensors_has_no_names_to_compare_with(settings, flow, tmp_path):
    copied = Path(shutil.copytree(flow, tmp_path / "copy"))
    (copied / "transformer/diffusion_pytorch_model.safetensors").unlink()
    assert not list(base(of_flow(settings, str(copied), methods__dpo__lora={"rank": 2, "targets": ["to_q"]})))


# ---------------------------------------------------------------- methods


def test_targets_that_fit_no_module_are_told_with_one_that_is_there(settings, flow):
    lora = {"rank": 2, "targets": ["to_q", "conv1"]}
    (line,) = base(of_flow(settings, flow, methods__dpo__lora=lora))
    assert line.startswith("params/tiny.yaml:methods.dpo.lora.targets: no module of")
    assert "ends in 'conv1'; one is called '" in line
    assert not list(base(settings(methods__dpo__lora=lora)))  # the embedded base is a UNet and has both
    assert not list(base(of_flow(settings, flow, methods__dpo__lora={"rank": 2, "targets": ["attn.to_q"]})))


def test_a_rollout_without_candidates_is_told(settings, flow):
    """Of six steps of a flow the last adds no noise: the fifth is the last with candidates."""
    for start, problems in ((4, 0), (5, 1)):
        found = of_flow(settings, flow, methods__spo__steps=6, methods__spo__start_step=start)
        assert len([line for line in base(found) if "methods.spo.start_step: 5 of 6 steps" in line]) == problems
    assert not list(base(settings(methods__spo__steps=6, methods__spo__start_step=5)))


def test_a_weight_by_the_signal_to_noise_ratio_is_not_of_flows(settings, flow):
    assert [
        line for line in base(of_flow(settings, flow, methods__sft__min_snr=5)) if "methods.sft.min_snr: is for" in line
    ]
    assert not list(base(settings(methods__sft__min_snr=5)))


def test_noise_while_a_flow_is_sampled_is_noted(settings, flow):
    noisy = {"steps": 4, "eta": 1, "guidance_scale": 1, "batch_size": 4}
    found = of_flow(settings, flow, generate__sampling=noisy, sampling=noisy | {"eta": 0})
    assert [line.split(": ")[0] for line in notes(found)] == ["params/tiny.yaml:generate.sampling.eta"]
    assert not list(notes(settings(generate__sampling=noisy)))
