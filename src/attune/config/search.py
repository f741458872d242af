"""The block `search.<run>` of a profile: which settings are searched, by which scorer, for how long."""

from __future__ import annotations

from math import prod
from typing import Any, ClassVar, Literal
from urllib.parse import unquote

from pydantic import Field, field_validator, model_validator

from attune.config.schema import Float, SearchRange, StrictModel
from attune.text import has_secret

MOST_POINTS = 100_000  # of a grid; each is a training


class Config(StrictModel):
    HIDDEN: ClassVar[str] = "an address with a password"

    space: dict[str, SearchRange] = Field(
        min_length=1, description="key of the method's block, say lora.rank -> values"
    )
    objectives: list[str] = Field(
        min_length=1, max_length=2, description="scorers to maximize: one, or two with a Pareto front"
    )
    prompts: int = Field(ge=2, description="validation prompts, one image each, that a trial is scored on")
    sampler: Literal["tpe", "gp", "grid", "nsgaii"] = Field(
        "tpe", description="tpe, gp: learn from the trials so far; grid: every combination once; nsgaii: two objectives"
    )
    pruner: Literal["none", "median", "hyperband", "wilcoxon"] = Field(
        "none",
        description="what stops a poor trial: median and hyperband while it trains, by its validation score; wilcoxon "
        "while its prompts are scored, by the best trial's scores of the same prompts",
    )
    every: int | None = Field(
        None, ge=1, description="batches between validation scores, for a pruner; null = a quarter of the training"
    )
    trials: int | None = Field(
        None, ge=1, description="how many in all, over all sessions and hosts; null = a whole grid"
    )
    minutes: Float | None = Field(None, gt=0, description="after which this session starts no trial; null = no limit")
    workers: int | None = Field(None, ge=1, le=1024, description="processes on this host; null = one per GPU, or one")
    storage: str | None = Field(
        None,
        pattern=r"^(sqlite:///|postgresql\+psycopg://).+",
        description="sqlite:///file, or postgresql+psycopg://... for several hosts; null = a file in .checkpoints",
    )
    finalists: int = Field(
        0,
        ge=0,
        description="how many of the best trials are trained again at full length, without `fixed`, beside the "
        "settings in use when the search began; the best of these is the result; 0 = none",
    )
    fixed: dict[str, Any] = Field({}, description="other settings of the method's block for trials, to make them short")

    @model_validator(mode="before")
    @classmethod
    def _hide_password(cls, values: Any) -> Any:
        """Replaces an address with `user:password@` or `password=` before validation, as errors quote their input."""
        storage = values.get("storage") if isinstance(values, dict) else None
        if not isinstance(storage, str):
            return values
        user = (storage.partition("://")[2] or storage).rpartition("@")[0]
        has_one = ":" in user or has_secret(unquote(storage))
        return {**values, "storage": cls.HIDDEN} if has_one else values

    @field_validator("storage", mode="before")
    @classmethod
    def _holds_no_password(cls, storage: Any) -> Any:
        if storage == cls.HIDDEN:
            raise ValueError(
                "a password does not belong here: put it in PGPASSWORD or ~/.pgpass, or set ATTUNE_STORAGE"
            )
        return storage

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if len(self.objectives) == 2 and self.pruner != "none":
            raise ValueError("pruner: with two objectives no trial is clearly worse; must be none")
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError("objectives: the same scorer twice")
        if self.sampler == "nsgaii" and len(self.objectives) < 2:
            raise ValueError("sampler: nsgaii needs two objectives")
        if self.sampler == "grid" and any(dimension.choices is None for dimension in self.space.values()):
            raise ValueError("sampler: a grid needs choices for every key of space")
        points = prod(len(dimension.choices or [None]) for dimension in self.space.values())
        if self.sampler == "grid" and points > MOST_POINTS:
            raise ValueError(f"space: a grid of {points:,} points; at most {MOST_POINTS:,}, so give fewer choices")
        if self.sampler != "grid" and self.trials is None:
            raise ValueError("trials: how many? only a grid ends by itself")
        if self.finalists and not self.fixed:
            raise ValueError("finalists: without fixed, all trials are at full length already; must be 0")
        if twice := self.space.keys() & self.fixed.keys():
            raise ValueError(f"fixed.{min(twice)}: it is searched")
        return self
