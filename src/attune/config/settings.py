"""Settings that several plug-ins share: the base model, sampling, training, scorers and sources of data.

A method, scorer or data source brings its own `Config`, which extends one of these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from attune.config.schema import Float, StrictModel

Commit = Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
"""A Hub commit, in full: a branch or a tag can be moved, and then a score cannot be repeated."""

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""What a file must hash to."""

B = TypeVar("B", bound=StrictModel)


def require_revision(block: B, pins: Mapping[str, str]) -> B:
    """The block, once every Hub address in it names its commit.

    Args:
        pins: field that says where weights are -> field that pins them.

    Raises:
        ValidationError: at each field with a Hub address but no commit.
    """
    unpinned = [
        InitErrorDetails(
            type=PydanticCustomError("unpinned", f"not here, and one on the Hub needs its commit in {pin}"),
            loc=(place,),
            input=getattr(block, place),
        )
        for place, pin in pins.items()
        if getattr(block, pin) is None and is_hub_address(getattr(block, place))
    ]
    if unpinned:
        raise ValidationError.from_exception_data(type(block).__name__, unpinned)
    return block


def is_hub_address(path: str | None) -> bool:
    """Whether a path is a model or a file on the Hub: `owner/name` or `hf://owner/name/file`."""
    return path is not None and (path.startswith("hf://") or is_hub_id(path))


