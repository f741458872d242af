"""Scorers without a gradient: `jpeg`, and `python`, a function in a file of one's own."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attune.config.resolve import load as load_settings
from attune.config.schema import ConfigError, check
from attune.evaluation.protocol import scorer_identity
from attune.planning.local_files import Digests
from attune.planning.parts import paths_in, scorer_part
from attune.rewards import jpeg, python
from attune.stages import plan
from stages import inside, write

IMAGES = torch.rand(4, 3, 24, 16, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c", "d"]

# ---------------------------------------------------------------- jpeg


@pytest.mark.parametrize("quality", [95, 40])
@pytest.mark.parametrize(("sign", "factor"), [("compressibility", -1), ("incompressibility", 1)])
def test_size_as_a_jpeg_in_kilobytes(quality, sign, factor):
    scorer = jpeg.load(jpeg.Config(quality=quality, sign=sign))
    sizes = []
    for image in IMAGES:
        file = io.BytesIO()
        array = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(file, "JPEG", quality=quality)
        sizes.append(factor * len(file.getvalue()) / 1000)
    assert scorer(IMAGES, PROMPTS).tolist() == pytest.approx(sizes)


def test_by_default_a_plain_image_is_better_than_noise():
    plain, noise = jpeg.load(jpeg.Config())(torch.stack([torch.full((3, 24, 16), 0.5), IMAGES[0]]), PROMPTS[:2])
    assert noise < plain < 0


# ---------------------------------------------------------------- python

MINE = '''
"""Not run while settings are checked: the line below says so."""
import mine_too

def light(images, prompts):
    assert images.dtype.name == "uint8" and images.shape[-1] == 3 and type(prompts) is list
    return images.mean((1, 2, 3)) / 255 + mine_too.OFFSET

answers = {}

def told(images, prompts):
    return answers["now"]

number = 3
alias = light
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a module of one's own, and one that it imports."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "mine_too.py").write_text("OFFSET = 0.25\n")
    (tmp_path / "package/inner").mkdir(parents=True)
    (tmp_path / "package/inner/scores.py").write_text("def dark(images, prompts):\n    return [-1] * len(prompts)\n")
    (tmp_path / "package/__init__.py").write_text("def plain(images, prompts):\n    return [1.5] * len(prompts)\n")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", ".")])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name == "mine_too" or name.startswith("attune_function_")]:
        del sys.modules[name]


def build(function):
    return python.load(check(python.Config, {"function": function}, "scorers.mine"))


def test_a_function_is_given_8_bits_and_its_file_may_import_others(here):
    expected = (IMAGES * 255).round().mean((1, 2, 3)) / 255 + 0.25
    for function in ("mine:light", "mine:alias"):
        torch.testing.assert_close(build(function)(IMAGES, PROMPTS), expected, rtol=1e-5, atol=1e-5)
    assert build("package.inner.scores:dark")(IMAGES, PROMPTS).tolist() == [-1] * 4
    assert build("package:plain")(IMAGES, PROMPTS).tolist() == [1.5] * 4


def test_its_own_file_is_run_whatever_has_its_name(here):
    """There is a json.py here and one in Python; both are wanted."""
    (here / "json.py").write_text("def one(images, prompts):\n    return [1] * len(prompts)\n")
    assert build("json:one")(IMAGES, PROMPTS).tolist() == [1] * 4
    import json

    assert json.loads("[1]") == [1]


KINDS = [np.arange(4), torch.arange(4.0), [0, 1, 2, 3], (0.0, 1, 2, 3), np.arange(4, dtype=np.float64)]


@pytest.mark.parametrize("values", KINDS, ids=lambda v: type(v).__name__)
def test_numbers_may_come_as_arrays_tensors_and_lists(here, values):
    scorer = build("mine:told")
    scorer._function.__globals__["answers"]["now"] = values
    found = scorer(IMAGES, PROMPTS)
    assert found.dtype == torch.float32
    assert found.tolist() == [0, 1, 2, 3]


WRONG = [None, 3.0, [1, 2, 3], [[1], [2], [3], [4]], ["1", "2", "3", "4"], [1, 2, 3, None], [1, 2, 3, np.nan]]
WRONG += [[1, 2, 3, 1e39], [True] * 4, {"a": 1}, [[1, 2], [3]], pytest.param(iter([1, 2, 3, 4]), id="an iterator")]


@pytest.mark.parametrize("values", WRONG, ids=str)
def test_anything_but_a_finite_number_for_each_image_is_refused(here, values):
    scorer = build("mine:told")
    scorer._function.__globals__["answers"]["now"] = values
    with pytest.raises(ConfigError, match=r"^function: mine:told: (4 numbers are wanted for 4 images|score 3 of 4)"):
        scorer(IMAGES, PROMPTS)


REFUSED = [
    ("mine", "should match pattern"),
    ("mine:light()", "should match pattern"),
    ("../mine:light", "should match pattern"),
    ("yours:light", "no file yours.py below"),
    ("package.outer:dark", "no file package/outer.py below"),
    ("mine:dark", "mine.py has no function dark at its top level"),
    ("mine:assert", "mine.py has no function assert"),
    ("broken:f", "broken.py, line 2"),
    ("binary:f", "binary.py"),
]


@pytest.mark.parametrize(("function", "said"), REFUSED)
def test_what_cannot_be_found_is_refused_with_the_settings(here, function, said):
    (here / "broken.py").write_text("x = 1\ndef f(:\n")
    (here / "binary.py").write_bytes(b"\0\xff")
    with pytest.raises(ConfigError) as error:
        check(python.Config, {"function": function}, "scorers.mine")
    assert str(error.value).startswith("scorers.mine.function: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_are_checked_without_running_the_file(here):
    (here / "loud.py").write_text(
        "def f(images, prompts):\n    return [0.0] * len(images)\nraise RuntimeError('loud')\n"
    )
    config = check(python.Config, {"function": "loud:f"}, "scorers.mine")
    with pytest.raises(ConfigError, match=r"^function: loud:f: loud\.py cannot be run: RuntimeError: loud$"):
        python.load(config)
    with pytest.raises(ConfigError, match="number is no function, but int"):
        build("mine:number")


def test_its_file_is_part_of_what_it_is(here, tmp_path):
    """Of plans and of protocols; and the plan's own copy of the settings is read as it is written."""
    config = check(python.Config, {"function": "mine:light"}, "scorers.mine")
    assert paths_in(config) == ["mine.py"]
    assert check(python.Config, config.model_dump()) == config
    first = scorer_identity("mine", config)
    assert first[2] == "function=mine:light"
    (here / "mine.py").write_text(MINE + "# changed\n")
    assert scorer_identity("mine", config)[1] != first[1]
    with pytest.raises(ConfigError, match=r"scorers\.mine\.path: .*is found by the module's name, as mine\.py"):
        check(python.Config, {"function": "mine:light", "path": "mine_too.py"}, "scorers.mine")


