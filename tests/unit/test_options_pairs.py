"""Options of the methods that learn from pairs: what each changes, by a number worked out by hand or exactly."""

import math

import pytest
import torch

import tiny
from attune.config import plugins
from attune.config.settings import Lora
from attune.diffusion.ddim import sample
from attune.diffusion.path import VP
from attune.interfaces import Conditioning

PAIRS = ["sft", "dpo", "kto", "mapo", "spin"]
DROPPING = ["sft", "dpo", "mapo"]  # kto's and spin's own tests do the same for theirs
LOOP = {"lora": None, "lr": 1e-3, "batches": 1, "batch_size": 8}
OWN = {"spin": {"steps": 3, "guidance_scale": 1.0}, "dpo": {"caption_dropout": 0.0}, "kto": {"caption_dropout": 0.0}}


def build(name, policy, **changes):
    module = plugins.load("methods", name)
    return module.Method(module.Config(**(tiny.PLAIN | LOOP | OWN.get(name, {}) | changes)), policy)


def drawn(method, batch, seed=0):
    """The one minibatch of a batch of pairs, taken apart where the method learns from single images."""
    batch = batch if method.consumes == "pairs" else getattr(batch, method.consumes.replace(" ", "_"))
    (minibatch,) = tiny.minibatches(method, batch, seed)
    return minibatch


def errors(policy, minibatch):
    """Squared errors of the noise predictions, (n,), written out: mean over latents of (eps(x_t, t, c) - noise)^2."""
    a_t = policy.backbone.path.alphas_cumprod[minibatch.t].view(-1, 1, 1, 1)
    x_t = a_t.sqrt() * minibatch.x_0 + (1 - a_t).sqrt() * minibatch.noise
    with torch.no_grad():
        predicted = policy.predict(x_t, minibatch.t, minibatch.cond)
    return ((predicted - minibatch.noise) ** 2).mean((1, 2, 3))


def empty_rows(policy, cond):
    """Which rows hold the encoding of the empty prompt, (n,)."""
    (name,) = cond.tensors
    return (cond.tensors[name] == policy.uncond.tensors[name]).flatten(1).all(1)


# ---------------------------------------------------------------- caption_dropout


@pytest.mark.parametrize("name", DROPPING)
def test_some_prompts_are_emptied_at_a_half_and_the_others_are_left_alone(policy, data, name):
    batch = data.pair_batch(range(8))
    plain, found = (drawn(build(name, policy, caption_dropout=share), batch) for share in (0.0, 0.5))
    emptied = empty_rows(policy, found.cond)
    assert not empty_rows(policy, plain.cond).any()
    assert 0 < emptied.sum() < len(emptied)
    (key,) = found.cond.tensors
    assert torch.equal(found.cond.tensors[key][~emptied], plain.cond.tensors[key][~emptied])
    assert torch.equal(found.t, plain.t)
    assert torch.equal(found.noise, plain.noise)
    if name != "sft":
        chosen, rejected = emptied.chunk(2)
        assert torch.equal(chosen, rejected)  # both images of a pair are seen with the prompt, or both without


@pytest.mark.parametrize("name", PAIRS)
def test_nearly_all_prompts_are_emptied_at_nearly_one(policy, data, name):
    found = drawn(build(name, policy, caption_dropout=1 - 1e-9), data.pair_batch(range(8)))
    assert empty_rows(policy, found.cond).all()


@pytest.mark.parametrize("name", PAIRS)
def test_which_prompts_are_emptied_is_decided_by_the_batchs_draws_alone(policy, data, name):
    batch, rows = data.pair_batch(range(8)), []
    for ambient in (1, 2):
        torch.manual_seed(ambient)
        rows.append(empty_rows(policy, drawn(build(name, policy, caption_dropout=0.5), batch).cond))
    assert torch.equal(*rows)
    others = [empty_rows(policy, drawn(build(name, policy, caption_dropout=0.5), batch, s).cond) for s in range(1, 5)]
    assert not all(torch.equal(rows[0], other) for other in others)


def test_the_share_is_a_share(policy):
    """Of 10,000 prompts at 0.2 about 2,000 are emptied; 200 is five standard deviations."""
    cond = Conditioning({"x": torch.ones(10_000, 1)})
    policy.uncond = Conditioning({"x": torch.zeros(1, 1)})
    found = policy.drop_captions(cond, 0.2, tiny.draws(10_000)).tensors["x"]
    assert (found == 0).sum().item() == pytest.approx(2000, abs=200)
    assert policy.drop_captions(cond, 1.0, tiny.draws(10_000)).tensors["x"].sum() == 0
    assert policy.drop_captions(cond, 0.0, tiny.draws(1)) is cond


# ---------------------------------------------------------------- the losses, written out


