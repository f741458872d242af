"""Which of our modules a stage runs, and what identifies their code: a comment or a docstring does not count.

Modules are found by the imports that stand in them, also inside functions. What is loaded by name (a method, a scorer)
is in no import, so the plan adds it.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

SRC = Path(__file__).parents[2]
TEMPLATES = (".j2", ".css")
NAMES = ("config", "costs", "last_output", "licenses", "planning", "sharing", "stages.preloaded", "text", "tracking")
NO_EFFECT = tuple(f"attune.{name}" for name in NAMES)
"""What changes no result: tracking is a view, costs are measured beside the work, what config decides is in the plan
itself, model cards, licences and messages are for people, a last output is only what would be made again, and it does
not matter which process has imported a library."""


def code_digests(start: Iterable[str], without: str = "") -> dict[str, str]:
    """Module -> digest of its code, of all modules that importing and running `start` reaches.

    Args:
        without: a module that is imported and not run, with what only it reaches.
    """
    return {module: digest(module) for module in sorted(closure(start, without))}


def closure(start: Iterable[str], without: str = "") -> set[str]:
    """The modules of attune that `start` reaches by imports, themselves included, packages too."""
    seen: set[str] = set()
    todo = [module for module in start]
    while todo:
        module = todo.pop()
        if module in (without, *seen) or module.startswith(NO_EFFECT):
            continue
        seen.add(module)
        todo += imports(module)
        parent = module.rpartition(".")[0]
        todo += [parent] if parent else []
    return seen


@cache
def file_of(module: str) -> Path | None:
    """The module's file; None if there is no module of that name."""
    path = SRC.joinpath(*module.split("."))
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


@cache
def imports(module: str) -> tuple[str, ...]:
    """The modules of attune that a module imports when it runs; what is for type checkers only is left out."""
    found = set()
    for node in _running(_tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return tuple(sorted(name for name in found if name.split(".")[0] == "attune" and file_of(name)))


@cache
def digest(module: str) -> str:
    """First 12 hex digits of the SHA-256 of the module's code without comments, docstrings and layout.

    A package's templates and style sheets, which its modules fill in, count as code of the package.
    """
    tree = _tree(module)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [child for child in node.body if not _is_docstring(child)] or [ast.Pass()]
    found = hashlib.sha256(ast.dump(tree).encode())
    for file in _templates(module):
        found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()[:12]


def _templates(module: str) -> list[Path]:
    file = file_of(module)
    if file is None or file.name != "__init__.py":
        return []
    return sorted(path for path in file.parent.iterdir() if path.suffix in TEMPLATES)


def _tree(module: str) -> ast.Module:
    file = file_of(module)
    if file is None:
        raise ModuleNotFoundError(f"no module {module}")
    return ast.parse(file.read_text(encoding="utf-8"))


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below one, without the bodies of `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from _running(child)


def _is_docstring(node: ast.AST) -> bool:
    """A bare string: documentation of a module, a function, a class or a constant."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
