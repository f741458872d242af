"""params.yaml -> typed values, in well under a second: nothing here imports torch.

One file, one `profile:` and complete `profiles.<name>` blocks, so that `dvc exp run -S` always means what it
says. Every block is strict: an unknown key, a wrong type or a value out of range is an error that names the
key and the file. A method, scorer or data source brings its own `Config` (see `attune.plugins`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from attune import plugins


class ConfigError(ValueError):
    """Something in params.yaml is wrong; the message names the key."""


class Block(BaseModel):
    """A strict, immutable block of params.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _whole_number_as_float(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


Real = Annotated[float, BeforeValidator(_whole_number_as_float)]
"""A float that may be written without a point: `beta: 10`."""


class Model(Block):
    """The base model every method starts from."""

    backbone: str = Field(description="file in attune/backbones")
    path: str = Field(description="local folder or hub id, diffusers layout")
    revision: str | None = Field(None, description="hub commit; required for a hub id")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class Sampling(Block):
    """How images are drawn from a model: DDIM."""

    steps: int = Field(ge=1, le=999)
    eta: Real = Field(ge=0, le=1, description="0 deterministic, 1 ancestral")
    guidance_scale: Real = Field(ge=0, description="classifier-free guidance w, 1 = off")
    batch_size: int = Field(ge=1, description="images at a time; changes speed and memory only")


class Lora(Block):
    """The adapter that is trained; alpha equals rank, so the file needs no metadata to be read right."""

    rank: int = Field(ge=1)
    targets: list[str] | None = Field(None, description="module name endings; null = the backbone's own choice")


class TrainingConfig(Block):
    """What every trained thing decides for the one loop. Method configs extend it with their own fields."""

    lr: Real = Field(gt=0)
    batches: int = Field(ge=1, description="batches from the loader; for online methods, rollouts")
    batch_size: int = Field(ge=1, description="pairs or prompts per batch")
    accumulation: int = Field(1, ge=1, description="minibatches per optimizer step")
    warmup: int = Field(0, ge=0, description="optimizer steps of linear warm-up")
    weight_decay: Real = Field(1e-2, ge=0)
    max_grad_norm: Real | None = Field(1.0, gt=0, description="null = no clipping; grad_norm is logged regardless")


class Generate(Block):
    """Held-out images: the same prompts and the same noise for every model."""

    prompts: int = Field(ge=2)
    images_per_prompt: int = Field(1, ge=1)
    sampling: Sampling


class Profile(Block):
    """Everything one run decides."""

    seed: int = Field(ge=0)
    threads: int = Field(1, ge=1, description="CPU threads; two on busy cores are far slower than one")
    model: Model
    sampling: Sampling = Field(description="how training pairs are painted")
    data: Mapping[str, Any]
    preference: Mapping[str, Any]
    lora: Lora
    methods: Mapping[str, Any]
    generate: Generate
    scorers: Mapping[str, Any]


class Params(Block):
    """All of params.yaml."""

    profile: str
    run_methods: Mapping[str, Mapping[str, str]]
    tracking: str | None
    profiles: Mapping[str, Any]


def read_params(path: Path | str = "params.yaml") -> dict[str, Any]:
    """The file as plain values. ruamel, not PyYAML: DVC writes `1e-05`, which PyYAML reads as a string."""
    try:
        values = YAML(typ="safe").load(Path(path))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; run from the repository root") from None
    except YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping, found {type(values).__name__}")
    return values


def load(path: Path | str = "params.yaml") -> tuple[Params, Profile]:
    """Reads and checks the file and its active profile, plug-in blocks included.

    Raises:
        ConfigError: naming the key.
    """
    params = check(Params, read_params(path))
    if params.profile not in params.profiles:
        raise ConfigError(f"profile: {params.profile!r} is not in profiles: {', '.join(params.profiles)}")
    where = f"profiles.{params.profile}"
    profile = check(Profile, params.profiles[params.profile], where)
    plugins.find("backbones", profile.model.backbone, f"{where}.model.backbone")
    plugin_config("sources", profile.data.get("source"), _without(profile.data, "source"), f"{where}.data")
    check(plugins.config_class("preference", "objective"), profile.preference, f"{where}.preference")
    for name, block in profile.methods.items():
        plugin_config("methods", name, block, f"{where}.methods.{name}")
    for name, block in profile.scorers.items():
        plugin_config("rewards", name, block, f"{where}.scorers.{name}")
    if profile.data.get("test_prompts", profile.generate.prompts) < profile.generate.prompts:
        raise ConfigError(f"{where}.generate.prompts: {profile.generate.prompts} is more than data.test_prompts")
    for name in params.run_methods:
        if name not in profile.methods:
            raise ConfigError(f"run_methods.{name}: {where}.methods has no block of that name")
    return params, profile


def plugin_config(kind: str, name: str, block: Mapping[str, Any], where: str) -> Block:
    """A plug-in's own block, checked by its own Config."""
    plugins.find(kind, name, where)
    return check(plugins.config_class(kind, name), block, where)


def check(model: type[Block], values: Any, where: str = "") -> Any:
    """Validates one block, found at the key `where`; every problem is reported with its full key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key = ".".join([where, *map(str, item["loc"])]).lstrip(".")
            unknown = item["type"] == "extra_forbidden"
            known = f"; known keys: {', '.join(_at(model, item['loc'][:-1]).model_fields)}" if unknown else ""
            given = "" if item["type"] in ("missing", "extra_forbidden") else f" (given {item['input']!r})"
            problems.append(f"{key}: {item['msg']}{given}{known}")
        raise ConfigError("\n".join(problems)) from None


def _at(model: type[Block], place: Sequence[Any]) -> type[Block]:
    """The block at `place` inside a block."""
    for name in place:
        model = model.model_fields[name].annotation
    return model


def _without(block: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in block.items() if name != key}
