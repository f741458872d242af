"""Settings that several plug-ins share: the base model, sampling, training and scorers; `config.sources` has data's.

A method or a scorer brings its own `Config`, which extends one of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, Field, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from attune.config.schema import Float, StrictModel
from attune.hub import Source, parse

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""What a file must hash to."""


def _location(text: str) -> str:
    try:
        parse(text)
    except (OSError, ValueError) as error:  # a path that the system refuses is said below
        if isinstance(error, ValueError):
            raise PydanticCustomError("location", "{reason}", {"reason": str(error)}) from None
    return possible_path(text)


def possible_path(text: str) -> str:
    """The text, if there may be a file of that name."""
    if not text.strip() or "\n" in text:
        raise ValueError("an empty path" if not text.strip() else "a path of two lines")
    try:
        Path(text).exists()
    except OSError as error:  # a part of it is longer than any name of a file
        raise ValueError(str(error.strerror)) from None
    return text


Location = Annotated[str, AfterValidator(_location)]
"""Where weights are: a local file or folder, or owner/name[/file]@commit on the Hub; see `attune.hub`."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]


def _has_bitsandbytes(value: str) -> str:
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"{value} needs the package bitsandbytes, which is not installed")
    return value


class Model(StrictModel):
    """The base model every method starts from."""

    backbone: str = Field(description="file in attune/backbones")
    path: Location = Field(description="a pipeline in diffusers' layout: folder, or owner/name@commit")
    variant: str | None = Field(None, description="which of its files, say fp16; null = the plain ones")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the frozen networks")
    resolution: int | None = Field(None, ge=8, le=65_536, description="pixels, square; null = as it was trained")
    vae: Location | None = Field(None, description="another autoencoder, say madebyollin/sdxl-vae-fp16-fix@commit")
    vae_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="float16 gives black images with the autoencoder that SDXL comes with"
    )
    lora_dtype: Literal["float32"] | None = Field(
        None,
        description="what adapters compute in; null = as `dtype`, like the authors' scripts. Their weights are float32",
    )
    channels_last: bool = Field(False, description="memory order of convolutions; other last bits, faster on many GPUs")
    quantize: Annotated[Literal["int8", "nf4"], AfterValidator(_has_bitsandbytes)] | None = Field(
        None, description="linear layers of the frozen denoiser in 8 or 4 bits, by bitsandbytes; for adapters alone"
    )
    max_sequence_length: int | None = Field(
        None, ge=1, le=512, description="tokens of a prompt that a T5 or an LLM reads; null = as diffusers' pipeline"
    )
    density: Literal["logit_normal", "uniform"] | None = Field(
        None,
        description="of the times that a flow model is trained at: logit_normal, then shifted (so null), or uniform "
        "over the scheduler's shifted table; of other models null",
    )
    t5: bool = Field(False, description="Stable Diffusion 3 with its third text encoder, 4.8 billion weights")
    offload: bool = Field(
        False,
        description="networks take turns on the GPU and wait in the host's memory: less GPU memory, more time; not "
        "while a method trains",
    )


class Sampling(StrictModel):
    """How images are drawn from a model: DDIM, whose step on a flow without noise is Euler's."""

    steps: int = Field(ge=1, le=999, description="denoising steps")
    eta: Float = Field(ge=0, le=1, description="0 deterministic, 1 ancestral")
    guidance_scale: Float = Field(ge=0, description="guidance w: classifier-free, 1 = off; FLUX is told it")
    batch_size: int = Field(ge=1, description="images at a time; changes speed and memory only")


class Lora(StrictModel):
    """The adapter that is trained; alpha equals rank, so the file needs no metadata to be read right."""

    rank: int = Field(ge=1, le=100_000, description="of the two factors of each weight's change")
    targets: Literal["attention", "all"] | list[str] = Field(
        "attention",
        description="attention: the projections of every attention; all: every Linear and Conv2d but the first "
        "and last; a list: endings of module names",
    )


class TrainingConfig(StrictModel):
    """What every trained thing decides for the one loop. Method configs extend it with their own fields."""

    lr: Float = Field(gt=0, description="learning rate")
    batches: int = Field(ge=1, description="batches from the loader; for online methods, rollouts")
    batch_size: int = Field(ge=1, description="pairs or prompts per batch")
    accumulation: int = Field(1, ge=1, description="minibatches per optimizer step")
    warmup: int = Field(0, ge=0, description="optimizer steps of linear warm-up")
    weight_decay: Float = Field(1e-2, ge=0, description="of AdamW, decoupled from the gradient")
    max_grad_norm: Float | None = Field(1.0, gt=0, description="null = no clipping; grad_norm is logged regardless")
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = Field(
        "adamw", description="adamw8bit and adafactor need less memory for their state"
    )
    schedule: Literal["constant", "linear"] = Field(
        "constant", description="after warm-up; linear: down to 0 over the remaining batches"
    )
    gradient_checkpointing: bool = Field(False, description="saves memory: activations are computed twice")
    compile: bool | Literal["reduce-overhead"] = Field(
        False,
        description="torch.compile: minutes at the start, faster from then on; reduce-overhead: with CUDA graphs too",
    )
    ema_decay: Float | None = Field(
        None,
        ge=0,
        lt=1,
        description="decay of a moving average of the trained weights (of a LoRA, of its two factors), which is then "
        "what is validated and saved; no more than (1 + n) / (10 + n) after optimizer step n; null = no average",
    )
    tf32: bool = Field(False, description="GPUs multiply float32 matrices in TF32, 10 bits of mantissa, but faster")

    @field_validator("optimizer")
    @classmethod
    def _installed(cls, optimizer: str) -> str:
        return _has_bitsandbytes(optimizer) if optimizer == "adamw8bit" else optimizer


