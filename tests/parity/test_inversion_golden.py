"""Noise by inversion that ends at t: case 22a, a formula in float64 on the tiny models."""

import copy

import pytest
import torch
from golden.pipelines import conditioning
from golden.reading import tensors

from attune.diffusion.inversion import implied_noise, inversion_times, invert
from attune.diffusion.policy import Policy

pytestmark = pytest.mark.parity
FORMS = {"one": (False, False), "heun": (True, False), "one_arrival": (False, True), "heun_arrival": (True, True)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grid", ["grid100", "uniform4"])
@pytest.mark.parametrize(("model", "t"), [("sd", 60), ("sd", 350), ("sd", 999), ("sdxl", 350)])
def test_implied_noise(table, request, model, t, grid, form):
    case, backbone = tensors(f"22a_inversion_{model}"), copy.copy(request.getfixturevalue(model))
    if model == "sdxl":
        backbone.resolution = 1024  # which it is told in the case, though its images are of 16 pixels
    policy, x_0, at_t = Policy(backbone, backbone.encode_prompts([""])), case["latents"], torch.full((2,), t)
    cond = conditioning(case)
    taus = [0, *range(1, t, 100), t] if grid == "grid100" else inversion_times(at_t, 4)[:, 0].tolist()
    times = torch.tensor(taus)[:, None].expand(-1, 2)
    x_t = invert(lambda x, t: policy.predict(x, t, cond), backbone.path, x_0, times, *FORMS[form])
    noise = implied_noise(x_t, x_0, backbone.path.level(at_t, x_0))
    expected = case[f"corrected.t{t}.{grid}.{form}.implied_noise"]
    table.close(f"22a {model}", f"implied noise, {form}", noise, expected, rel=1e-5)
