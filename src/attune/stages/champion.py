"""Registers the best run of the report as the champion, if it beats the one there is: `make champion`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attune.config.check import load
from attune.config.profile import Profile
from attune.config.schema import ConfigError
from attune.files import digest
from attune.paths import MODELS, REPORTS, project_root
from attune.tracking import registry

if TYPE_CHECKING:
    from attune.evaluation.statistics import Comparison

LOG = logging.getLogger("attune.champion")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--anew", action="store_true", help="take the alias from a champion of another protocol")
    anew = parser.parse_args().anew
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    LOG.setLevel(logging.INFO)
    try:
        params, profile = load()
    except ConfigError as error:
        sys.exit(f"params.yaml: {error}")
    if params.tracking is None:
        sys.exit("params.yaml: tracking: null, and the registry is in the tracking store")
    name, place = f"attune-{params.profile}", (params.tracking, project_root())
    try:
        LOG.info(challenge(name, profile, place, anew=anew))
    except (FileNotFoundError, ValueError, registry.RegistryError) as error:
        sys.exit(f"champion: {error}")


def challenge(name: str, profile: Profile, place: tuple[str, Path], *, anew: bool = False) -> str:
    """Lets the best run of the report challenge the champion; what came of it, in a sentence.

    Who beats the champion gets its alias, who does not is registered as `challenger`; nobody is registered twice.

    Args:
        name: of the registered model.
        place: uri and root of the tracking store.
        anew: whether a champion of another protocol steps down without a fight.

    Raises:
        FileNotFoundError: there is no report, or no adapter of the best run.
        ValueError: nothing to register: it cannot be compared with the champion, or is no adapter.
    """
    from attune.evaluation.protocol import read_scores

    summary = json.loads((REPORTS / "summary.json").read_text())
    run, headline = best(summary), summary["scorers"][0]
    if run is None:
        return f"no run of the report is better than {summary['base']} by {headline} beyond doubt: nothing to register"
    scores = REPORTS / "scores" / f"{run}.parquet"
    adapter = adapter_of(run)
    protocol = read_scores(scores)[1]
    if protocol.to_dict() != summary["protocol"]:
        raise ValueError(f"{scores} and {REPORTS / 'summary.json'} are of different protocols: `dvc repro` first")
    tags = {"run": run, "headline": headline, "protocol": protocol.sha, "adapter": digest(adapter)}
    tags |= {"base": profile.model.path, "difference": f"{difference(summary, run)[0]:.6g}"}
    tags |= {"base.revision": profile.model.revision} if profile.model.revision else {}
    for alias in (registry.CHAMPION, registry.CHALLENGER):
        known = registry.get_by_alias(name, alias, *place)
        if known and (known.tags["adapter"], known.tags["protocol"]) == (tags["adapter"], protocol.sha):
            return f"{run} is {alias} already, version {known.number} of {name}"
    old = registry.get_by_alias(name, registry.CHAMPION, *place)
    found = None if old is None or anew else against(old, scores, headline, profile.seed, place)
    version = registry.register(name, adapter, profile.model.path, scores, tags, place)
    wins = found is None or found.difference_ci95[0] > 0
    registry.set_alias(name, registry.CHAMPION if wins else registry.CHALLENGER, version.number, *place)
    return verdict(f"{run}, version {version.number} of {name},", old, found, headline)


def best(summary: Mapping[str, Any]) -> str | None:
    """The run trained here whose headline score is farthest above the base's, of those whose interval excludes 0."""
    ours = [name for name in summary["methods"] if name != summary["base"] and (MODELS / name).is_dir()]
    better = [name for name in ours if difference(summary, name)[1] > 0]
    return max(better, key=lambda name: difference(summary, name)[0], default=None)


def difference(summary: Mapping[str, Any], run: str) -> tuple[float, float]:
    """Mean difference to the base by the headline scorer, and the lower end of its 95 % interval."""
    entry = summary["methods"][run]["vs_base"][summary["scorers"][0]]
    return entry["difference"], entry["difference_ci95"][0]


def adapter_of(run: str) -> Path:
    """The folder of a run's LoRA. Raises ValueError where all weights were trained: MLflow's flavor is of adapters."""
    folder = MODELS / run
    if any(folder.glob("*.safetensors")):
        return folder
    if (folder / "unet").is_dir():
        raise ValueError(f"{run} is a whole denoiser; only adapters (`lora`) can be registered, share {folder} by DVC")
    raise FileNotFoundError(f"no adapter in {folder}: `dvc repro` or `dvc pull` first")


def against(old: registry.Version, scores: Path, headline: str, seed: int, place: tuple[str, Path]) -> Comparison:
    """The challenger against the champion, prompt by prompt, by the headline scorer.

    Raises: ValueError naming both protocols, where they differ.
    """
    from attune.evaluation.protocol import read_scores
    from attune.evaluation.statistics import compare

    frame, protocol = read_scores(scores)
    if old.tags["protocol"] != protocol.sha:
        raise ValueError(
            f"the champion (version {old.number}, {old.tags['run']}) was scored under protocol {old.tags['protocol']}, "
            f"the best run here under {protocol.sha}: they cannot be compared. Score both alike, or use --anew"
        )
    with tempfile.TemporaryDirectory() as folder:
        theirs, _ = read_scores(registry.download_scores(old, Path(folder), *place))
    return compare(by_prompt(frame, headline), by_prompt(theirs, headline), seed=seed)


def by_prompt(frame, scorer: str):
    """A score (n,) per prompt, prompts sorted: the same protocol has the same prompts."""
    from attune.evaluation.statistics import prompt_means

    return prompt_means(frame[scorer].to_numpy(dtype=float), frame.prompt)[0]


def verdict(who: str, old: registry.Version | None, found: Comparison | None, headline: str) -> str:
    """What happened, with the numbers it rests on."""
    if found is None:
        return f"{who} is the champion" + (": there was none" if old is None else f" in the place of {old.number}")
    low, high = found.difference_ci95
    numbers = f"{headline} {found.difference:+.4f}, 95 % [{low:+.4f}, {high:+.4f}], n = {found.n_prompts} prompts"
    beaten = f"version {old.number} ({old.tags['run']})"
    if low > 0:
        return f"{who} is the champion: it beats {beaten}, {numbers}"
    return f"{who} is registered as challenger: it does not beat {beaten} beyond doubt, {numbers}"


if __name__ == "__main__":
    main()
