"""Every option of every Config is set in some test; whether that test notices what it does is for its author to see."""

import re
from pathlib import Path

import pytest

from attune.config import plugins, profile, search, settings
from attune.config.schema import SearchRange, StrictModel

TESTS = Path(__file__).parents[1]


def configs():
    """Every block of settings by name: those of the plug-ins, and those that they share."""
    for kind in ("methods", "rewards", "sources"):
        for name in plugins.available(kind):
            yield f"{kind}/{name}", plugins.config_class(kind, name)
    for module in (settings, profile, search):
        for name, found in vars(module).items():
            if isinstance(found, type) and issubclass(found, StrictModel) and found.__module__ == module.__name__:
                yield f"{module.__name__}.{name}", found
    yield "SearchRange", SearchRange


CONFIGS = dict(configs())


def is_set(option: str, text: str) -> bool:
    """Whether a test gives the option a value: option=..., "option": ..., or as part of a dotted key."""
    return bool(re.search(rf"""\b{option}\s*=[^=]|["'_.]{option}["']?\s*[:=\]]""", text))


@pytest.fixture(scope="module")
def text():
    return "\n".join(file.read_text() for file in TESTS.rglob("*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_option_is_set_in_a_test(name, text):
    options = [field.alias or key for key, field in CONFIGS[name].model_fields.items()]
    assert not [option for option in options if not is_set(option, text)]


def test_the_options_are_found_where_they_are():
    """What this test rests on: it finds the options that there are, and none that no test sets."""
    assert {"methods/spo", "sources/world", "rewards/hpsv2", "attune.config.settings.Lora"} <= set(CONFIGS)
    assert all(is_set("beta", text) for text in ("Config(beta=1)", '{"beta": 1}', '["methods"]["dpo"]["beta"] = 2'))
    assert not is_set("beta", "if beta == 1: alphabet = 2")
