"""The modulation of the step-aware preference model, part by part: what shifts, what scales and what gates."""

import pytest
import torch

from attune.spm.model import timestep_embedding

WIDTH = 16
PARTS = ("shift_a", "scale_a", "gate_a", "shift_m", "scale_m", "gate_m")


@pytest.fixture
def model(spm):
    return spm[0].eval()


@pytest.fixture
def pixel_values():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def set_bias(linear, place, value, parts):
    """Gives one part of a modulation a value whatever the timestep."""
    with torch.no_grad():
        linear.bias.unflatten(0, (parts, -1))[place] = value


def outputs(model, pixel_values, **modules):
    """Name -> (first argument, output) of modules in one forward pass."""
    found, hooks = {}, []
    for name, module in modules.items():

        def keep(module, args, kwargs, output, name=name):
            given = args[0] if args else next(iter(kwargs.values()))
            found[name] = given, output[0] if isinstance(output, tuple) else output

        hooks.append(module.register_forward_hook(keep, with_kwargs=True))
    with torch.no_grad():
        features = model.image_features(pixel_values, torch.tensor([7, 900]))
    for hook in hooks:
        hook.remove()
    return found, features


def test_the_pooled_feature_is_scaled_and_shifted_after_the_last_norm(model, pixel_values):
    vision = model.model.vision_model
    generator = torch.Generator().manual_seed(1)
    shift, scale = torch.randn(2, WIDTH, generator=generator)
    for place, value in enumerate((shift, scale)):
        set_bias(vision.adaLN_modulation[1], place, value, 2)
    found, features = outputs(model, pixel_values, norm=vision.post_layernorm)
    with torch.no_grad():
        expected = model.model.visual_projection(found["norm"][1] * (1 + scale) + shift)
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("part", PARTS)
def test_each_part_of_a_layer_acts_where_it_should(model, pixel_values, part):
    """Attention and MLP read norm(h) (1 + scale) + shift; what they add is multiplied by their gate."""
    layer = model.model.vision_model.encoder.layers[0]
    value = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))
    set_bias(layer.adaLN_modulation[1], PARTS.index(part), value, 6)
    given = dict.fromkeys(PARTS, 0.0) | {"gate_a": 1.0, "gate_m": 1.0, part: value}
    modules = {"norm_a": layer.layer_norm1, "attention": layer.self_attn, "norm_m": layer.layer_norm2}
    found, _ = outputs(model, pixel_values, **modules, mlp=layer.mlp, layer=layer)
    hidden, out = found["layer"]
    for norm, inner, a in (("norm_a", "attention", "a"), ("norm_m", "mlp", "m")):
        expected = found[norm][1] * (1 + given[f"scale_{a}"]) + given[f"shift_{a}"]
        torch.testing.assert_close(found[inner][0], expected)
    between = hidden + given["gate_a"] * found["attention"][1]
    torch.testing.assert_close(found["norm_m"][0], between)
    torch.testing.assert_close(out, between + given["gate_m"] * found["mlp"][1])


def test_the_embedding_of_timesteps_by_hand():
    """Cosines first, then sines, of t 10000^(-i / half): for width 4 the frequencies are 1 and 0.01."""
    found = timestep_embedding(torch.tensor([0, 3]), 4)
    angles = torch.tensor([[0.0, 0.0], [3.0, 0.03]])
    torch.testing.assert_close(found, torch.cat([angles.cos(), angles.sin()], 1))


def test_a_score_is_the_temperature_times_a_cosine(model, pixel_values):
    text = torch.nn.functional.normalize(torch.randn(2, 8, generator=torch.Generator().manual_seed(3)), dim=1)
    t = torch.tensor([7, 900])
    with torch.no_grad():
        image = model.image_features(pixel_values, t)
        scores = model.cosine_scores(pixel_values, text, t)
    expected = model.model.logit_scale.exp() * torch.nn.functional.cosine_similarity(image, text)
    torch.testing.assert_close(scores, expected.detach())
