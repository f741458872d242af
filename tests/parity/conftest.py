"""The models of the cases, and the table of errors: `pytest tests/parity --parity-table docs/parity.md` writes it."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from golden.pipelines import write_pipeline
from golden.reading import assert_close, largest_errors

from attune.config import plugins
from attune.config.settings import Model


@dataclass
class Line:
    """The largest errors of one thing compared, and what is allowed."""

    allowed: str
    absolute: float = 0.0
    relative: float = 0.0

    def note(self, actual, expected):
        errors = largest_errors(actual, expected)
        self.absolute, self.relative = max(self.absolute, errors[0]), max(self.relative, errors[1])


class Table:
    """Compares tensors and remembers the largest errors of each line."""

    def __init__(self):
        self.lines: dict[tuple[str, str], Line] = {}

    def close(self, case, what, actual, expected, rel=1e-5, absolute=0.0):
        """As `assert_close`, but for either one bound or the other."""
        self._note(case, what, f"abs {absolute:.1e}" if absolute else f"rel {rel:.1e}", actual, expected)
        assert_close(actual, expected, 0.0 if absolute else rel, absolute)

    def exact(self, case, what, actual, expected):
        """Equal to the last bit."""
        self._note(case, what, "exact", actual, expected)
        assert torch.equal(actual, expected)

    def _note(self, case, what, allowed, actual, expected):
        line = self.lines.setdefault((case, what), Line(allowed))
        assert line.allowed == allowed, f"{case} {what}: one line, two tolerances"
        line.note(actual, expected)

    def __str__(self):
        lines = ["| case | compared | largest error | relative | allowed |", "|---|---|---|---|---|"]
        for (case, what), line in sorted(self.lines.items(), key=lambda item: item[0][0]):
            errors = (f"{error:.1e}" if error else "0" for error in (line.absolute, line.relative))
            lines.append(" | ".join([f"| {case}", what, *errors, f"{line.allowed} |"]))
        return "\n".join(lines)


def pytest_addoption(parser):
    parser.addoption("--parity-table", type=Path, help="Markdown file to write the table of errors into")


@pytest.fixture(scope="session")
def table(request):
    found = Table()
    yield found
    file = request.config.getoption("--parity-table", None)
    if file:
        between = re.compile("(<!-- table -->\n).*(<!-- /table -->)", re.DOTALL)
        file.write_text(between.sub(lambda marks: f"{marks[1]}{found}\n{marks[2]}", file.read_text()))


@pytest.fixture(scope="session")
def sd(tmp_path_factory):
    """The tiny Stable Diffusion of cases 5, 6, 9, 12 and 13; shared, so training needs `own`."""
    return load("sd", tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    """The tiny SDXL of cases 5, 6, 9 and 12; shared, so training needs `own`."""
    return load("sdxl", tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="session")
def sd3(tmp_path_factory):
    """The tiny Stable Diffusion 3.5 of cases 24e and 24f; shared, so training needs `own`."""
    return load("sd3", tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="session")
def flux(tmp_path_factory):
    """The tiny FLUX.1-dev of case 24e, which reads 16 tokens of a prompt; shared, so training needs `own`."""
    return load("flux", tmp_path_factory.mktemp("flux"), resolution=16, max_sequence_length=16)


def load(name, folder, **settings):
    model = Model(backbone=name, path=write_pipeline(folder, f"tiny_{name}"), **settings)
    return plugins.load("backbones", name).load(model, torch.device("cpu"))