def test_sft_is_the_error_on_chosen_images(new_policy, data):
    policy = new_policy(moved=0.2)
    method, batch = build("sft", policy), data.pair_batch(range(8))
    minibatch = drawn(method, batch)
    expected = torch.where((batch.label_0 > 0.5).view(-1, 1, 1, 1), batch.latents_0, batch.latents_1)
    assert torch.equal(minibatch.x_0, expected)
    assert method.loss(minibatch)[0].item() == pytest.approx(errors(policy, minibatch).mean().item(), rel=1e-6)


@pytest.mark.parametrize("name", ["dpo", "kto", "mapo"])
def test_chosen_images_come_first_and_rejected_ones_after_them(policy, data, name):
    """Of labels 0, 1, 1, 0, ... the first pair's chosen image is number 1, the second's number 0."""
    batch = data.pair_batch(range(8))
    assert set(batch.label_0.tolist()) == {0.0, 1.0}
    chosen, rejected = drawn(build(name, policy), batch).x_0.chunk(2)
    for i, label in enumerate(batch.label_0.tolist()):
        sides = (batch.latents_0[i], batch.latents_1[i]) if label == 1 else (batch.latents_1[i], batch.latents_0[i])
        assert torch.equal(chosen[i], sides[0])
        assert torch.equal(rejected[i], sides[1])


@pytest.mark.parametrize("beta", [100.0, 300.0])
@pytest.mark.parametrize("name", ["dpo", "spin"])
def test_beta_scales_the_margin(new_policy, data, name, beta):
    """m = (beta / 2) [(e_ref - e) of the chosen - (e_ref - e) of the other]; the loss is log(1 + exp(-m))."""
    policy = new_policy(moved=0.2)
    method = build(name, policy, beta=beta)
    minibatch = drawn(method, data.pair_batch(range(8)))
    with policy.reference():
        reference = errors(policy, minibatch)
    better = reference - errors(policy, minibatch)
    chosen, other = better.chunk(2)
    margin = beta / 2 * (chosen - other)
    loss, metrics = method.loss(minibatch)
    assert loss.item() == pytest.approx(torch.log1p(torch.exp(-margin)).mean().item(), rel=1e-5)
    assert metrics["margin"].item() == pytest.approx(margin.mean().item(), rel=1e-4)
    assert metrics["accuracy"].item() == (margin > 0).float().mean().item()
    names = {"dpo": ("chosen_reward", "rejected_reward"), "spin": ("real_reward", "opponent_reward")}[name]
    found = [metrics[key].item() for key in names]
    assert found == pytest.approx([beta / 2 * side.mean().item() for side in (chosen, other)], rel=1e-4)


@pytest.mark.parametrize(("beta", "snr"), [(0.1, 0.5), (0.7, 0.5), (0.1, 2.0)])
def test_mapos_options_by_their_formula(new_policy, data, beta, snr):
    """e_chosen + beta log(1 + exp(-T (phi_chosen - phi_rejected))), phi = x / (exp(x) - 1), x = snr e, T = 1000."""
    policy = new_policy(moved=0.2)
    method = build("mapo", policy, beta=beta, snr=snr)
    minibatch = drawn(method, data.pair_batch(range(8)))
    error = errors(policy, minibatch).double()
    x = snr * error
    phi, rejected_phi = (x / (x.exp() - 1)).chunk(2)
    margin = 1000 * (phi - rejected_phi)
    expected = error.chunk(2)[0] + beta * torch.nn.functional.softplus(-margin)
    loss, metrics = method.loss(minibatch)
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-4)
    assert metrics["chosen_error"].item() == pytest.approx(error.chunk(2)[0].mean().item(), rel=1e-5)
    assert metrics["rejected_error"].item() == pytest.approx(error.chunk(2)[1].mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 30.0},
        {"beta": 300.0},
        {"lambda_desirable": 3.0},
        {"lambda_undesirable": 3.0},
        {"utility": "loss_averse"},
        {"utility": "risk_seeking"},
    ],
)
def test_ktos_options_by_their_formula(new_policy, data, changes):
    """lambda (1 - U(r - z)) of liked images, lambda (1 - U(z - r)) of disliked ones; r = beta (e_ref - e)."""
    policy = new_policy(moved=0.2)
    method = build("kto", policy, **({"beta": 100.0} | changes))
    config = method.config
    minibatch = drawn(method, data.pair_batch(range(8)))
    with policy.reference():
        reference = errors(policy, minibatch)
    reward = (config.beta * (reference - errors(policy, minibatch))).double()
    z = max(0.0, reward.mean().item())
    utility = {
        "kahneman_tversky": lambda x: 1 / (1 + math.exp(-x)),
        "loss_averse": lambda x: -math.log1p(math.exp(-x)),
        "risk_seeking": lambda x: math.log1p(math.exp(x)),
    }[config.utility]
    costs = [config.lambda_desirable * (1 - utility(r - z)) for r in reward[:8].tolist()]
    costs += [config.lambda_undesirable * (1 - utility(z - r)) for r in reward[8:].tolist()]
    assert method.loss(minibatch)[0].item() == pytest.approx(sum(costs) / 16, rel=1e-4)


