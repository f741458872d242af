"""The report as one self-contained HTML page: no script, no request, every text escaped."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from attune.costs import Cost
from attune.evaluation.hacking import HARM
from attune.evaluation.report.accuracy import Accuracy
from attune.evaluation.report.axis import bracketed, change, enough, signed
from attune.evaluation.report.curves import Training
from attune.evaluation.report.document import one_line
from attune.evaluation.report.dots import Panel
from attune.evaluation.report.forest import by_gain, forest
from attune.evaluation.report.glossary import GLOSSARY
from attune.evaluation.report.pictures import Pictures
from attune.evaluation.report.sentence import first_sentence, lead
from attune.evaluation.report.tables import decimals, p_text, percent
from attune.evaluation.report.verdict import differing_versions
from attune.evaluation.seeds import AcrossSeeds
from attune.evaluation.summary import ComparisonEntry, Summary
from attune.text import cut

SIGNS = {
    "pairwise_distance": "pairwise distance",
    "vendi": "Vendi",
    "pairwise_distance_per_prompt": "pairwise distance, one prompt",
    "vendi_per_prompt": "Vendi, one prompt",
    "saturation": "saturation",
    "high_frequency": "high frequency",
    "cmmd": "CMMD",
}
WORDS = {"none": "no evidence", "suspect": "suspected", "hacked": "hacked"}
MODELS = {"spm": "step-aware", "untimed": "without the timestep"}
PROMPT_CHARS = 160


@dataclass(frozen=True)
class Extras:
    """What the page shows besides the summary; empty where it is not known."""

    profile: str = ""
    pictures: Pictures = field(default_factory=lambda: Pictures((), {}))
    panels: Sequence[Panel] = ()
    concord: Mapping[tuple[str, str], float] = field(default_factory=dict)
    trainings: Sequence[Training] = ()
    accuracy: Accuracy | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)  # config.plan.Origin
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # run -> config.plan.RunFacts
    data: Mapping[str, float] = field(default_factory=dict)  # counts of prepare
    steps: Mapping[str, int] = field(default_factory=dict)  # run -> optimizer steps
    commit: str = ""
    costs: Mapping[str, Cost] = field(default_factory=dict)  # stage -> what it cost
    seeds: AcrossSeeds | None = None


def to_html(summary: Summary, extras: Extras | None = None) -> str:
    """The page."""
    runs = by_gain(summary)
    signs = [sign for sign in SIGNS if any(sign in summary.methods[run].signs for run in runs)]
    parts = [name for name in summary.methods[summary.base].scores if name not in summary.scorers]
    template = _environment(summary).get_template("page.html.j2")
    return template.render(
        s=summary,
        x=extras or Extras(),
        runs=runs,
        ordered=[summary.base, *runs],
        sentence=first_sentence(summary),
        lead=lead(summary),
        forest=forest(summary) if runs else None,
        signs=signs,
        sign_names=SIGNS,
        harm=HARM,
        words=WORDS,
        models=MODELS,
        parts=parts,
        differing=differing_versions(summary.made_with),
        versions=_common(summary.made_with),
        glossary=GLOSSARY,
    )


def _common(made_with: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """What all runs were made with alike, without the names of the models."""
    all_of = list(made_with.values())
    first = all_of[0] if all_of else {}
    return {name: value for name, value in first.items() if all(found.get(name) == value for found in all_of)}


def _environment(summary: Summary) -> Environment:
    """Escapes every value, and makes every text one line without invisible characters before that."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: one_line(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "percent": percent,
        "p": lambda p: p_text(p).removeprefix("p ").removeprefix("= "),
        "prompt": lambda text: cut(one_line(text), PROMPT_CHARS),
        "signed": _signed,
        "change": _change,
        "decimals": lambda sign: enough(3, sign.change / 10, *(end / 10 for end in sign.ci95)),
        "bracketed": bracketed,
        "digits": lambda scorer: decimals(summary, scorer),
        "number": _number,
        "anchor": _anchor,
        "thousands": lambda n: f"{n:,.0f}",
        "duration": _duration,
    }
    made.globals |= {"term": _term}
    return made


def _term(name: str, text: str | None = None) -> Markup:
    """A term with its meaning on hover or focus, and a link to the list of terms."""
    meaning = GLOSSARY[name]
    return Markup('<a class="term" href="#{}" data-tip="{}">{}</a>').format(
        _anchor(name), meaning, escape(text or name)
    )


def _anchor(name: str) -> str:
    return "w-" + re.sub(r"\W+", "-", name.lower()).strip("-")


def _signed(value: float, digits: int = 2) -> str:
    return signed(value, digits) if math.isfinite(value) else "\u2013"


def _change(entry: ComparisonEntry, digits: int) -> str:
    """A difference and its interval, with as many decimals as they need."""
    return " ".join(change(entry.difference, entry.difference_ci95, digits))


def _number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}f}".replace("-", "\u2212") if math.isfinite(value) else "\u2013"


def _duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
