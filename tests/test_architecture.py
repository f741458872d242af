"""The house rules: who may import whom, which libraries stay where, and how large things may grow."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import grimp
import pytest

from attune.config import plugins
from attune.planning import code

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"

# Top to bottom: a line imports only from lines below it, and modules on one line know nothing of each other.
LAYERS = (
    "__main__",
    "stages",
    "inspection",
    "search | planning | sharing | pipeline",
    "finetune",
    "build | labelling | tracking",
    "methods | rewards | spm | diffusion.generate",
    "backbones | data | training | evaluation",
    "diffusion.ddim | diffusion.inversion | diffusion.noised | clip",
    "diffusion.policy | diffusion.path | world",
    "diffusion.lora | diffusion.noise | diffusion.process | diffusion.losses",
    "diffusion.lora_files | diffusion.lora_layers",
    "diffusion.lora_scale | interfaces | pretrained",
    "last_output",
    "copies",
    "config",
    "weights | licenses",
    "averages | costs | hub | hub_upload | process_groups | shards",
    "files | paths | distributed | fsdp | stop | text | versions",
)
# library -> the only places that may import it
OWNERS = {
    "mlflow": ("tracking", "search"),
    "optuna": ("search",),
    "dvc": ("stages.repro_worker",),
    "peft": ("diffusion",),
    "accelerate": ("training",),
    "argparse": ("__main__", "stages"),
    "jinja2": ("evaluation.report.page", "inspection"),
    "ruamel": ("config",),
    "diffusers": ("backbones", "diffusion.lora", "diffusion.lora_files", "pretrained", "sharing.pipeline"),
    "huggingface_hub": ("hub", "hub_upload"),
    "fastapi": ("labelling.app",),
    "rich": ("pipeline.screen",),
    "uvicorn": ("labelling.server",),
    "sqlite3": ("labelling.store", "tracking"),
    "yaml": (),  # PyYAML reads DVC's 1e-05 as a string
}
PURE = {"diffusion.process": {"torch"}, "diffusion.losses": {"torch"}}  # all else they need is the standard library
SHARING = ("sample", "package", "push")
SLOW = {"transformers", "diffusers", "peft", "accelerate", "mlflow", "optuna"}
ENVIRONMENT = (
    "__main__",
    "stages.common",
    "stages.preloaded",
    "stages.repro",
    "stages.repro_worker",
    "config.plan",
    "build",
    "last_output",
    "copies",
    "paths",
    "tracking",
    "search",
    "rewards.http",
)  # may read os.environ
FILE_LINES, FUNCTION_LINES, TEST_LINES = 300, 60, 400


@cache
def files() -> dict[str, Path]:
    """Module name -> file, for all of src."""
    found = {}
    for path in sorted(SRC.rglob("*.py")):
        parts = path.with_suffix("").relative_to(SRC).parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(files()[module].read_text(encoding="utf-8"))


def within(module: str, places: tuple[str, ...]) -> bool:
    return any(module == f"attune.{place}" or module.startswith(f"attune.{place}.") for place in places)


def place_of(module: str) -> tuple[int, str] | None:
    """Level (0 = top) and name of the longest entry of LAYERS that holds the module."""
    entries = [(level, name.strip()) for level, layer in enumerate(LAYERS) for name in layer.split("|")]
    return max((e for e in entries if within(module, (e[1],))), key=lambda e: len(e[1]), default=None)


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("attune", cache_dir=None, exclude_type_checking_imports=True)


def test_every_module_has_a_place(graph):
    lost = [m for m in graph.modules if place_of(m) is None and m not in ("attune", "attune.diffusion")]
    assert not lost, f"give these a layer in LAYERS: {lost}"
    gone = [n.strip() for layer in LAYERS for n in layer.split("|") if f"attune.{n.strip()}" not in graph.modules]
    assert not gone, f"LAYERS names modules that do not exist: {gone}"


def test_imports_point_downwards(graph):
    wrong = []
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            above, below = place_of(importer), place_of(imported)
            if above and below and above != below and above[0] >= below[0]:
                wrong.append(f"{importer} imports {imported}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kind", plugins.KINDS)
def test_plug_ins_do_not_know_each_other(kind, graph):
    names = {plugins.module_name(kind, name) for name in plugins.available(kind)}
    assert names
    for name in names:
        others = graph.find_modules_directly_imported_by(name) & (names - {name})
        assert not others, f"{name} imports {others}"


def imported_libraries(module: str) -> Iterator[str]:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            yield node.module


def test_libraries_stay_with_their_owners():
    wrong = [
        f"{module} imports {name}; only {OWNERS[name.split('.')[0]]} may"
        for module in files()
        for name in imported_libraries(module)
        if name.split(".")[0] in OWNERS and not within(module, OWNERS[name.split(".")[0]])
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", PURE)
def test_pure_mathematics_needs_torch_only(module):
    foreign = {name.split(".")[0] for name in imported_libraries(f"attune.{module}")} - set(sys.stdlib_module_names)
    assert foreign == PURE[module]


def loaded_by(statement: str) -> set[str]:
    """Top-level packages that a fresh Python has loaded after a statement."""
    import subprocess

    script = f"import sys; {statement}; print(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": str(SRC)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_settings_are_checked_without_slow_libraries():
    """All plug-ins are imported for that, and a mistake must be told in two seconds."""
    every = [(kind, name) for kind in plugins.KINDS for name in plugins.available(kind)]
    found = loaded_by(
        f"from attune.config import plugins; [plugins.load(*p) for p in {every!r}]; import attune.stages.plan"
    )
    assert not found & SLOW


@pytest.mark.parametrize(
    "stage", ["prepare", "train_preference", "align", "generate", "evaluate", "report", "sweep", *SHARING]
)
def test_a_stage_reads_its_plan_before_it_loads_anything_slow(stage):
    assert not loaded_by(f"import attune.stages.{stage}") & SLOW


def test_the_environment_is_read_at_the_edges_only():
    wrong = [m for m in files() if "os.environ" in ast.unparse(tree(m)) and not within(m, ENVIRONMENT)]
    assert not wrong, wrong


def test_code_that_is_reached_is_known_to_the_plan():
    """A change of dpo.py concerns the runs of dpo; what all of them share concerns all."""
    dpo = code.closure(["attune.stages.align", "attune.methods.dpo"])
    assert {"attune.methods.dpo", "attune.finetune", "attune.diffusion.losses", "attune.training.loop"} <= dpo
    assert not {"attune.methods.spo", "attune.spm.model", "attune.spm.objective", "attune.rewards.hpsv2"} & dpo
    assert not [module for module in dpo if module.startswith(("attune.tracking", "attune.config", "attune.search"))]


def test_files_and_functions_stay_short():
    long = {m: n for m, p in files().items() if (n := len(p.read_text().splitlines())) > FILE_LINES}
    long |= {
        f"{module}.{node.name}": lines
        for module in files()
        for node in ast.walk(tree(module))
        if isinstance(node, ast.FunctionDef) and (lines := node.end_lineno - node.lineno + 1) > FUNCTION_LINES
    }
    tests = {p.relative_to(ROOT): len(p.read_text().splitlines()) for p in (ROOT / "tests").rglob("*.py")}
    long |= {path: n for path, n in tests.items() if n > TEST_LINES}
    assert not long


def test_habits():
    """No print, no bare except, no exec, and weights are never unpickled unsafely."""
    found = []
    for module in files():
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                found.append(f"{module}:{node.lineno} bare except")
            if not isinstance(node, ast.Call):
                continue
            name, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in ("print", "exec", "eval") or name.split(".")[0] in ("pickle", "joblib", "dill"):
                found.append(f"{module}:{node.lineno} {name}")
            if (name.endswith("torch.load") or "weights_only" in options) and options.get("weights_only") != "True":
                found.append(f"{module}:{node.lineno} {name} without weights_only=True")
    assert not found, "\n".join(found)
