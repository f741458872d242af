"""params.yaml and params/<profile>.yaml as they are written: which runs there are, and what a profile decides.

`attune.config.resolve` reads them and checks the blocks of plug-ins.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Annotated, Any

from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from attune.config.schema import Float, StrictModel
from attune.config.settings import Location, Model, Sampling, Seed

BASE = "base"
"""The run that every other is compared with: the base model as it is."""

DATA, PREFERENCE = "data", "preference"
"""What a run may come after, besides another run: the prepared data, the step-aware preference model."""

RunName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", max_length=100)]
"""It becomes the name of a folder and of a DVC stage."""

ScorerName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", max_length=100)]
"""It becomes the name of a column; a dot separates a scorer from a part of its score."""


STORES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")
"""Kinds of MLflow's stores. A folder (`file:`) is none: MLflow has given it up."""


def _store(uri: str | None) -> str | None:
    scheme = (uri or "").partition("://")[0].partition("+")[0]
    if uri in (None, "default") or ("://" in uri and scheme in STORES):
        return uri
    raise ValueError(f"must be default, null, or begin with one of {', '.join(f'{name}://' for name in STORES)}")


Store = Annotated[str | None, AfterValidator(_store)]


class Tracking(StrictModel):
    """Where runs are tracked, if in more than MLflow."""

    mlflow: Store = Field("default", description="as `tracking` itself, where that is no block")
    tensorboard: bool = Field(False, description="event files in .checkpoints/tensorboard, too")
    wandb: str | None = Field(
        None, min_length=1, max_length=128, description="a project of Weights & Biases, too; null: none"
    )

    @field_validator("tensorboard", "wandb")
    @classmethod
    def _installed(cls, value: bool | str | None, info: ValidationInfo) -> bool | str | None:
        if value and find_spec(str(info.field_name)) is None:
            raise ValueError(f"the package {info.field_name} is not installed: pip install {info.field_name}")
        return value

    @property
    def tools(self) -> dict[str, bool | str]:
        """What is wanted besides MLflow."""
        return {name: value for name, value in (("tensorboard", self.tensorboard), ("wandb", self.wandb)) if value}


def _kind(tracking: Any) -> str:
    return "block" if isinstance(tracking, Mapping | Tracking) else "store"


StoreOrBlock = Annotated[Annotated[Store, Tag("store")] | Annotated[Tracking, Tag("block")], Discriminator(_kind)]
"""A mistake in the one is not told as one in the other, too."""


class Run(StrictModel):
    """Whatever gives a model: trained here, the base as it is, or released by somebody."""

    method: str | None = Field(None, description="trained here: a file of attune/methods")
    released: Location | None = Field(
        None,
        alias="from",
        description="released by somebody: a LoRA file, a denoiser or a pipeline, here or owner/name[/file]@commit",
    )
    trained_on: list[ScorerName] = Field([], description="scorers that a released model was trained on")
    after: RunName = Field(
        description="what is made before it: `data`; `preference`, the preference model; or a run, whose model is then "
        "what the training starts from and its reference"
    )

    @model_validator(mode="after")
    def _is_one_of_three(self) -> Run:
        if self.method is not None and self.released is not None:
            raise ValueError("either method, for a model trained here, or from, for a released one")
        if self.trained_on and self.released is None:
            raise ValueError("trained_on: of a model trained here it is worked out; say it of a released one (from)")
        return self


class Generate(StrictModel):
    """Images of test prompts: the same prompts and the same noise for every model."""

    prompts: int = Field(ge=2, description="test prompts")
    images_per_prompt: int = Field(1, ge=1, description="images of each prompt")
    sampling: Sampling = Field(description="how they are sampled; previews and trials of a search use it too")


class Params(StrictModel):
    """params.yaml."""

    profile: str = Field(pattern=r"^[A-Za-z0-9][\w-]*$", max_length=100, description="file of params/, without .yaml")
    runs: Mapping[RunName, Run] = Field(min_length=1, description="the models that are made and compared, by name")
    tracking: StoreOrBlock = Field(
        description="default: mlflow.db in the repository's root, or $MLFLOW_TRACKING_URI; an MLflow URI; null: none; "
        "or a block, for TensorBoard and Weights & Biases beside MLflow"
    )

    @property
    def tracked(self) -> Tracking:
        """`tracking` as a block."""
        return self.tracking if isinstance(self.tracking, Tracking) else Tracking(mlflow=self.tracking)


class Profile(StrictModel):
    """params/<profile>.yaml: what is decided for one base model. Blocks of plug-ins are checked by their own Config."""

    seed: Seed = Field(description="the one seed; all others follow from it")
    threads: int = Field(1, ge=1, le=4096, description="CPU threads; two on busy cores can be far slower than one")
    checkpoint_seconds: Float = Field(
        60, ge=0, description="from one checkpoint of a training to the next; more, where saving takes long"
    )
    allow_cpu: bool = Field(False, description="train a base model of SD 1.5's size or larger without a GPU")
    model: Model = Field(description="the base model")
    sampling: Sampling = Field(description="how images of training pairs are sampled, by sources that generate them")
    data: Mapping[str, Any] = Field(description="`source`: a file of attune/data/sources, and its settings")
    preference: Mapping[str, Any] | None = Field(None, description="the step-aware preference model; null: none")
    methods: Mapping[RunName, Mapping[str, Any]] = Field(
        {}, description="a run -> settings of its method that differ from the paper's"
    )
    generate: Generate = Field(description="the images of test prompts that runs are compared by")
    scorers: Mapping[ScorerName, Mapping[str, Any]] = Field(
        min_length=1, description="a name -> `scorer`, a file of attune/rewards (the name, if absent), and its settings"
    )
    search: Mapping[RunName, Mapping[str, Any]] = Field({}, description="a run -> how its settings are searched")
