"""The two paths from image to noise: numbers worked out by hand, identities, ends, and the variance of whole runs."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

import tiny
from attune.backbones._flow import size_shift
from attune.diffusion import process
from attune.diffusion.path import VP, Flow, logit_normal, shifted, uniform_over


def sigmas(steps):
    """Of Stable Diffusion 3."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas


PATHS = {"vp": VP(DDIMScheduler(**tiny.SCHEDULE).alphas_cumprod), "flow": Flow(sigmas, logit_normal(3.0))}
VALUE = torch.ones(1, 1, 1, 1, dtype=torch.float64)


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


def latents(seed, rows=4):
    return torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).double()


def flow_level(*s):
    return process.flow_level(torch.tensor(s, dtype=torch.float64), latents(0))


# ---------------------------------------------------------------- levels and predictions


def test_levels_of_a_flow_by_hand():
    """t = 250 of 1000 is s = 0.25: alpha = 0.75, sigma = 0.25; x_s = 0.75 * 2 + 0.25 * (-4) = 0.5."""
    level = PATHS["flow"].level(torch.tensor([250.0, 1000.0, 0.0]), latents(0))
    assert level.alpha.flatten().tolist() == [0.75, 0, 1]
    assert level.sigma.flatten().tolist() == [0.25, 1, 0]
    assert process.add_noise(2 * VALUE, -4 * VALUE, level).flatten().tolist() == [0.5, -4, 2]


def test_squares_of_a_level_lose_nothing():
    s = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    level = process.flow_level(s, torch.zeros(1, 1, 1, 1))
    assert torch.equal(level.alpha.flatten(), 1 - s)
    assert torch.equal(level.sigma.flatten(), s)


def test_what_a_path_predicts_gives_back_image_and_noise(path):
    x_0, noise = latents(0), latents(1)
    level = path.level(path.sampling_times(7)[[1, 3, 5, 6]], x_0)
    x_t = process.add_noise(x_0, noise, level)
    found = path.x0_and_noise(path.target(x_0, noise), x_t, level)
    torch.testing.assert_close(torch.stack(found), torch.stack([x_0, noise]))


def test_a_flow_can_be_read_at_both_ends():
    """At s = 1, where epsilon says nothing of the image, x_0 = x - v; at s = 0 the noise is x + v."""
    x, velocity = latents(0, 2), latents(1, 2)
    x_0, noise = PATHS["flow"].x0_and_noise(velocity, x, flow_level(1.0, 0.0))
    assert torch.equal(x_0, torch.stack([x[0] - velocity[0], x[1]]))
    assert torch.equal(noise, torch.stack([x[0], x[1] + velocity[1]]))


def test_an_error_of_a_flows_velocity_is_not_that_of_epsilon():
    """Error of epsilon = (1 - s) error of v, and of x_0 = -s error of v: nothing is left of the one at s = 1."""
    level, x = flow_level(0.0, 0.3, 0.8, 1.0), latents(2)
    one, other = (PATHS["flow"].x0_and_noise(latents(seed), x, level) for seed in (0, 1))
    error = latents(0) - latents(1)
    torch.testing.assert_close(one[1] - other[1], level.alpha * error)
    torch.testing.assert_close(one[0] - other[0], -level.sigma * error)


# ---------------------------------------------------------------- the step


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_step_by_its_formula(path, eta):
    """std = eta s' sqrt(1 - (alpha s' / (alpha' s))^2), and the noise kept and the noise added make s' together."""
    times, x_0, noise = path.sampling_times(12), latents(0), latents(1)
    now, to = (path.level(times[rows], x_0) for rows in ([0, 4, 8, 10], [1, 5, 9, 11]))
    mean, std = process.ddim_step(x_0, noise, now, to, eta)
    ratio = now.alpha * to.sigma / (to.alpha * now.sigma)
    torch.testing.assert_close(std, eta * to.sigma * (1 - ratio**2).sqrt(), rtol=1e-10, atol=0)
    torch.testing.assert_close(mean, to.alpha * x_0 + (to.sigma2 - std**2).sqrt() * noise)
    kept = process.ddim_step(0 * VALUE, VALUE, now, to, eta)[0]
    torch.testing.assert_close(kept**2 + std**2, to.sigma2)


def test_without_noise_the_step_of_a_flow_is_eulers():
    x, velocity, now, to = latents(0), latents(1), flow_level(1.0, 0.7, 0.3, 0.1), flow_level(0.9, 0.5, 0.29, 0.0)
    mean, std = process.ddim_step(*PATHS["flow"].x0_and_noise(velocity, x, now), now, to, 0.0)
    assert not std.any()
    torch.testing.assert_close(mean, x + (to.sigma - now.sigma) * velocity)


def test_the_ends_of_a_flow_by_hand():
    """From pure noise (s = 1) at eta 1 all noise is new: std = s'. To the image (s' = 0) there is none at any eta."""
    x_0, noise, now, to = latents(0, 2), latents(1, 2), flow_level(1.0, 0.05), flow_level(0.96, 0.0)
    mean, std = process.ddim_step(x_0, noise, now, to, 1.0)
    torch.testing.assert_close(std.flatten(), torch.tensor([0.96, 0.0]).double())
    torch.testing.assert_close(mean, torch.stack([0.04 * x_0[0], x_0[1]]), rtol=1e-6, atol=1e-7)
    x = process.add_noise(mean[:1], noise[:1], flow_level(0.96))
    assert process.gaussian_log_prob(x, mean[:1], std[:1]).isfinite().all()


