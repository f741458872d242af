"""A whole DDIM run with an adapter: case 13 (AlignProp's forward chain)."""

import pytest
from golden.pipelines import adapted, conditioning
from golden.reading import tensors

from attune.diffusion.ddim import sample

pytestmark = pytest.mark.parity


def test_ten_steps(table, sd, tmp_path):
    case = tensors("13_alignprop_chain")
    policy = adapted(sd, conditioning(case, "negative_"), "13_alignprop_lora", tmp_path)
    noise = [case["latents"], *case["noise"]]

    def draw(shape):
        drawn = noise.pop(0)
        assert drawn.shape == shape
        return drawn

    latents = sample(policy, conditioning(case), draw, steps=10, eta=1.0, guidance_scale=5.0)
    assert not noise
    decoded = sd.decode_latents(latents)
    table.close("13", "latents after 10 steps", latents, case["final_latents"])
    table.close("13", "decoded", decoded, case["decoded"] / 2 + 0.5)
    table.close("13", "image", decoded.clamp(0, 1), case["image"])
