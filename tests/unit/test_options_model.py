"""Options of the base model and of sampling, previews of a training, and what stages note of themselves."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import stages
from attune.backbones import sd, sdxl
from attune.config.plan import PlanError, RunPlan, read, run_of_stage
from attune.config.settings import Model, Sampling
from attune.diffusion.generate import generate_images
from attune.diffusion.noise import noise_seed, per_row_noise
from attune.evaluation.report.grid import image_grid
from attune.stages.common import checkpoint_of
from attune.tracking.samples import sampler

CPU = torch.device("cpu")


def sampling(**changes):
    return Sampling(**({"steps": 2, "eta": 0.0, "guidance_scale": 1.0, "batch_size": 2} | changes))


# ---------------------------------------------------------------- model


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_variant_is_other_files_of_the_same_folder(tiny_folder, tiny_xl_folder, tmp_path, kind):
    """The files fp16 hold every weight doubled; the plain ones stay as they are."""
    from safetensors.torch import load_file, save_file

    module, folder = {"sd": (sd, tiny_folder), "sdxl": (sdxl, tiny_xl_folder)}[kind]
    shutil.copytree(folder, tmp_path / "x")
    for file in (tmp_path / "x").rglob("*.safetensors"):
        doubled = {name: 2 * value if value.is_floating_point() else value for name, value in load_file(file).items()}
        save_file(doubled, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
    plain = module.load(Model(backbone=kind, path=str(tmp_path / "x")), CPU)
    other = module.load(Model(backbone=kind, path=str(tmp_path / "x"), variant="fp16"), CPU)
    for part in ("denoiser", "vae"):
        ours, theirs = getattr(plain, part).state_dict(), getattr(other, part).state_dict()
        assert all(torch.equal(2 * value, theirs[name]) for name, value in ours.items())
    encoder, doubled = (b.text_encoder if kind == "sd" else b.encoders[1][1] for b in (plain, other))
    weight = "text_model.final_layer_norm.weight"
    states = encoder.state_dict(), doubled.state_dict()
    name = next(name for name in states[0] if name.endswith(weight.rpartition("text_model.")[2]))
    assert torch.equal(2 * states[0][name], states[1][name])


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_of_the_frozen_networks_and_the_autoencoder_has_its_own(tiny_folder, tiny_xl_folder, kind, dtype):
    module, folder = {"sd": (sd, tiny_folder), "sdxl": (sdxl, tiny_xl_folder)}[kind]
    backbone = module.load(Model(backbone=kind, path=folder, dtype=dtype, vae_dtype="bfloat16"), CPU)
    encoders = [backbone.text_encoder] if kind == "sd" else [encoder for _, encoder in backbone.encoders]
    for network in (backbone.denoiser, *encoders):
        assert {weight.dtype for weight in network.parameters()} == {getattr(torch, dtype)}
    assert {weight.dtype for weight in backbone.vae.parameters()} == {torch.bfloat16}
    assert backbone.decode_latents(torch.zeros(1, 4, 8, 8)).dtype == torch.float32
    assert backbone.encode_images(torch.zeros(1, 3, 16, 16)).dtype == torch.float32


@pytest.mark.parametrize(("resolution", "side"), [(None, 8), (16, 8), (32, 16)])
def test_resolution_is_that_of_the_images(tiny_folder, resolution, side):
    backbone = sd.load(Model(backbone="sd", path=tiny_folder, resolution=resolution), CPU)
    assert backbone.latent_shape == (4, side, side)
    assert backbone.resolution == 2 * side
    assert backbone.decode_latents(torch.zeros(1, *backbone.latent_shape)).shape[-2:] == (2 * side, 2 * side)


# ---------------------------------------------------------------- sampling


def test_pixels_are_rounded_and_cut_to_8_bits(policy):
    """0.998 of 255 is 254.49 and 0.9985 of it 254.62; what the decoder overshoots is cut."""
    levels = torch.tensor([0.998, 0.9985, 1.2, -0.2]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    policy.backbone.decode_latents = lambda latents: levels
    images = generate_images(policy, ["a"] * 4, [0, 1, 2, 3], sampling(batch_size=4), 0, None)
    assert images.dtype == np.uint8
    assert images.reshape(4, -1)[:, 0].tolist() == [254, 255, 255, 0]


def test_channels_come_last_and_rows_stay_rows(policy):
    """A picture that is red above and blue below."""
    picture = torch.zeros(1, 3, 2, 2)
    picture[0, 0, 0], picture[0, 2, 1] = 1.0, 1.0
    policy.backbone.decode_latents = lambda latents: picture
    (image,) = generate_images(policy, ["a"], [0], sampling(), 0, None)
    assert image.tolist() == [[[255, 0, 0]] * 2, [[0, 0, 255]] * 2]


def test_the_noise_is_of_prompt_ordinal_and_seed():
    seeds = {noise_seed(*what) for what in (("a", 0, 0), ("a", 1, 0), ("a", 0, 1), ("b", 0, 0), ("a", 1, 1))}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    draw = per_row_noise([3, 4])
    first, second = draw((2, 4, 8, 8)), draw((2, 4, 8, 8))
    alone = per_row_noise([4])
    assert torch.equal(first[1], alone((1, 4, 8, 8))[0])
    assert torch.equal(second[1], alone((1, 4, 8, 8))[0])
    assert not torch.equal(first, second)


# ---------------------------------------------------------------- previews of a training


class Kept:
    """A tracked run that keeps what it is shown."""

    def __init__(self):
        self.shown = []

    def image(self, key, image, step):
        self.shown.append((key, image, step))


def test_previews_show_the_reference_beside_the_policy_as_it_is_now(new_policy):
    policy, run = new_policy(moved=0.2), Kept()
    prompts = ["a cat", "two owls", "a dog"]
    show = sampler(policy, prompts, sampling(guidance_scale=2.0), 5, run)
    show(3)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.2
    show(7)
    assert [(key, step) for key, _, step in run.shown] == [("images/samples", 3), ("images/samples", 7)]

    def images():
        return generate_images(policy, prompts, [0, 0, 0], sampling(guidance_scale=2.0), 5, None)

    now = images()
    with policy.reference():
        before = images()
    assert not np.array_equal(now, before)
    expected = image_grid({"reference": before, "policy": now}, prompts)
    assert run.shown[1][1].tobytes() == expected.tobytes()
    assert run.shown[0][1].tobytes() != expected.tobytes()


# ---------------------------------------------------------------- stages


def test_a_stage_without_its_plan_says_how_to_make_it(tmp_path):
    with stages.inside(tmp_path):
        for name in ("prepare", "train_preference", "report"):
            with pytest.raises(SystemExit, match="is not there: `make plan` writes it"):
                stages.call(name)
        with pytest.raises(SystemExit, match="which run"):
            stages.call("generate")
        os.environ["DVC_STAGE"] = "generate@spo"
        with pytest.raises(SystemExit, match=r"plan/generate-spo\.json is not there"):
            stages.call("generate")


def test_the_interval_of_checkpoints_is_the_profiles(tmp_path):
    with stages.inside(stages.write(tmp_path, {"base": {"after": "data"}}, checkpoint_seconds=7)):
        stages.write_plans()
        with checkpoint_of("align@base", read(RunPlan, "align", "base"), []) as checkpoint:
            assert checkpoint.every_seconds == 7


def test_a_plan_of_other_code_is_refused(tmp_path):
    with stages.inside(stages.write(tmp_path, {"base": {"after": "data"}})):
        stages.write_plans()
        file = Path("plan/align-base.json")
        values = json.loads(file.read_text())
        file.write_text(json.dumps({**values, "unheard_of": 1}))
        with pytest.raises(PlanError, match=r"align-base\.json was made by other code \(\('unheard_of',\)\)"):
            read(RunPlan, "align", "base")


def test_the_run_is_said_by_an_option_or_else_by_dvc(monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "align@spo")
    monkeypatch.setattr("sys.argv", ["align"])
    assert run_of_stage() == "spo"
    monkeypatch.setattr("sys.argv", ["align", "--run", "dpo"])
    assert run_of_stage() == "dpo"


def test_stages_note_how_long_they_took_and_keep_what_others_noted(tmp_path):
    with stages.inside(stages.write(tmp_path, {"base": {"after": "data"}})):
        stages.write_plans()
        Path(".checkpoints/seconds.json").write_text(json.dumps({"prepare": 7.5, "align@base": 99.0}))
        stages.call("align", run="base")
        noted = json.loads(Path(".checkpoints/seconds.json").read_text())
        assert noted["prepare"] == 7.5
        assert 0 <= noted["align@base"] < 60
