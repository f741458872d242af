"""Kinds of guidance: classifier-free, told to the denoiser, or none; and what may be set of each."""

from argparse import Namespace

import pytest
import torch

import params as files
from attune.backbones import flux
from attune.config.profile import Params
from attune.config.resolve import load, resolve
from attune.config.settings import Model
from attune.diffusion.noised import NoisedBatch, policy_error
from attune.planning import costs
from attune.planning.problems import problems

PUBLISHED = "owner/name@" + "0" * 40
X_T, T = torch.ones(2, 4, 8, 8), torch.tensor([501, 21])


def cond(policy):
    return policy.backbone.encode_prompts(["a cat", "a dog"])


@torch.no_grad()
def test_a_model_without_guidance_takes_none(new_policy):
    policy = new_policy()
    plain = policy.predict(X_T, T, cond(policy))
    policy.backbone.guidance = "none"
    assert torch.equal(policy.predict(X_T, T, cond(policy)), plain)
    with pytest.raises(ValueError, match=r"guidance_scale: 3\.5, but sd has no guidance; set it to 1"):
        policy.predict(X_T, T, cond(policy), 3.5)


def test_a_loss_of_given_images_never_has_classifier_free_guidance(new_policy):
    policy = new_policy()
    m = NoisedBatch(X_T, T, X_T, cond(policy))
    assert torch.equal(policy_error(policy, m), policy_error(policy, m, 1.0))
    with pytest.raises(ValueError, match=r"embedded_guidance: 3\.5, but sd is not told its guidance; set it to 1"):
        policy_error(policy, m, 3.5)


@pytest.fixture
def said(tmp_path, monkeypatch):
    """Problems of profile tiny with values changed."""
    monkeypatch.chdir(files.ROOT)

    def said(**changes):
        params, values = files.shipped("tiny")
        return problems(load(files.write(tmp_path, params, files.changed(values, **changes))), 0, None)

    return said


def test_the_plan_refuses_what_the_base_model_has_not(said):
    assert said() == []
    (line,) = said(methods__dpo__embedded_guidance=3.5)
    assert line.startswith("params/tiny.yaml:methods.dpo.embedded_guidance: sd is not told its guidance")
    (line,) = said(model__t5=True)
    assert line == "params/tiny.yaml:model.t5: sd has no T5 that may be left out; remove the line"
    asked = {"space": {"embedded_guidance": {"low": 1, "high": 4}}, "objectives": ["pickscore"], "trials": 2}
    lines = said(search={"dpo": asked | {"prompts": 4}})
    assert any(line.startswith("params/tiny.yaml:search.dpo: embedded_guidance: sd is not told") for line in lines)


# ---------------------------------------------------------------- what a plan counts


@pytest.mark.parametrize(("kind", "gigabytes"), [(None, 23.80), ("int8", 11.90), ("nf4", 6.69)])
def test_a_quantised_base_counts_its_bits(kind, gigabytes, monkeypatch):
    """What is loaded beside FLUX's transformer, its T5 above all, is not quantised."""
    monkeypatch.setattr("attune.config.settings.find_spec", lambda name: name)
    model = Model(backbone="flux", path=PUBLISHED, dtype="bfloat16", quantize=kind)
    facts = flux.facts(model)
    beside = 2 * facts.text_encoders + 4 * facts.autoencoder
    assert costs._frozen(Namespace(model=model), facts) == pytest.approx(gigabytes * 1e9 + beside, rel=1e-3)


def test_prompts_that_a_t5_reads_are_counted_on_the_disk(monkeypatch):
    """Of profile flux 128 tokens of 4096 numbers in half precision; of SDXL as little as before."""
    monkeypatch.chdir(files.ROOT)
    sizes = {"prompts": 8000, "pairs": 20_000}
    for profile, wanted in (("flux", 8000 * 128 * 4096 * 2), ("sdxl", 0)):
        settings = resolve(Params.model_validate(files.shipped(profile)[0]), files.shipped(profile)[1])
        prepare = next(costs.rows(settings, {}, {}, sizes))
        latents = 2 * 20_000 * (512 if profile == "flux" else 1024) ** 2 / 64 * 4 * (16 if profile == "flux" else 4)
        assert prepare.disk == latents + wanted
