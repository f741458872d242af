"""Axes of the page's charts: from numbers to percentages of a width, and tick marks at round numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

MARGIN = 0.04  # of the width, on both sides of what is shown


@dataclass(frozen=True)
class Tick:
    """A mark of an axis."""

    place: float  # percent of the width
    label: str


@dataclass(frozen=True)
class Axis:
    """A linear axis from `low` to `high`."""

    low: float
    high: float

    def place(self, value: float) -> float:
        """Where a value stands, in percent; what lies outside stands at the end."""
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(1.0, max(0.0, share)), 2)

    def ticks(self, n: int = 5, *, with_sign: bool = False) -> list[Tick]:
        """At most `n` + 1 marks, at multiples of 1, 2, 2.5 or 5 times a power of ten."""
        inside = [v for v in MaxNLocator(n, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)]
        inside = [v for v in inside if self.low <= v <= self.high]
        digits = max((_decimals(v) for v in inside), default=0)
        texts = (signed(v, digits) if with_sign else signed(v, digits).lstrip("+") for v in inside)
        return [Tick(self.place(v), text) for v, text in zip(inside, texts, strict=True)]


def axis_of(values: Iterable[float], *around: float) -> Axis:
    """The axis that shows all finite values, those of `around` too, with a margin."""
    shown = [value for value in (*values, *around) if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(shown), max(shown)
    room = MARGIN * (high - low) or max(abs(high), 1.0) * MARGIN
    return Axis(low - room, high + room)


def signed(value: float, digits: int) -> str:
    """A number with its sign, a true minus; 0 has none."""
    text = f"{value:+.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "\u2212")


def enough(digits: int, *values: float) -> int:
    """Decimals of numbers that belong together: `digits`, or up to 8 where all of them would be written as 0."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return digits if largest * 10**digits >= 1 or largest == 0 else min(8, 1 - math.floor(math.log10(largest)))


def bracketed(interval: Sequence[float], digits: int) -> str:
    """An interval in square brackets."""
    return (
        f"[{signed(interval[0], digits)}, {signed(interval[1], digits)}]" if all(map(math.isfinite, interval)) else ""
    )


def change(difference: float, ci95: Sequence[float], digits: int) -> tuple[str, str]:
    """A difference and its interval, with `digits` decimals or as many as they need."""
    digits = enough(digits, difference, *ci95)
    return signed(difference, digits), bracketed(ci95, digits)


def _decimals(value: float) -> int:
    """Decimals that a tick needs, 6 at most."""
    return next((n for n in range(6) if math.isclose(round(value, n), value, abs_tol=1e-9)), 6)