def is_hub_id(path: str) -> bool:
    """Whether a path is `owner/name` on the Hub and not a local folder."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and not Path(path).exists()


class Model(StrictModel):
    """The base model every method starts from."""

    backbone: str = Field(description="file in attune/backbones")
    path: str = Field(description="local folder or hub id, diffusers layout")
    revision: Commit | None = Field(None, description="of path; required for a hub id")
    variant: str | None = Field(None, description="which files of a hub model, say fp16; null = the plain ones")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the frozen networks")
    resolution: int | None = Field(None, ge=8, description="pixels, square; null = what the model was trained at")
    vae: str | None = Field(None, description="another autoencoder, say madebyollin/sdxl-vae-fp16-fix")
    vae_revision: Commit | None = Field(None, description="of vae")
    vae_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="float16 paints black squares with the autoencoder that SDXL comes with"
    )

    @model_validator(mode="after")
    def _is_pinned(self) -> Model:
        return require_revision(self, {"path": "revision", "vae": "vae_revision"})


class Sampling(StrictModel):
    """How images are drawn from a model: DDIM."""

    steps: int = Field(ge=1, le=999)
    eta: Float = Field(ge=0, le=1, description="0 deterministic, 1 ancestral")
    guidance_scale: Float = Field(ge=0, description="classifier-free guidance w, 1 = off")
    batch_size: int = Field(ge=1, description="images at a time; changes speed and memory only")


class Lora(StrictModel):
    """The adapter that is trained; alpha equals rank, so the file needs no metadata to be read right."""

    rank: int = Field(ge=1)
    targets: Literal["attention", "all"] | list[str] = Field(
        "attention",
        description="attention: the projections of every attention; all: every Linear and Conv2d but conv_in and "
        "conv_out; a list: endings of module names",
    )


class TrainingConfig(StrictModel):
    """What every trained thing decides for the one loop. Method configs extend it with their own fields."""

    lr: Float = Field(gt=0)
    batches: int = Field(ge=1, description="batches from the loader; for online methods, rollouts")
    batch_size: int = Field(ge=1, description="pairs or prompts per batch")
    accumulation: int = Field(1, ge=1, description="minibatches per optimizer step")
    warmup: int = Field(0, ge=0, description="optimizer steps of linear warm-up")
    weight_decay: Float = Field(1e-2, ge=0)
    max_grad_norm: Float | None = Field(1.0, gt=0, description="null = no clipping; grad_norm is logged regardless")
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    schedule: Literal["constant", "linear"] = Field(
        "constant", description="after warm-up; linear: down to 0 over the remaining batches"
    )
    gradient_checkpointing: bool = Field(False, description="saves memory: activations are computed twice")
    compile: bool = Field(False, description="torch.compile: minutes at the start, faster from then on")

    @field_validator("optimizer")
    @classmethod
    def _installed(cls, optimizer: str) -> str:
        if optimizer == "adamw8bit" and find_spec("bitsandbytes") is None:
            raise ValueError("adamw8bit needs the package bitsandbytes, which is not installed")
        return optimizer


class Validation(StrictModel):
    """A score taken while a method trains, of images of validation prompts."""

    scorer: str = Field(description="a name in scorers; one the method does not train on tells more")
    prompts: int = Field(ge=2, description="validation prompts, one image each")
    sampling: Sampling = Field(description="how they are painted: its own, so that all it depends on is in the block")
    every: int = Field(ge=1, description="batches from one score to the next")
    at_start_and_end: bool = Field(True, description="a score before training and one after the last batch, too")
    patience: int | None = Field(
        None, ge=1, description="stop after so many scores without a new best, and keep the best; null = go on"
    )


class MethodConfig(TrainingConfig):
    """What every method decides about the policy it trains."""

    lora: Lora | None = Field(description="null = full fine-tuning: every weight of the denoiser, in float32")
    start: str | None = Field(
        None,
        pattern="^[^@]+(@[0-9a-f]{40})?$",
        description="an adapter, or whole denoiser, to go on from, which is then the reference as well: a file or "
        "folder, say models/spin_1, or a hub id with @commit; null = the base model",
    )
    validation: Validation | None = Field(
        None, description="watch a scorer while training, and stop early; null = do not"
    )

    @property
    def trained_on(self) -> tuple[str, ...]:
        """Scorers of the profile that the loss optimises, or that label its data: gains by them are not held out."""
        return ()


class AIFeedback(StrictModel):
    """A scorer's opinion of the clean images as labels, beside people's or instead of them."""

    scorer: str = Field(description="a name in data.score_with")
    weight: Float = Field(1.0, ge=0, le=1, description="1 = the scorer alone, 0 = people alone")
    threshold: Float | None = Field(
        None,
        ge=0,
        lt=1,
        description="hard labels: sure if its two probabilities differ by more, else a tie; null = its probabilities",
    )
    temperature: Float = Field(1.0, gt=0, description="score difference counted as 1; PickScore 1, cosines about 0.01")


class PreferenceConfig(TrainingConfig):
    """Training of the step-aware preference model."""

    clip: str = Field(description="CLIP to start from, folder or Hub id; the paper's is yuvalkirstain/PickScore_v1")
    revision: Commit | None = Field(None, description="Hub commit of the CLIP; null for a local folder")
    tokenizer: str | None = Field(
        None, description="folder or Hub id if not `clip`; the paper's is laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    )
    tokenizer_revision: Commit | None = Field(None, description="Hub commit of the tokenizer")
    weights: str | None = Field(
        None,
        description="trained step-aware weights to go on from, .bin or .safetensors in the released layout: a file "
        "or hf://owner/repository/file; with `batches: 0` they are used as they are",
    )
    weights_revision: Commit | None = Field(None, description="Hub commit of the weights; null for a local file")
    batches: int = Field(ge=0, description="batches of pairs; 0 = do not train")
    step_aware: bool = Field(True, description="false: the timestep stays unknown, which is the paper's ablation")
    ai_feedback: AIFeedback | None = Field(
        None,
        description="null = people's labels alone, as for SD 1.5 in the paper; its SDXL model uses PickScore's alone",
    )
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the forward pass; weights are float32")
    guidance_scale: Float = Field(5.0, ge=0, description="of the one-step predictions; 1 = off. Paper: 5")

    @model_validator(mode="after")
    def _is_pinned(self) -> PreferenceConfig:
        return require_revision(
            self, {"clip": "revision", "tokenizer": "tokenizer_revision", "weights": "weights_revision"}
        )


Preprocess = Annotated[
    Literal["pil", "tensor", "square"],
    Field(description="pil: as published, no gradient; tensor: the same, differentiable; square: AlignProp's"),
]
"""How a scorer that is a plain CLIP is shown images: a key of `clip.PREPARATIONS`."""


class ScorerConfig(StrictModel):
    """What every scorer's block has in common.

    A field `x` with an `x_revision` beside it (`path` with `revision`) says where weights are: a local file or
    folder, or a Hub address, which must be pinned to a commit. A file may be pinned by `x_sha256` as well. All
    other fields change scores, so they are part of the scorer's identity.
    """

    expected_mean: list[Float] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="a mean score outside is an error; null = what is known of the published weights",
    )

    @classmethod
    def _pins(cls) -> dict[str, str]:
        """Location -> the field that pins it to a commit."""
        revisions = [name for name in cls.model_fields if name.endswith("revision")]
        return {name.removesuffix("revision").removesuffix("_") or "path": name for name in revisions}

    def locations(self) -> dict[str, tuple[str, str | None]]:
        """Location -> (where its weights are, Hub commit), of those that are set."""
        places = {field: (getattr(self, field), getattr(self, pin)) for field, pin in self._pins().items()}
        return {field: place for field, place in places.items() if place[0] is not None}

    def settings(self) -> dict[str, Any]:
        """The fields that change scores, whatever the weights are."""
        pins = self._pins()
        beside = {"expected_mean", "license", *pins, *pins.values()}
        return {name: value for name, value in self if name not in beside and not name.endswith("sha256")}

    def sane_mean(self, published: Mapping[str, Sequence[float]]) -> tuple[float, float] | None:
        """The interval a mean score must lie in: `expected_mean`, or what is known of published weights.

        Args:
            published: name of a published folder, repository or file, without ending -> interval.
        """
        known = (published.get(Path(place).stem) for place, _ in self.locations().values())
        interval = self.expected_mean or next(filter(None, known), None)
        return (float(interval[0]), float(interval[1])) if interval else None

    @model_validator(mode="after")
    def _is_pinned(self) -> ScorerConfig:
        return require_revision(self, self._pins())


class SourceConfig(StrictModel):
    """What every data source decides. Source configs extend it with their own fields."""

    score_with: list[str] = Field([], description="scorers whose scores of both images become columns of the pairs")


class PairFilesConfig(SourceConfig):
    """What every source of labelled pairs in files decides."""

    path: str = Field(description="where the data set is")
    pairs: int | None = Field(None, ge=1, description="training pairs wanted; null = all there are")
    held_out_pairs: int = Field(500, ge=1, description="validation pairs wanted, and as many test pairs")
    validation_share: Float = Field(0.05, ge=0, le=0.5, description="of the prompts, where the data set has no split")
    test_share: Float = Field(0.05, ge=0, le=0.5, description="of the prompts, where the data set has no split")
    test_list: str | None = Field(None, description="a prompt list, .txt .json or .jsonl, for the test split")
    min_side: int = Field(1, ge=1, description="pixels; images with a shorter side are quarantined")
    max_bad_share: Float = Field(0.2, ge=0, le=1, description="a larger share of quarantined rows stops the stage")
