"""The diffusion process: numbers worked out by hand, limits, and diffusers' own scheduler."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler

import tiny
from attune.diffusion import process

SCHEDULER = DDIMScheduler(**tiny.SCHEDULE)
SCHEDULE = SCHEDULER.alphas_cumprod


def latents(seed, rows=4):
    return torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def scalar(value):
    return torch.full((1, 1, 1, 1), value)


def at(*t):
    """Levels of the schedule at timesteps, one a row."""
    return process.vp_level(SCHEDULE, torch.tensor(t), latents(0))


def of(a_t):
    """The level of a single a_t."""
    return process.vp_level(torch.tensor([a_t]), torch.tensor([0]), scalar(0.0))


def test_a_level_has_one_value_per_row():
    x = latents(0, rows=2).double()
    level = process.vp_level(torch.tensor([0.9, 0.5, 0.1]), torch.tensor([2, 0]), x)
    for part in level:
        assert part.shape == (2, 1, 1, 1)
        assert part.dtype == torch.float64
    torch.testing.assert_close(level.alpha2.flatten(), torch.tensor([0.1, 0.9]).double())
    torch.testing.assert_close(level.sigma2.flatten(), torch.tensor([0.9, 0.1]).double())


def test_add_noise_by_hand():
    """a = 0.64: sqrt(0.64) 2 + sqrt(0.36) (-1) = 1.6 - 0.6 = 1."""
    assert process.add_noise(scalar(2.0), scalar(-1.0), of(0.64)).item() == pytest.approx(1.0)


def test_predict_x0_undoes_add_noise():
    x_0, noise, level = latents(0), latents(1), at(0, 300, 600, 999)
    torch.testing.assert_close(process.predict_x0(process.add_noise(x_0, noise, level), noise, level), x_0)


def test_velocity_to_noise_by_its_definition():
    """v = sqrt(a) noise - sqrt(1 - a) x_0 (Salimans and Ho 2022)."""
    x_0, noise, level = latents(0), latents(1), at(0, 300, 600, 999)
    velocity = level.alpha * noise - level.sigma * x_0
    x_t = process.add_noise(x_0, noise, level)
    torch.testing.assert_close(process.velocity_to_noise(velocity, x_t, level), noise)


def test_an_error_of_velocity_weighs_its_share_of_signal_in_epsilon():
    """What docs/methods says of losses on models that predict velocity: error of epsilon = a_t error of v."""
    level = at(0, 300, 600, 999)
    errors = [process.velocity_to_noise(v, latents(2), level) for v in (latents(0), latents(1))]
    in_noise, in_velocity = ((one - other).square() for one, other in (errors, (latents(0), latents(1))))
    torch.testing.assert_close(in_noise, level.alpha2 * in_velocity, rtol=1e-3, atol=1e-5)


def test_timesteps():
    assert process.ddim_timesteps(1000, 4).tolist() == [751, 501, 251, 1, 0]
    assert process.ddim_timesteps(1000, 1).tolist() == [1, 0]
    assert process.ddim_timesteps(1000, 30).tolist()[:2] == [958, 925]  # 33 apart, not 33.3


@pytest.mark.parametrize("steps", [0, -1, 1000])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match=rf"1\.\.999, got {steps}"):
        process.ddim_timesteps(1000, steps)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50, 499, 999])
def test_every_run_stays_in_the_schedule_and_ends_at_zero(steps):
    t = process.ddim_timesteps(1000, steps)
    assert t.max() < 1000
    assert t[-1] == 0
    assert (t.diff() < 0).all()
    assert torch.equal((t[:-1] - 1000 // steps).clamp(min=0), t[1:])  # as DDIM's authors count


@pytest.mark.parametrize("times", [process.ddim_timesteps(1000, 7), torch.tensor([1000.0, 960.1, 278.05, 8.9, 0.0])])
def test_the_time_after_one_is_the_next_of_the_table(times):
    rows = torch.tensor([2, 0, 3, 3, 1])
    assert torch.equal(process.time_after(times, times[rows]), times[rows + 1])
    assert torch.equal(process.time_after(times, times[0]), times[1])


def step(x_t, noise_pred, level, to, eta):
    return process.ddim_step(process.predict_x0(x_t, noise_pred, level), noise_pred, level, to, eta)


def test_ddim_step_by_hand():
    """a_t = 0.25, a_prev = 0.64, x_t = 1, noise_pred = 0.5, eta = 1.

    var  = (0.36 / 0.75) (1 - 0.25 / 0.64) = 0.48 * 0.609375 = 0.2925
    x_0  = (1 - sqrt(0.75) 0.5) / 0.5 = 1.1339746
    mean = 0.8 x_0 + sqrt(0.36 - 0.2925) 0.5 = 0.9071797 + 0.1299038 = 1.0370835
    """
    mean, std = step(scalar(1.0), scalar(0.5), of(0.25), of(0.64), 1.0)
    assert std.item() ** 2 == pytest.approx(0.2925)
    assert mean.item() == pytest.approx(1.0370835)


def test_eta_zero_is_deterministic():
    """Without noise a step puts the predicted x_0 and the predicted noise together again, at a_prev."""
    x_t, noise_pred, levels = latents(0), latents(1), (at(501), at(451))
    mean, std = step(x_t, noise_pred, *levels, 0.0)
    assert not std.any()
    again = process.add_noise(process.predict_x0(x_t, noise_pred, levels[0]), noise_pred, levels[1])
    torch.testing.assert_close(mean, again)
    _, half = step(x_t, noise_pred, *levels, 0.5)
    _, full = step(x_t, noise_pred, *levels, 1.0)
    torch.testing.assert_close(2 * half, full)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_on_a_schedule_the_general_step_is_ddims_to_the_last_bit(eta):
    """Every a_t and every a_prev of 20 steps, with eq. 12 and 16 as they are printed."""
    times = process.ddim_timesteps(1000, 20)
    t, t_prev = times[:-1], times[1:]
    x_t, noise_pred = latents(0, 20), latents(1, 20)
    a_t, a_prev = (SCHEDULE[i].view(-1, 1, 1, 1) for i in (t, t_prev))
    expected_std = eta * ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)).sqrt()
    x_0 = (x_t - (1 - a_t).sqrt() * noise_pred) / a_t.sqrt()
    expected = a_prev.sqrt() * x_0 + (1 - a_prev - expected_std**2).sqrt() * noise_pred
    mean, std = step(x_t, noise_pred, at(*t.tolist()), at(*t_prev.tolist()), eta)
    assert torch.equal(std, expected_std)
    assert torch.equal(mean, expected)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_step_is_diffusers(eta):
    SCHEDULER.set_timesteps(20)
    times = process.ddim_timesteps(1000, 20)
    assert times[:-1].tolist() == SCHEDULER.timesteps.tolist()
    x_t, noise_pred, noise = latents(0), latents(1), latents(2)
    for t, t_prev in pairwise(times):
        mean, std = step(x_t, noise_pred, at(t), at(t_prev), eta)
        theirs = SCHEDULER.step(noise_pred, t, x_t, eta=eta, variance_noise=noise if eta else None)
        torch.testing.assert_close(mean + std * noise, theirs.prev_sample, rtol=1e-5, atol=2e-5)


def test_log_prob_by_hand():
    """One dimension at its mean, std 2: -ln 2 - ln sqrt(2 pi) = -1.6120857; one std away: 0.5 less."""
    densities = process.gaussian_log_prob(
        torch.tensor([0.0, 2.0]).reshape(2, 1, 1, 1), torch.zeros(2, 1, 1, 1), scalar(2.0)
    )
    assert densities.tolist() == pytest.approx([-1.6120857, -2.1120857])


def test_log_prob_is_the_mean_over_dimensions():
    x, mean = latents(0), latents(1)
    std = torch.tensor([0.02, 0.3, 1.0, 4.0]).reshape(4, 1, 1, 1)
    expected = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x).mean((1, 2, 3))
    torch.testing.assert_close(process.gaussian_log_prob(x, mean, std), expected)
