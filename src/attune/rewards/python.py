"""A function of one's own: `function(images, prompts)` gives a number for each image, and needs no gradient.

The function's file is part of what the scorer is: its digest is in plans and protocols, so scores are computed anew
when it changes. Whatever else it imports or reads is not.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from attune.clip.pixels import check_images
from attune.config.schema import ConfigError
from attune.config.settings import Location, ScorerConfig
from attune.rewards._numbers import checked_scores, eight_bit


class Config(ScorerConfig):
    """Where the function is. All that can be known without running it is checked with the settings."""

    function: str = Field(
        pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$",
        description="module:name; given images, uint8 (B, H, W, 3), and B prompts, it returns B numbers",
    )
    path: Location | None = Field(
        None, validate_default=True, description="its file, found by the module's name; leave it out"
    )
    license: str = Field("one's own", description="licence of the function")

    @field_validator("function")
    @classmethod
    def _is_there(cls, function: str) -> str:
        module, _, name = function.partition(":")
        file = source_of(module)
        if file is None:
            raise ValueError(
                f"no file {module.replace('.', '/')}.py below {Path.cwd()}, from where attune was started, nor on "
                "Python's path"
            )
        if name not in top_level_names(file):
            raise ValueError(f"{file} has no function {name} at its top level")
        return function

    @field_validator("path", mode="before")
    @classmethod
    def _is_found(cls, path: Any, info: ValidationInfo) -> Any:
        if "function" not in info.data:  # which is the fault to be told
            return None
        found = str(source_of(info.data["function"].partition(":")[0]))
        if path not in (None, found):
            raise ValueError(f"is found by the module's name, as {found}; leave it out")
        return found


def source_of(module: str) -> Path | None:
    """The file of a module below the working directory, then relative to it, or on Python's path; nothing is run."""
    inner = Path(*module.split("."))
    for place in (Path(), *map(Path, sys.path)):
        for file in (place / inner.with_suffix(".py"), place / inner / "__init__.py"):
            if file.is_file():
                return file
    return None


def top_level_names(file: Path) -> set[str]:
    """Names that a file defines or imports at its top level. Raises ValueError if it is no Python."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ValueError(f"{file}{where}: {error.args[0]}") from None

    def names() -> Iterator[str]:
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                yield node.name
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from (target.id for target in targets if isinstance(target, ast.Name))
            elif isinstance(node, ast.Import | ast.ImportFrom):
                yield from (alias.asname or alias.name for alias in node.names)

    return set(names())


def load_function(function: str) -> Callable[..., Any]:
    """The function, of the very file that `source_of` finds, whatever other module has its name.

    The folder in which the module's name begins is put at the end of Python's path, for what the file imports.

    Raises:
        ConfigError: its file cannot be run, or what has its name cannot be called.
    """
    module, _, name = function.partition(":")
    file = source_of(module)
    if file is None:
        raise ConfigError(f"function: {function}: its file is gone")
    depth = module.count(".") + (file.name == "__init__.py")
    if (root := str(file.resolve().parents[depth])) not in sys.path:
        sys.path.append(root)
    own_name = f"attune_function_{module.replace('.', '_')}"  # of no other module
    spec = importlib.util.spec_from_file_location(own_name, file)
    assert spec, "as of any file that ends in .py"
    assert spec.loader
    loaded = sys.modules[own_name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(loaded)
    except Exception as error:  # it may be anything, as the file is not ours
        raise ConfigError(f"function: {function}: {file} cannot be run: {type(error).__name__}: {error}") from error
    found = getattr(loaded, name, None)
    if not callable(found):
        raise ConfigError(f"function: {function}: {name} is no function, but {type(found).__name__}")
    return found


class Scorer:
    """What the function says of images; a `Reward`."""

    differentiable = False

    def __init__(self, function: Callable[..., Any], config: Config) -> None:
        self.license = config.license
        self.expected_range = config.range_of_mean({})
        self._function, self._name = function, config.function

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), on the images' device, of images (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: they are no such images, or the function has not given a finite number for each.
        """
        check_images(images, prompts)
        values = self._function(eight_bit(images), list(prompts))
        return checked_scores(values, len(images), f"function: {self._name}").to(images.device)


def load(config: Config, device: torch.device | str = "cpu") -> Scorer:
    """The scorer; the function gets arrays and decides itself where it computes. Raises ConfigError if it cannot."""
    return Scorer(load_function(config.function), config)
