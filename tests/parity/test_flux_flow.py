"""FLUX.1-dev: case 24e, diffusers' pipeline on latents that are packed only while the transformer is called."""

import pytest
import torch
from golden.reading import tensors

from attune.backbones.flux import image_positions, packed, text_positions, unpacked
from attune.diffusion.ddim import ddim, sample
from attune.diffusion.policy import Policy
from attune.interfaces import Conditioning

pytestmark = pytest.mark.parity
PROMPTS = ["a red fox near the lake", "an old wooden house in the snow, painting"]
CASE = "24e_flux_pipeline"


@pytest.fixture(scope="module")
def case():
    return tensors(CASE)


@pytest.fixture(scope="module")
def policy(flux):
    return Policy(flux, flux.encode_prompts([""]))


@pytest.fixture(scope="module")
def cond(case):
    return Conditioning({"prompt_embeds": case["prompt_embeds"], "text_embeds": case["pooled_prompt_embeds"]})


def test_what_stands_beside_the_latents(table, case):
    device = torch.device("cpu")
    table.exact("24e FLUX", "positions", image_positions(4, 4, device), case["img_ids"])
    table.exact("24e FLUX", "positions", text_positions(16, device), case["txt_ids"])


def test_times_are_shifted_by_the_number_of_tokens(table, flux, case):
    """Sixteen of them: mu lies below 0.5, which is that of 256."""
    table.close("24e FLUX", "times", flux.path.sampling_times(6), 1000 * case["sigmas"], rel=2e-6)
    table.close("24e FLUX", "times", flux.path.sampling_times(6)[:-1], case["timesteps"], rel=2e-6)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_one_prediction(table, policy, case, cond, guidance):
    """Each row at its own time, which the transformer is told as s."""
    x_t, t = case["latents_init_unpacked"], 1000 * case["single.timestep_s"]
    with torch.no_grad():
        found = packed(policy.predict(x_t, t, cond, guidance))
    table.close("24e FLUX", "velocity", found, case[f"single.g{guidance:g}.output"], rel=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_every_step_to_the_image(table, policy, case, cond, guidance):
    steps, x_t = case[f"g{guidance:g}.latents_after_step_packed"], case["latents_init_unpacked"]
    times = policy.backbone.path.sampling_times(6)
    for i, expected in enumerate(steps):
        x_t = ddim(policy, x_t, times[i : i + 2], cond, None, eta=0.0, guidance_scale=guidance)
        table.close("24e FLUX", "latents after a step", packed(x_t), expected, rel=2e-5)
    assert torch.equal(unpacked(packed(x_t), 4), x_t)
    image = policy.backbone.decode_latents(x_t).clamp(0, 1)
    table.close("24e FLUX", "image", image, case[f"g{guidance:g}.image"], rel=2e-5)


def test_from_text_to_image(table, flux, policy, case):
    (clip_tokenizer, _), (t5_tokenizer, _) = flux.clip, flux.t5
    for tokenizer, kind in ((clip_tokenizer, "clip"), (t5_tokenizer, "t5")):
        ids = tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
        table.exact("24e FLUX", "tokens", ids, case[f"text.{kind}_input_ids"])
    found = flux.encode_prompts(PROMPTS)
    table.close("24e FLUX", "text", found.tensors["prompt_embeds"], case["text.prompt_embeds"], rel=2e-5)
    table.close("24e FLUX", "pooled text", found.tensors["text_embeds"], case["text.pooled"], rel=2e-5)
    latents = sample(policy, found, lambda shape: case["latents_init_unpacked"], 6, 0.0, 3.5)
    expected = case["from_text_g3.5.latents_final_packed"]
    table.close("24e FLUX", "latents from text", packed(latents), expected, rel=2e-5)
    with torch.no_grad():
        image = flux.decode_latents(latents).clamp(0, 1)
    table.close("24e FLUX", "image from text", image, case["from_text_g3.5.image"], rel=2e-5)


def test_an_image_as_latents(table, flux, case):
    latents = flux.encode_images(case["encode.pixels"] / 2 + 0.5)
    table.close("24e FLUX", "latents of an image", latents, case["encode.mode_scaled"], rel=2e-5)
