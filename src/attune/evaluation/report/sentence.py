"""The first sentence of the report: which run is best, by how much, how sure that is, and whether it is hacked."""

from __future__ import annotations

import math

from attune.evaluation.hacking import listed
from attune.evaluation.report.axis import change, enough
from attune.evaluation.report.forest import by_gain
from attune.evaluation.report.tables import decimals
from attune.evaluation.summary import MethodSummary, Summary


def first_sentence(summary: Summary) -> str:
    """What the report says first. Hacked runs besides the best are named, and what is best without them."""
    runs = by_gain(summary)
    if not runs:
        return f"Only {summary.base} was scored: there is nothing to compare it with."
    hacked = [name for name in runs if summary.methods[name].suspicion == "hacked"]
    if runs[0] in hacked and summary.methods[runs[0]].vs_base[summary.headline].evidence == "better":
        return _but_hacked(summary, runs, hacked)
    also = [name for name in hacked if name != runs[0]]
    text = f"{_result(summary, runs)}{_doubt(summary.methods[runs[0]])}."
    return f"{text} Hacked: {', '.join(also)}." if also else text


def lead(summary: Summary) -> str:
    """How sure the first sentence is: the prompts it rests on, and what choosing the best of several gives."""
    protocol = summary.protocol
    images = "one image" if protocol.images_per_prompt == 1 else f"{protocol.images_per_prompt} images"
    text = f"{protocol.n_prompts} test prompts, {images} of each from the same noise for every run."
    if summary.best is None:
        return text
    gain = " ".join(change(summary.best.difference, summary.best.difference_ci95, _digits(summary)))
    return (
        f"{text} The best of {summary.best.of} may look better than it is on the prompts that chose it; chosen by one "
        f"half of them and judged by the other, the difference is {gain}."
    )


def _result(summary: Summary, runs: list[str]) -> str:
    """The best run against the base, by the headline scorer."""
    run, base, n, digits = runs[0], summary.base, summary.protocol.n_prompts, _digits(summary)
    method, entry = summary.methods[run], summary.methods[run].vs_base[summary.headline]
    named, which = _named(summary, method), "the only run" if len(runs) == 1 else f"the best of {len(runs)} runs"
    if entry.evidence == "better":
        before, after = (summary.methods[name].scores[summary.headline].mean for name in (base, run))
        digits = enough(digits, entry.difference, *entry.difference_ci95)
        rise = f"{named} rises from {before:.{digits}f} to {after:.{digits}f}, {_change(summary, run)} over {n} prompts"
        return f"{run}, {which}, beats {base}: {rise}{_larger(summary, runs)}{_agreeing(summary, method)}"
    moved = f"{run}, {which}, changes {named} by {_change(summary, run)} over {n} prompts"
    if entry.evidence == "worse":
        return f"No run beats {base}: {moved}"
    if entry.evidence == "mixed":
        return f"{moved}, but mean, ranks and win rate disagree"
    mde = entry.minimum_detectable_effect
    found = f"; they would reveal {mde:.{enough(digits, mde)}f} four times in five" if math.isfinite(mde) else ""
    return f"No run is shown to beat {base}: {moved}{found}"


def _larger(summary: Summary, runs: list[str]) -> str:
    """Runs whose mean is larger than the first one's, and which are not shown to be better all the same."""
    best = summary.methods[runs[0]].vs_base[summary.headline].difference
    larger = [name for name in runs[1:] if summary.methods[name].vs_base[summary.headline].difference > best]
    doubtful = [name for name in larger if summary.methods[name].vs_base[summary.headline].evidence != "better"]
    return f" ({', '.join(doubtful)} has a larger mean without such evidence)" if doubtful else ""


def _but_hacked(summary: Summary, runs: list[str], hacked: list[str]) -> str:
    """Where the largest gain is a hacked one: what it is, and which run is best without."""
    found = summary.methods[runs[0]].hacking
    gain = f"{runs[0]} gains most by {summary.headline}, {_change(summary, runs[0])}, but is hacked: "
    gain += f"{found.why}." if found else ""
    honest = [name for name in runs if name not in hacked]
    if not honest:
        return gain + (" So are all other runs." if len(runs) > 1 else "")
    best = summary.methods[honest[0]].vs_base[summary.headline]
    said = {"better": "beats", "worse": "is worse than"}.get(best.evidence, "is not shown to beat")
    return f"{gain} The best of the others, {honest[0]}, {said} {summary.base}: {_change(summary, honest[0])}."


def _change(summary: Summary, run: str) -> str:
    entry = summary.methods[run].vs_base[summary.headline]
    return " ".join(change(entry.difference, entry.difference_ci95, _digits(summary))).strip()


def _digits(summary: Summary) -> int:
    """One decimal less than in the tables."""
    return max(1, decimals(summary, summary.headline) - 1)


def _named(summary: Summary, method: MethodSummary) -> str:
    """The headline scorer, with a remark where it is no independent evidence."""
    if method.is_held_out(summary.headline):
        return summary.headline
    seen = "trained on" if summary.headline in method.trained_on else "selected by"
    return f"{summary.headline}, which it was {seen},"


def _agreeing(summary: Summary, method: MethodSummary) -> str:
    """How many of the other scorers say the same, and which say the contrary."""
    evidence = [method.vs_base[scorer].evidence for scorer in summary.scorers[1:]]
    agree, others = evidence.count("better"), len(evidence)
    if not others:
        return ""
    if agree == others:
        few = {1: "the other scorer agrees", 2: "both other scorers agree"}
        return f", and {few.get(others, f'all {others} other scorers agree')}"
    if others == 1:
        return ", and the other scorer does not agree"
    fell = [scorer for scorer in summary.scorers[1:] if method.vs_base[scorer].evidence == "worse"]
    text = f", and {agree or 'none'} of {others} other scorers agree{'' if agree > 1 else 's'}"
    return text + (f"; {' and '.join(fell)} fell" if fell else "")


def _doubt(method: MethodSummary) -> str:
    """What is said of hacking; nothing of a run that gains by no scorer, which cannot be hacked."""
    found = method.hacking
    if found is None or (found.word == "none" and all(e.evidence != "better" for e in method.vs_base.values())):
        return ""
    if found.word != "none":
        return f"; {'it is hacked' if found.word == 'hacked' else 'reward hacking is suspected'}: {found.why}"
    lost = f", but its images are {listed(found.losses)}" if found.losses else ""
    if not any(method.is_held_out(scorer) for scorer, entry in method.vs_base.items() if entry.p_holm is not None):
        return f"; every scorer here trained or selected it, so hacking cannot be told{lost}"
    trained = any(scorer in method.vs_base for scorer in method.trained_on)
    return f"; {'no evidence of reward hacking' if trained else 'it was trained on none of these scorers'}{lost}"
