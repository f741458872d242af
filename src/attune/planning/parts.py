"""What identifies the parts of a stage's work that are kept for themselves: each is done again only if it changes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from attune.config import plugins
from attune.config.resolve import Settings
from attune.config.schema import StrictModel
from attune.config.settings import Sampling, locations
from attune.files import values_sha
from attune.planning.code import code_digests
from attune.planning.local_files import Digests

ELSEWHERE = {
    "offload",
    "lora_dtype",
    "quantize",
    "density",
}  # settings of the model that change no latents and no embeddings
COMPUTE = "attune.data.ingest.compute"


def prepared_parts(settings: Settings, digests: Digests) -> dict[str, str]:
    """Of `prepare`: `latents`, `prompts`, `generated` (images that a source wants), and `scores/<scorer>`."""
    model, backbone = settings.model, plugins.module_name("backbones", settings.model.backbone)
    paths, encoded = paths_in(model), model.model_dump(exclude=ELSEWHERE)
    latents = {key: value for key, value in encoded.items() if key not in ("dtype", "max_sequence_length", "t5")}
    prompts = {key: value for key, value in encoded.items() if key not in ("vae", "vae_dtype", "channels_last")}
    parts = {
        "latents": _part(latents, paths, [backbone, COMPUTE], digests),
        "prompts": _part(prompts, paths, [backbone, "attune.data.ingest.prompts"], digests),
        "generated": generated_part(settings, settings.sampling, [], digests),
    }
    return parts | {
        f"scores/{name}": scorer_part(name, COMPUTE, settings, digests) for name in settings.data.score_with
    }


def generated_part(settings: Settings, sampling: Sampling, paths: Iterable[str], digests: Digests) -> str:
    """Images of a model; `paths`: local files that they depend on besides the base model's."""
    backbone = plugins.module_name("backbones", settings.model.backbone)
    modules = [backbone, "attune.build", "attune.diffusion.generate", "attune.diffusion.policy"]
    values = [settings.model.model_dump(exclude={"offload", "density"}), sampling.model_dump(), settings.seed]
    return _part(values, [*paths_in(settings.model), *paths], modules, digests)


def scorer_part(name: str, asks: str, settings: Settings, digests: Digests) -> str:
    """Scores of a scorer; `asks` is the module that calls it."""
    scorer = settings.scorers[name]
    modules = [plugins.module_name("rewards", scorer.plugin), asks]
    scored = scorer.config.model_dump(mode="json", exclude=set(scorer.config.UNSCORED))
    return _part(scored, paths_in(scorer.config), modules, digests)


def _part(settings: object, paths: Iterable[str], modules: Iterable[str], digests: Digests) -> str:
    return values_sha([settings, digests.of(paths), code_digests(modules)])


def paths_in(config: StrictModel | None) -> list[str]:
    """The local files and folders that settings name, with the layout (.json) that may lie beside a file of weights."""
    found = [] if config is None else [s.place for s in locations(config).values() if s.commit is None]
    layouts = [str(Path(place).with_suffix(".json")) for place in found if Path(place).is_file()]
    return found + [layout for layout in layouts if layout not in found and Path(layout).exists()]