def test_the_noise_of_a_step_by_hand():
    """s 0.5 to 0.4 at eta 1: 0.4 sqrt(1 - (0.5 * 0.4 / (0.6 * 0.5))^2) = 0.4 sqrt(1 - 4/9) = 0.2981424."""
    _, std = process.ddim_step(VALUE, VALUE, flow_level(0.5), flow_level(0.4), 1.0)
    assert std.item() == pytest.approx(0.2981424)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_of_a_known_image_every_step_keeps_mean_and_variance(path, eta):
    """Ten steps from noise that predict the one right image: half a million numbers stay alpha x_0 + sigma noise."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(1, 1, 512, 1024, generator=generator)  # noqa: E731
    times, x_0 = path.sampling_times(10), draw()
    x = process.add_noise(x_0, draw(), path.level(times[0], x_0))
    for t, t_next in pairwise(times):
        now, to = path.level(t, x), path.level(t_next, x)
        mean, std = process.ddim_step(x_0, (x - now.alpha * x_0) / now.sigma, now, to, eta)
        x = mean + std * draw()
        assert x.var().item() == pytest.approx((to.alpha2 + to.sigma2).item(), rel=0.01)  # standard error 0.002
        if to.sigma > 0:
            assert ((x - to.alpha * x_0) / to.sigma).var().item() == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_gaussian_images_come_out_with_their_variance(path, eta):
    """Images N(0, 1) and the best predictions of them: variances by the step's own factors, 999 steps, within 1 %."""
    times = path.sampling_times(999)
    level = path.level(times[0], VALUE)
    variance = level.alpha2 + level.sigma2
    for t, t_next in pairwise(times):
        now, to = path.level(t, VALUE), path.level(t_next, VALUE)
        share = VALUE / (now.alpha2 + now.sigma2)
        predicted = path.target(now.alpha * share, now.sigma * share)  # E[x_0 | x] and E[noise | x] of x = 1
        factor, std = process.ddim_step(*path.x0_and_noise(predicted, VALUE, now), now, to, eta)
        variance = factor**2 * variance + std**2
        assert variance.item() == pytest.approx((to.alpha2 + to.sigma2).item(), rel=0.01)


# ---------------------------------------------------------------- times


def test_times_of_a_flow_are_the_schedulers():
    """The scheduler shifts an already shifted range: the last of five steps starts at 0.0089, not at 0.0030."""
    times = PATHS["flow"].sampling_times(5)
    assert times.tolist() == pytest.approx([1000, 900.4, 751.1, 503.0, 8.9286, 0], rel=1e-3)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    torch.testing.assert_close(times[:-1], scheduler.timesteps)


def test_shifts_by_hand():
    """k s / (1 + (k - 1) s): 3 * 0.5 / (1 + 2 * 0.5) = 0.75; FLUX's mu is 0.5 at 256 tokens and 1.15 at 4096."""
    torch.testing.assert_close(shifted(torch.tensor([0.0, 0.5, 1.0]), 3.0), torch.tensor([0.0, 0.75, 1.0]))
    config = {"use_dynamic_shifting": True}
    assert size_shift(config, 256) == pytest.approx(0.5)
    assert size_shift(config, 4096) == pytest.approx(1.15)


def test_training_times_are_drawn_row_by_row(path):
    """Rows 4 to 7 of a batch of eight get what they would get if one process drew for all."""
    draws, alone = tiny.draws(8), tiny.draws(8)
    here = type(alone)(8, alone.rows[4:], alone.shared)
    whole = path.training_times(draws, 16).unflatten(0, (2, 8))
    assert torch.equal(path.training_times(here, 8).unflatten(0, (2, 4)), whole[:, 4:])


def test_densities_of_training_times_by_their_quantiles():
    """Half of the sigmas lie below shifted(0.5) = 0.75, a sixth below shifted(sigmoid(-0.967)); a table's are its."""
    s = logit_normal(3.0)(tiny.draws(20_000), 20_000)
    assert ((s > 0) & (s < 1)).all()
    for share, logit in ((0.5, 0.0), (1 / 6, -0.9674), (5 / 6, 0.9674)):
        below = (s < shifted(torch.tensor(logit).sigmoid(), 3.0)).double().mean()
        assert below.item() == pytest.approx(share, abs=0.015)  # four standard errors
    table = torch.tensor([1.0, 0.75, 0.1])
    of_table = uniform_over(table)(tiny.draws(6000), 6000)
    counts = [(of_table == value).sum().item() for value in table]
    assert sum(counts) == 6000
    assert counts == pytest.approx([2000] * 3, abs=150)  # four standard errors


def test_times_of_a_schedule_are_whole_and_any_of_them():
    t = VP(torch.ones(5)).training_times(tiny.draws(300), 300)
    assert t.dtype == torch.long
    assert set(t.tolist()) == {0, 1, 2, 3, 4}
