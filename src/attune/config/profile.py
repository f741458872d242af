"""All of params.yaml: what a profile decides, what `dvc repro` trains and compares.

What plug-ins build their blocks from is in `attune.config.schema`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from attune.config.schema import StrictModel
from attune.config.settings import Model, Sampling


class Generate(StrictModel):
    """Held-out images: the same prompts and the same noise for every model."""

    prompts: int = Field(ge=2)
    images_per_prompt: int = Field(1, ge=1)
    sampling: Sampling


class Profile(StrictModel):
    """Everything one run decides."""

    seed: int = Field(ge=0)
    threads: int = Field(1, ge=1, description="CPU threads; two on busy cores are far slower than one")
    model: Model
    sampling: Sampling = Field(description="how training pairs are painted")
    data: Mapping[str, Any]
    preference: Mapping[str, Any]
    methods: Mapping[str, Any]
    generate: Generate
    scorers: Mapping[str, Any]
    search: Mapping[str, Any] = Field({}, description="a run -> how its settings are searched")


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
"""A name that becomes a folder's."""

RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w-]*$")]
"""A `Name` that may also stand in DVC's dotted keys."""

Place = Annotated[str, Field(pattern=r"^[\w.][\w./@+-]*$")]
"""A path or hub id that may stand in a command line."""


class Run(StrictModel):
    """One training of `dvc repro`."""

    method: str = Field(description="file in attune/methods")
    needs: Place = Field(description="what it stands on besides base and pairs: models/preference, or where it starts")
    code: Place | None = Field(None, description="code only it stands on; DVC knows no defaults, so always say one")
    reads: str | None = Field(None, description="section of the profile only it reads; so as well")


class Evaluate(StrictModel):
    """What is compared besides base and our own methods."""

    extra: Mapping[Name, Place] = Field(description="name to a LoRA file, a folder, or owner/name[/file]@revision")


class Params(StrictModel):
    """All of params.yaml."""

    profile: str
    run_methods: Mapping[RunName, Run]
    evaluate: Evaluate
    tracking: str | None
    profiles: Mapping[str, Any]
