"""The sampler run backwards, where the answer is known: a constant prediction, and Gaussian data."""

import math

import pytest
import torch

import tiny
from attune.diffusion.inversion import implied_noise, inversion_times, invert, inverted_noise
from attune.diffusion.path import VP, Flow, logit_normal
from attune.methods import dpo

SCHEDULE = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
PATHS = {
    "vp": VP((1 - SCHEDULE).cumprod(0)),
    "flow": Flow(lambda steps: torch.linspace(1, 0, steps + 1), logit_normal(3.0)),
}
STD = 0.5  # of the Gaussian data


def latents(n=3):
    return STD * torch.randn(n, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def exact(path, x, t):
    """What the best model of Gaussian data predicts: E[noise | x_t] = sigma x / v, of the velocity a like line."""
    at = path.level(t, x)
    spread = at.alpha2 * STD**2 + at.sigma2
    noise, image = at.sigma / spread * x, at.alpha * STD**2 / spread * x
    return noise if isinstance(path, VP) else noise - image


@pytest.mark.parametrize(
    ("t", "steps", "times"),
    [(101, 4, [0, 25, 50, 76, 101]), (350, 4, [0, 88, 175, 262, 350]), (2, 4, [0, 0, 1, 2, 2]), (0, 2, [0, 0, 0])],
)
def test_times_are_evenly_spaced_and_end_at_t(t, steps, times):
    assert inversion_times(torch.tensor([t, 900]), steps)[:, 0].tolist() == times
    assert inversion_times(torch.tensor([t, 900]), steps)[-1].tolist() == [t, 900]
    spaced = inversion_times(torch.tensor([float(t)]), steps)[:, 0]
    assert spaced.tolist() == pytest.approx([t * k / steps for k in range(steps + 1)])


@pytest.mark.parametrize("heun", [False, True])
@pytest.mark.parametrize("t", [10, 100, 500, 951])
def test_a_constant_noise_is_found_exactly(t, heun):
    path, x_0, noise = PATHS["vp"], latents(), 1.7
    found = inverted_noise(lambda x, t: torch.full_like(x, noise), path, x_0, torch.full((3,), t), 3, heun)
    assert (found - noise).abs().max() < 1e-12


def test_a_constant_velocity_is_found_exactly():
    """x_0 + s v is where a straight line is at s, so the noise is x_0 + v."""
    x_0 = latents()
    found = inverted_noise(lambda x, t: torch.full_like(x, 1.7), PATHS["flow"], x_0, torch.full((3,), 640.5), 3)
    assert (found - x_0 - 1.7).abs().max() < 1e-12


@pytest.mark.parametrize("kind", PATHS)
def test_more_steps_and_a_second_call_come_nearer_to_the_point_it_was_painted_from(kind):
    """With the exact prediction x_t is x_0 sqrt(a S^2 + 1 - a) / S: one call errs as 1 / n, two much less."""
    path, x_0, t = PATHS[kind], latents(), torch.full((3,), 900 if kind == "vp" else 900.0)
    at = path.level(t, x_0)
    right = x_0 * (at.alpha2 * STD**2 + at.sigma2).sqrt() / STD

    def error(steps, heun=False):
        x_t = invert(lambda x, t: exact(path, x, t), path, x_0, inversion_times(t, steps), heun)
        return float((x_t - right).norm() / right.norm())

    once = [error(steps) for steps in (5, 10, 50, 200)]
    assert once == sorted(once, reverse=True)
    assert 3 < once[2] / once[3] < 5  # four times the steps
    assert error(5, heun=True) < error(10)  # the same calls
    assert error(50, heun=True) < 0.2 * error(50)


def test_rows_have_times_of_their_own():
    path, x_0, t = PATHS["vp"], latents(), torch.tensor([30, 400, 951])
    predict = lambda x, t: exact(path, x, t)  # noqa: E731
    together = inverted_noise(predict, path, x_0, t, 4)
    for row in range(3):
        alone = inverted_noise(predict, path, x_0[[row]], t[[row]], 4)
        torch.testing.assert_close(alone, together[[row]], rtol=1e-12, atol=1e-12)


def test_what_was_added_is_what_is_found():
    path, x_0, t = PATHS["vp"], latents(), torch.tensor([1, 500, 999])
    noise, at = torch.randn_like(x_0), path.level(t, x_0)
    torch.testing.assert_close(implied_noise(at.alpha * x_0 + at.sigma * noise, x_0, at), noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("heun", [False, True])
def test_a_pair_is_shown_with_the_noise_of_its_images(new_policy, data, heun):
    """Each has its own, which is the sampler's run backwards by the policy as it is; time and prompt are shared."""
    policy = new_policy(moved=0.2)
    own = {"lr": 1e-3, "batches": 1, "batch_size": 3, "lora": {"rank": 2}, "caption_dropout": 0}
    config = dpo.Config(**(tiny.PLAIN | own), noise="inverted", inversion_steps=3, heun=heun)
    method, batch = dpo.Method(config, policy), data.rows_for("pairs")[1]([0, 4, 9])
    (m,) = tiny.minibatches(method, batch)
    (drawn,) = tiny.minibatches(dpo.Method(dpo.Config(**(tiny.PLAIN | own)), policy), batch)
    assert torch.equal(m.t, drawn.t)
    assert torch.equal(m.x_0, drawn.x_0)
    predict = lambda x, t: policy.predict(x, t, m.cond)  # noqa: E731
    expected = inverted_noise(predict, policy.backbone.path, m.x_0, m.t, 3, heun)
    torch.testing.assert_close(m.noise, expected, rtol=1e-3, atol=1e-4)  # the adapter was merged
    assert not m.noise.requires_grad
    assert (m.noise[:3] - m.noise[3:]).abs().max() > 0.1


def test_the_loss_begins_at_ln_2_with_any_noise(new_policy, data):
    own = {"lr": 1e-3, "batches": 2, "batch_size": 3, "lora": {"rank": 2}}
    config = dpo.Config(**(tiny.PLAIN | own), noise="inverted", inversion_steps=2)
    history = tiny.run(dpo.Method(config, new_policy()), data)
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert history[1]["grad_norm"] > 0
