"""Data source `world`: prompts of the embedded grammar, images of the base model, choices of a simulated human.

The human's choices follow Bradley-Terry on the oracle's score (Bradley and Terry 1952), so labels are as
noisy as people are; the noise-free scores are kept beside them as `utility_0` and `utility_1`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, ValidationInfo, field_validator

from attune.config.schema import Float
from attune.config.sources import SourceConfig
from attune.data.rows import ImageGenerator, Pair, Prompt, Quota, SourceError
from attune.world.grammar import KINDS, all_scenes

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

GIVES = ("prompts", "pairs")
FREE_PROMPTS = False


class Config(SourceConfig):
    train_prompts: int = Field(ge=1, description="training prompts; kinds in equal parts")
    validation_prompts: int = Field(ge=1, description="prompts for early stopping and searches")
    test_prompts: int = Field(ge=2, description="prompts for the report, asked nowhere else")
    pair_prompts: int = Field(ge=1, description="training prompts that get pairs")
    images_per_prompt: int = Field(ge=2, description="m images of a prompt make m (m - 1) / 2 pairs")
    temperature: Float = Field(gt=0, description="Bradley-Terry temperature, in oracle score")

    @field_validator("pair_prompts")
    @classmethod
    def _of_train_prompts(cls, value: int, info: ValidationInfo) -> int:
        if value > info.data.get("train_prompts", value):
            raise ValueError(f"more than train_prompts, {info.data['train_prompts']}")
        return value


def recognises(path: Path) -> bool:
    """Nothing: its images are generated."""
    return False


def read(config: Config, seed: int, generate_images: ImageGenerator, quota: Quota) -> Iterator[Prompt | Pair]:
    """Prompts of all three splits, then labelled pairs for training and validation.

    Raises:
        SourceError: the grammar has fewer prompts than wanted.
    """
    import numpy as np
    import pandas as pd

    from attune.world import oracle

    rng = np.random.default_rng(seed)
    sizes = _prompts_per_split(config).items()
    prompts = pd.concat([draw_prompts(split, n, rng) for split, n in sizes], ignore_index=True)
    in_pairs = pd.concat(
        [prompts[prompts.split == "train"].head(config.pair_prompts), prompts[prompts.split == "validation"]]
    )
    yield from (Prompt(row.prompt, row.split, "world", row.Index) for row in prompts.itertuples())
    repeated = in_pairs.prompt.repeat(config.images_per_prompt).tolist()
    images = generate_images(repeated, list(range(config.images_per_prompt)) * len(in_pairs), "preference pairs")
    utility = oracle.scores(images.astype(np.float32) / 255, repeated).reshape(len(in_pairs), -1)
    pairs = label_pairs(in_pairs.prompt.tolist(), utility, config.temperature, rng)
    splits = dict(zip(in_pairs.prompt, in_pairs.split, strict=True))
    for row in pairs.itertuples():
        yield Pair(
            prompt=row.prompt,
            image_0=images[row.image_0],
            image_1=images[row.image_1],
            label_0=row.label_0,
            label_1=1 - row.label_0,
            split=splits[row.prompt],
            file="world",
            row=row.Index,
            extra={"utility_0": row.utility_0, "utility_1": row.utility_1},
        )


def needs_files(config: Config) -> list[Path]:
    """None: the data are generated."""
    return []


def split_sizes(config: Config) -> dict[str, int]:
    """All of them, exactly but for two generated images that come out the same.

    Raises:
        SourceError: the grammar has fewer prompts than wanted.
    """
    prompts = _prompts_per_split(config)
    for split, n in prompts.items():
        _check_grammar_has(n, split, sum(scene.split == split for scene in all_scenes()))
    pairs_per_prompt = config.images_per_prompt * (config.images_per_prompt - 1) // 2
    pairs = {"train": config.pair_prompts, "validation": config.validation_prompts, "test": 0}
    sizes = {f"prompts/{split}": n for split, n in prompts.items()}
    sizes |= {f"pairs/{split}": n * pairs_per_prompt for split, n in pairs.items()}
    return sizes | {"choices/train": sizes["pairs/train"]}  # the simulated human knows no tie


def listed_prompts(config: Config) -> None:
    """None: they are drawn from the grammar, so there is nothing to check."""
    return None


def _prompts_per_split(config: Config) -> dict[str, int]:
    return {"train": config.train_prompts, "validation": config.validation_prompts, "test": config.test_prompts}


def _check_grammar_has(n: int, split: str, available: int) -> None:
    if n > available:
        raise SourceError(f"data.{split}_prompts: {n} wanted, the grammar has {available}")


def draw_prompts(split: str, n: int, rng: np.random.Generator) -> pd.DataFrame:
    """n distinct prompts of a split, kinds in turn so that every head of the table is balanced too.

    Raises:
        SourceError: the grammar has fewer prompts in that split.
    """
    import pandas as pd

    pools = [[s.prompt for s in all_scenes() if s.split == split and s.kind == kind] for kind in KINDS]
    pools = [list(rng.permutation(pool)) for pool in pools]
    _check_grammar_has(n, split, sum(map(len, pools)))
    sampled: list[str] = []
    while len(sampled) < n:
        sampled += [str(pool.pop()) for pool in pools if pool]
    return pd.DataFrame({"prompt": sampled[:n], "split": split})


def label_pairs(prompts: list[str], utility: np.ndarray, temperature: float, rng: np.random.Generator) -> pd.DataFrame:
    """All pairs of each prompt's m images, (P, m) utilities, with a noisy choice each."""
    import numpy as np
    import pandas as pd

    m = utility.shape[1]
    first, second = np.triu_indices(m, k=1)
    rows = np.repeat(np.arange(len(prompts)), len(first))
    i, j = np.tile(first, len(prompts)), np.tile(second, len(prompts))
    u_0, u_1 = utility[rows, i], utility[rows, j]
    prefers_0 = rng.random(len(rows)) < 1 / (1 + np.exp(-(u_0 - u_1) / temperature))
    return pd.DataFrame(
        {
            "prompt": np.array(prompts)[rows],
            "image_0": rows * m + i,
            "image_1": rows * m + j,
            "label_0": prefers_0.astype(float),
            "utility_0": u_0,
            "utility_1": u_1,
        }
    )
