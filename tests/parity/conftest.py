"""The table of errors that the parity tests print with `pytest -s`."""

import pytest
from golden.reading import assert_close


class Table:
    """Compares tensors and remembers the largest error of each line."""

    def __init__(self):
        self.lines: dict[tuple[str, str], tuple[float, float]] = {}

    def close(self, case, what, actual, expected, rel=1e-5, absolute=0.0):
        """As `assert_close`; the error is noted relative to the largest value, or as it is if `absolute`."""
        error = float((actual.detach() - expected).abs().max())
        error /= 1 if absolute else max(float(expected.abs().max()), 1e-30)
        worst, _ = self.lines.get((case, what), (0.0, 0.0))
        self.lines[case, what] = max(worst, error), absolute or rel
        assert_close(actual, expected, 0.0 if absolute else rel, absolute)

    def __str__(self) -> str:
        head = f"\n{'case':<18}{'what':<28}{'tolerance':>10}{'max error':>11}"
        return "\n".join([head, *(f"{c:<18}{w:<28}{t:>10.0e}{e:>11.1e}" for (c, w), (e, t) in self.lines.items())])


@pytest.fixture(scope="module")
def table():
    found = Table()
    yield found
    print(found)