class Validation(StrictModel):
    """A score taken while a method trains, of images of validation prompts."""

    scorer: str = Field(description="a name in scorers; one the method does not train on tells more")
    prompts: int = Field(ge=2, description="validation prompts, one image each")
    sampling: Sampling = Field(
        description="how images are sampled; here, so that the block holds all that the score depends on"
    )
    every: int = Field(ge=1, description="batches from one score to the next")
    at_start_and_end: bool = Field(True, description="a score before training and one after the last batch, too")
    patience: int | None = Field(
        None, ge=1, description="stop after so many scores without a new best, and keep the best; null = go on"
    )


class MethodConfig(TrainingConfig):
    """What every method decides about the policy it trains."""

    lora: Lora | None = Field(description="null = full fine-tuning: every weight of the denoiser, in float32")
    start: Location | None = Field(
        None,
        description="a released adapter or denoiser to go on from, which is then the reference as well; null = the "
        "base model, or the run that this one comes after",
    )
    validation: Validation | None = Field(
        None, description="watch a scorer while training, and stop early; null = do not"
    )

    @property
    def trained_on(self) -> tuple[str, ...]:
        """Scorers of the profile that the loss optimises or that label its data; they are not held out."""
        return ()


class AIFeedback(StrictModel):
    """Labels from a scorer of the clean images, mixed with people's or in their place."""

    scorer: str = Field(description="a name in data.score_with")
    weight: Float = Field(1.0, ge=0, le=1, description="1 = the scorer alone, 0 = people alone")
    threshold: Float | None = Field(
        None,
        ge=0,
        lt=1,
        description="hard labels: sure if its two probabilities differ by more, else a tie; null = its probabilities",
    )
    temperature: Float = Field(1.0, gt=0, description="score difference counted as 1; PickScore 1, cosines about 0.01")


class MovingReference(StrictModel):
    """A reference that follows the policy, as a moving average of its weights; of a LoRA, of its two factors."""

    ema_decay: Float = Field(
        ge=0, le=1, description="decay of the average per optimizer step: 1 = frozen, 0 = the policy itself"
    )
    warmup: bool = Field(True, description="decay no more than (1 + n) / (10 + n) after optimizer step n")


class PreferenceConfig(TrainingConfig):
    """Training of the step-aware preference model."""

    clip: Location = Field(description="CLIP to start from; the paper's is yuvalkirstain/PickScore_v1")
    tokenizer: Location | None = Field(
        None, description="if not the one beside `clip`; the paper's is laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    )
    weights: Location | None = Field(
        None,
        description="trained step-aware weights to go on from, a file .bin or .safetensors in the released layout; "
        "with `batches: 0` they are used as they are",
    )
    batches: int = Field(ge=0, description="batches of pairs; 0 = do not train")
    step_aware: bool = Field(True, description="false: the timestep stays unknown, which is the paper's ablation")
    ai_feedback: AIFeedback | None = Field(
        None,
        description="null = people's labels alone, as for SD 1.5 in the paper; its SDXL model uses PickScore's alone",
    )
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the forward pass; weights are float32")
    guidance_scale: Float = Field(5.0, ge=0, description="of the one-step predictions; 1 = off. Paper: 5")


Preprocess = Annotated[
    Literal["pil", "tensor", "square"],
    Field(description="pil: as published, no gradient; tensor: the same, differentiable; square: AlignProp's"),
]
"""How a scorer that is a plain CLIP is shown images: a key of `clip.pixels.PREPARATIONS`."""


class ScorerConfig(StrictModel):
    """What every scorer's block has in common.

    A field of type `Location` says where weights are, and none or several may. A file at a location `x` may be pinned
    by its hash in `x_sha256` (`sha256` for `path`). All other fields change scores, so they are part of the scorer's
    identity.
    """

    UNSCORED: ClassVar[frozenset[str]] = frozenset()
    """Fields that change no score, such as how long an answer is waited for: no part of the scorer's identity."""

    expected_range: list[Float] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="a mean score outside is an error; null = what is known of the published weights",
    )

    @classmethod
    def location_fields(cls) -> list[str]:
        """Names of the fields that say where weights are; none for a scorer without weights."""
        return [name for name, field in cls.model_fields.items() if _is_location(field)]

    def locations(self) -> dict[str, Source]:
        """Field -> where its weights are, of those that are set."""
        return locations(self)

    def settings(self) -> dict[str, Any]:
        """The fields that change scores, whatever the weights are; that `dtype` is float32 goes without saying."""
        beside = {"expected_range", "license", *self.location_fields(), *self.UNSCORED}
        found = {name: value for name, value in self if name not in beside and not name.endswith("sha256")}
        return {name: value for name, value in found.items() if (name, value) != ("dtype", "float32")}

    def range_of_mean(self, published: Mapping[str, Sequence[float]]) -> tuple[float, float] | None:
        """The interval a mean score must lie in: `expected_range`, or what is known of published weights.

        Args:
            published: name of a published folder, repository or file, without ending -> interval.
        """
        known = (published.get(source.stem) for source in self.locations().values())
        interval = self.expected_range or next(filter(None, known), None)
        return (float(interval[0]), float(interval[1])) if interval else None


def locations(config: StrictModel) -> dict[str, Source]:
    """Field -> where something is, of the fields of type `Location` that are set."""
    fields = [name for name, field in type(config).model_fields.items() if _is_location(field)]
    return {name: parse(place) for name in fields if (place := getattr(config, name)) is not None}


def _is_location(field: FieldInfo) -> bool:
    """Whether a field's type is `Location`, or `Location | None`."""
    inside = [kind for part in get_args(field.annotation) for kind in getattr(part, "__metadata__", ())]
    return AfterValidator(_location) in [*field.metadata, *inside]