@pytest.mark.parametrize(("name", "accuracy"), [("dpo", 0.0), ("spin", 0.0), ("kto", 0.5)])
def test_accuracy_at_the_reference(policy, data, name, accuracy):
    """Margins are 0, and 0 is not right; kto says "disliked" of every image, which half of them are."""
    method = build(name, policy)
    assert method.loss(drawn(method, data.pair_batch(range(8))))[1]["accuracy"] == accuracy


@pytest.mark.parametrize(("consumes", "n"), [("pairs", 24), ("images", 48), ("liked images", 24)])
def test_every_timestep_is_drawn_the_first_and_the_last_as_often_as_any(data, consumes, n):
    """Of 24 or 48 draws from a schedule of three none is outside, and each is there; a pair shares one."""
    batch = data.rows_for(consumes)[1](range(24))
    t, noise = batch.draw_noise(VP(torch.ones(3)), tiny.draws(24))
    assert set(t.tolist()) == {0, 1, 2}
    assert len(t) == len(noise) == n


# ---------------------------------------------------------------- spin's opponents


@pytest.mark.parametrize(
    "changes", [{"eta": 0.0}, {"eta": 0.7}, {"eta": 1.0}, {"steps": 5}, {"guidance_scale": 3.0}], ids=str
)
def test_opponents_are_drawn_as_asked(new_policy, data, changes):
    """They equal the sampler's images at those settings, from the batch's draws, by the reference."""
    policy = new_policy(moved=0.3)
    batch = data.pair_batch(range(3))
    asked = {"steps": 3, "eta": 0.0, "guidance_scale": 1.0} | changes
    opponents = drawn(build("spin", policy, **asked), batch).x_0[3:]
    with policy.reference():
        noise = tiny.draws(3).noise
        expected = sample(policy, batch.cond, noise, asked["steps"], asked["eta"], asked["guidance_scale"])
    assert torch.equal(opponents, expected)


def test_a_single_step_of_an_opponent_by_hand(new_policy, data):
    """One step at eta 1, t = 1 to 0: mean and standard deviation written out from eq. 12 and 16 of DDIM."""
    policy = new_policy()
    batch = data.pair_batch([0])
    opponent = drawn(build("spin", policy, steps=1, eta=1.0), batch).x_0[1:]
    noise = tiny.draws(1).noise
    x_t, z = noise((1, 4, 8, 8)), noise((1, 4, 8, 8))
    a_t, a_0 = policy.backbone.path.alphas_cumprod[1], policy.backbone.path.alphas_cumprod[0]
    with policy.reference():
        predicted = policy.predict(x_t, torch.tensor([1]), batch.cond)
    std = ((1 - a_0) / (1 - a_t) * (1 - a_t / a_0)).sqrt()
    x_0 = (x_t - (1 - a_t).sqrt() * predicted) / a_t.sqrt()
    expected = a_0.sqrt() * x_0 + (1 - a_0 - std**2).sqrt() * predicted + std * z
    torch.testing.assert_close(opponent, expected)


# ---------------------------------------------------------------- the adapter


@pytest.mark.parametrize("rank", [1, 3])
def test_rank_is_the_inner_width_of_every_factor_and_alpha_equals_it(new_policy, rank):
    policy = new_policy(rank=rank)
    shapes = {name: tuple(w.shape) for name, w in policy.denoiser.named_parameters() if "lora_" in name}
    assert {shape[0] for name, shape in shapes.items() if "lora_A" in name} == {rank}
    assert {shape[1] for name, shape in shapes.items() if "lora_B" in name} == {rank}
    scales = {m.scaling["default"] for m in policy.denoiser.modules() if hasattr(m, "scaling")}
    assert scales == {1.0}


@pytest.mark.parametrize(
    ("targets", "modules"), [("attention", {"to_q", "to_k", "to_v", "0"}), (["to_q"], {"to_q"}), (["to_out.0"], {"0"})]
)
def test_targets_are_the_modules_with_an_adapter(new_policy, targets, modules):
    policy = new_policy(targets=Lora(rank=2, targets=targets).targets)
    names = [name.split(".lora_A")[0] for name, _ in policy.denoiser.named_parameters() if ".lora_A" in name]
    assert {name.rpartition(".")[2] for name in names} == modules
    assert all("attn" in name for name in names)


def test_the_least_noised_timestep_is_the_schedules_first(policy):
    """The path reads alphas_cumprod at t itself: 0.99915 at 0 of Stable Diffusion's schedule, 1 - 0.00085."""
    a = policy.backbone.path.level(torch.tensor([0, 999]), torch.zeros(2, 1, 1, 1)).alpha2.flatten()
    assert a.tolist() == pytest.approx([1 - 0.00085, 0.00466], abs=1e-5)
