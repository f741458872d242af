"""Settings that sources of data share; each brings its own `Config`, which extends one of these."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from attune.config.schema import Float, StrictModel
from attune.config.settings import possible_path


class SourceConfig(StrictModel):
    """What every data source decides. Source configs extend it with their own fields."""

    score_with: list[str] = Field([], description="scorers whose scores of both images become columns of the pairs")
    license: str | None = Field(None, max_length=200, description="of the data, for model cards; changes no result")

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
