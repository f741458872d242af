"""Drawing images: DDIM as diffusers runs it, and noise that belongs to its image."""

import copy

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

import tiny
from attune.config.settings import Sampling
from attune.diffusion import process
from attune.diffusion.ddim import sample
from attune.diffusion.generate import NonFiniteImageError, generate_images
from attune.diffusion.noise import noise_seed, per_row_noise

SEEDS = [11, 22, 33]
PROMPTS = ["a cat", "a dog", "two owls"]


@pytest.fixture
def cond(policy):
    return policy.backbone.encode_prompts(PROMPTS)


def test_eta_zero_draws_only_the_start(policy, cond):
    shapes, draw = [], per_row_noise(SEEDS)

    def counted(shape):
        shapes.append(shape)
        return draw(shape)

    sample(policy, cond, counted, 5, 0.0, 2.0)
    assert shapes == [(3, 4, 8, 8)]
    sample(policy, cond, counted, 5, 1.0, 2.0)
    assert len(shapes) == 1 + 6


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_same_seeds_give_the_same_bits(policy, cond, eta):
    images = [sample(policy, cond, per_row_noise(SEEDS), 4, eta, 2.0) for _ in range(2)]
    assert torch.equal(*images)
    assert not torch.equal(images[0], sample(policy, cond, per_row_noise([1, 2, 3]), 4, eta, 2.0))


def test_a_single_step_arrives_at_zero(policy, cond):
    """From t = 1 to t = 0, by the definition of x_0 and of the forward process."""
    schedule = policy.backbone.path.alphas_cumprod
    x_t, t = per_row_noise(SEEDS)((3, 4, 8, 8)), torch.ones(3, dtype=torch.long)
    with torch.no_grad():
        noise_pred = policy.predict(x_t, t, cond)
    x_0 = (x_t - (1 - schedule[1]).sqrt() * noise_pred) / schedule[1].sqrt()
    expected = process.add_noise(x_0, noise_pred, policy.backbone.path.level(torch.tensor(0), x_0))
    torch.testing.assert_close(sample(policy, cond, per_row_noise(SEEDS), 1, 0.0, 1.0), expected)


def test_a_run_is_diffusers(policy, cond):
    scheduler = DDIMScheduler(**tiny.SCHEDULE)
    scheduler.set_timesteps(10)
    x_t = per_row_noise(SEEDS)((3, 4, 8, 8))
    with torch.no_grad():
        for t in scheduler.timesteps:
            noise_pred = policy.predict(x_t, t.expand(3), cond, 3.0)
            x_t = scheduler.step(noise_pred, t, x_t, eta=0.0).prev_sample
    ours = sample(policy, cond, per_row_noise(SEEDS), 10, 0.0, 3.0)
    torch.testing.assert_close(ours, x_t, rtol=1e-4, atol=1e-4)


def test_noise_depends_on_content_not_on_order():
    seeds = {(p, k): noise_seed(p, k, 0) for p in PROMPTS for k in range(3)}
    assert seeds == {(p, k): noise_seed(p, k, 0) for k in (2, 0, 1) for p in reversed(PROMPTS)}
    assert len(set(seeds.values())) == 9
    assert noise_seed("a", 0, 0) != noise_seed("a", 0, 1)
    assert noise_seed("a", 11, 1) != noise_seed("a", 1, 11)
    assert noise_seed("a", np.int64(3), 0) == noise_seed("a", 3, 0)
    assert all(0 <= seed < 2**63 for seed in seeds.values())


def test_noise_of_a_row_is_its_own():
    together = per_row_noise(SEEDS)
    alone = per_row_noise(SEEDS[1:2])
    for _ in range(3):  # and stays so, draw after draw
        assert torch.equal(together((3, 4, 8, 8))[1:2], alone((1, 4, 8, 8)))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_image_does_not_depend_on_its_batch(policy, cond, eta):
    together = sample(policy, cond, per_row_noise(SEEDS), 6, eta, 2.0)
    order = torch.tensor([2, 0])
    apart = sample(policy, cond[order], per_row_noise([33, 11]), 6, eta, 2.0)
    torch.testing.assert_close(apart, together[order], rtol=1e-5, atol=1e-5 * float(together.abs().max()))


def generate_with(policy, rows, batch_size, eta=0.0):
    sampling = Sampling(steps=4, eta=eta, guidance_scale=2.0, batch_size=batch_size)
    prompts = [PROMPTS[i % 3] for i in rows]
    return generate_images(policy, prompts, [i // 3 for i in rows], sampling, 0, None)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_generating_does_not_depend_on_batch_size_or_order(new_policy, eta):
    policy, rows = new_policy(moved=0.1), list(range(9))
    eight = generate_with(policy, rows, 8, eta)
    assert eight.shape == (9, 16, 16, 3)
    assert eight.dtype == np.uint8
    for again in (generate_with(policy, rows, 1, eta), generate_with(policy, rows[::-1], 4, eta)[::-1]):
        assert np.abs(eight.astype(int) - again).max() <= 1  # one grey level
    assert len(np.unique(eight.reshape(9, -1), axis=0)) == 9  # ordinals of one prompt differ too
    assert eight.std() > 10  # not one flat colour, which would make this test empty


def test_an_adapter_that_explodes_is_named_and_draws_nothing(new_policy, tmp_path):
    """Its weights are finite, what they compute is not; 8 bits would show it as black."""
    new_policy(moved=1e30).save(tmp_path)
    policy = new_policy(adapter=False)
    policy.load(tmp_path)
    with pytest.raises(NonFiniteImageError, match=rf"{tmp_path}: the denoiser gave .* for the prompt 'a cat'"):
        generate_with(policy, [0, 1, 2], 3)


def test_an_autoencoder_that_overflows_is_named_with_the_image_it_lost(new_policy):
    policy = new_policy(adapter=False)
    policy.backbone.vae = copy.deepcopy(policy.backbone.vae)
    whole = generate_with(policy, [0, 1, 2], 2)
    vae, decoded = policy.backbone.vae, []

    def overflow(module, inputs):
        """From the third image on, as in half precision where an image is bright."""
        decoded.extend(inputs[0])
        return (inputs[0] * (1e38 if len(decoded) > 2 else 1),)

    vae.decoder.register_forward_pre_hook(overflow)
    assert np.array_equal(generate_with(policy, [0, 1], 2), whole[:2])
    decoded.clear()
    with pytest.raises(NonFiniteImageError, match=r"the model: the autoencoder gave .* for the prompt 'two owls'"):
        generate_with(policy, [0, 1, 2], 2)
