"""Settings that sources of data share; each brings its own `Config`, which extends one of these."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from attune.config.schema import Float, StrictModel
from attune.config.settings import possible_path


class Consensus(StrictModel):
    """Which training pairs are kept: those whose choice scorers agree with.

    Source: the choice of Semi-DPO (ICLR 2026), for which five scorers agree with people on a fifth of Pick-a-Pic v2.
    """

    scorers: list[str] = Field(min_length=1, description="names in score_with; a run on these pairs is trained on them")
    keep: Literal["all", "majority"] = Field(
        "all", description="how many of them must prefer the chosen image: all, or more than half"
    )


class SourceConfig(StrictModel):
    """What every data source decides. Source configs extend it with their own fields."""

    score_with: list[str] = Field([], description="scorers whose scores of both images become columns of the pairs")
    consensus: Consensus | None = Field(
        None, description="keep only training pairs whose choice these scorers agree with; null = all"
    )
    license: str | None = Field(None, max_length=200, description="of the data, for model cards; changes no result")

    @model_validator(mode="after")
    def _consensus_is_scored(self) -> SourceConfig:
        names = self.consensus.scorers if self.consensus else []
        if missing := [name for name in names if name not in self.score_with]:
            raise ValueError(f"consensus.scorers: {missing[0]!r} must be in score_with, so add it there")
        if len(set(names)) < len(names):
            raise ValueError(f"consensus.scorers: {names} names a scorer twice, whose opinion would count twice")
        return self

    @field_validator("path", "test_list", "validation_list", check_fields=False)
    @classmethod
    def _may_be_a_path(cls, path: str | None) -> str | None:
        return None if path is None else possible_path(path)


VALIDATION_PROMPTS: Any = Field(
    None, ge=0, description="at least so many prompts, taken first; null = what searches and early stopping ask for"
)
TEST_PROMPTS: Any = Field(None, ge=0, description="at least so many prompts, taken first; null = generate.prompts")
"""Fields of sources that know all their prompts before an image is opened; the plan replaces null by the number."""


class FilesConfig(SourceConfig):
    """What every source of labelled images in files decides."""

    path: str = Field(description="where the data set is")
    validation_share: Float = Field(0.05, ge=0, le=0.5, description="of the prompts, where the data set has no split")
    test_share: Float = Field(0.05, ge=0, le=0.5, description="of the prompts, where the data set has no split")
    test_list: str | None = Field(None, description="a prompt list, .txt .json or .jsonl, for the test split")
    min_side: int = Field(1, ge=1, description="pixels; images with a shorter side are quarantined")
    max_bad_share: Float = Field(0.2, ge=0, le=1, description="a larger share of quarantined rows stops the stage")


class PairFilesConfig(FilesConfig):
    """What every source of labelled pairs in files decides."""

    pairs: int | None = Field(None, ge=1, description="training pairs wanted; null = all there are")
    held_out_pairs: int = Field(500, ge=1, description="validation pairs wanted, and as many test pairs")
