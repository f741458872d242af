"""Validation scores and sample images that several processes compute together, and how an error of one ends all."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from attune.config.settings import Sampling
from attune.diffusion.generate import NonFiniteImageError
from attune.distributed import Shard
from attune.finetune import validation_scores
from attune.interfaces import Conditioning
from attune.tracking.samples import sampler
from attune.training.early_stopping import EarlyStopping
from attune.training.progress import Progress
from forked import together
from trainables import every_weight

PROMPTS = ["a cat", "a dog", "two owls", "a red ox", "bees", "no hen", "ten rats"]
SAMPLING = Sampling(steps=2, eta=1.0, guidance_scale=2.0, batch_size=2)


def score(images, prompts):
    """Of the image and of its own prompt."""
    return images.mean((1, 2, 3)) + torch.tensor([len(prompt) for prompt in prompts])


@pytest.mark.parametrize("n", [1, 2, 4, 5, 7])
def test_each_row_is_computed_once_and_all_compute_equally_often(tmp_path, n):
    """Two at a time in each of two processes, so in equally many batches; an idle one computes a row for nothing."""

    def work(shard):
        asked = []

        def compute(rows):
            asked.extend(rows)
            return torch.tensor(rows) ** 2

        return shard.map_rows(n, 2, compute).tolist(), asked

    (first, by_first), (second, by_second) = together(2, tmp_path, work)
    assert first == second == [i**2 for i in range(n)]
    assert -(-len(by_first) // 2) == -(-len(by_second) // 2) == -(-n // 4)
    batches = [rows[start : start + 2] for rows in (by_first, by_second) for start in range(0, len(rows), 2)]
    assert all([i, i + 1] in batches for i in range(0, n // 4 * 4, 2))
    assert set(by_first + by_second) == set(range(n))


@pytest.mark.parametrize("sharded", [False, True])
def test_scores_of_two_processes_are_those_of_one(new_policy, tmp_path, sharded):
    """To the bit where a batch holds the prompts that it holds in one process: here the first four of seven.

    The last three are batches of two and of one in one process, and of one and of two in two.
    """

    def scores(policy):
        return validation_scores(policy, SAMPLING, 3, score, PROMPTS)

    expected = scores(every_weight(new_policy(adapter=False), Shard()))

    def work(shard):
        return scores(every_weight(new_policy(adapter=False), replace(shard, sharded_weights=sharded)))

    for found in together(2, tmp_path, work):
        assert np.array_equal(found[:4], expected[:4])
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_grid_of_two_processes_is_that_of_one_and_the_main_one_logs_it(new_policy, tmp_path):
    def shown(policy):
        images = []
        run = SimpleNamespace(image=lambda key, image, step: images.append(np.asarray(image)))
        sampler(policy, PROMPTS[:4], SAMPLING, 3, run)(5)
        return images

    (expected,) = shown(every_weight(new_policy(adapter=False), Shard(), moved=0.2))
    first, second = together(
        2,
        tmp_path,
        lambda shard: shown(every_weight(new_policy(adapter=False), replace(shard, sharded_weights=True), moved=0.2)),
    )
    assert second == []
    assert np.array_equal(first[0], expected)


def test_an_image_that_is_none_in_one_process_ends_all_and_names_its_prompt(new_policy, tmp_path):
    """The last prompt is the second process's."""

    def work(shard):
        policy = every_weight(new_policy(adapter=False), replace(shard, sharded_weights=True))
        encode = policy.backbone.encode_prompts

        def encoded(prompts):
            spoilt = torch.tensor([torch.nan if prompt == "bees" else 1.0 for prompt in prompts])
            return Conditioning({name: x * spoilt[:, None, None] for name, x in encode(prompts).tensors.items()})

        policy.backbone.encode_prompts = encoded
        with pytest.raises((NonFiniteImageError, RuntimeError)) as error:
            validation_scores(policy, SAMPLING, 3, score, ["a cat", "a dog", "two owls", "bees"])
        return type(error.value).__name__, str(error.value)

    (first, said), (second, by_itself) = together(2, tmp_path, work)
    assert (first, second) == ("EndedElsewhereError", "NonFiniteImageError")
    assert "prompt 'bees'" in by_itself
    assert said == f"process 1 has ended the work: NonFiniteImageError: {by_itself}"


def test_a_score_is_one_for_all_though_it_should_round_apart(tmp_path):
    def work(shard):
        progress = Progress()
        EarlyStopping(lambda: 0.5 + shard.rank, every=1).evaluate(progress, [], shard, lambda *told: None)
        return progress.scores[0]["score"]

    assert together(2, tmp_path, work) == [0.5, 0.5]