# ---------------------------------------------------------------- in a project


@pytest.fixture
def project(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    service = {"scorer": "http", "url": "http://127.0.0.1:9/", "version": "1"}
    mine = {"scorer": "python", "function": "mine:light"}
    folder = write(tmp_path, {"base": {"after": "data"}}, scorers__mine=mine, scorers__service=service)
    with inside(folder):
        yield folder


def parts(**changes):
    """What identifies the kept scores of each scorer."""
    profile = Path("params/short.yaml")
    text = profile.read_text()
    for old, new in changes.values():
        assert old in text
        profile.write_text(text := text.replace(old, new))
    settings = load_settings()
    digests = Digests(Path("digests.json"))
    return {name: scorer_part(name, "attune.evaluation.scoring", settings, digests) for name in settings.scorers}


def changed(before, after):
    return {name for name in before if before[name] != after[name]}


def test_scores_are_kept_while_what_makes_them_is_the_same(project):
    """A service that moves has the scores it had; another version has none. A function's file is what it is."""
    first = parts()
    assert changed(first, moved := parts(url=("127.0.0.1:9/", "localhost:10/"))) == set()
    assert changed(moved, second := parts(version=("version: '1'", "version: '2'"))) == {"service"}
    Path("mine.py").write_text(MINE + "# changed\n")
    assert changed(second, parts()) == {"mine"}


def test_the_plan_refuses_a_function_that_is_not_there(project, monkeypatch, capsys):
    Path("mine.py").write_text("def heavy(images, prompts): ...\n")
    monkeypatch.setattr(sys, "argv", ["plan"])
    with pytest.raises(SystemExit) as error:
        plan.main()
    said = f"{error.value}{capsys.readouterr().out}{capsys.readouterr().err}"
    assert "params/short.yaml:scorers.mine.function: Value error, mine.py has no function light" in said
