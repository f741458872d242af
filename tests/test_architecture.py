"""The house rules: who may import whom, what DVC must watch, and how large things may grow.

The rules are data at the top of this file; a new module must be given a place in `LAYERS`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import grimp
import pytest
from ruamel.yaml import YAML

from attune.config import check as config
from attune.config import plugins

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"

# Top to bottom; a line imports only from lines below it, and modules on one line know nothing of each other.
# A name in brackets may be absent.
LAYERS = (
    "stages",
    "search",
    "aligning",
    "assembly | embedded | tracking",
    "painting",
    "methods | rewards | preference",
    "backbones | data | training | evaluation",
    "sources | diffusion.sampling | diffusion.noised | clip",
    "diffusion.policy | world",
    "diffusion.adapters | diffusion.process | diffusion.losses | weights",
    "interfaces",
    "config",
    "params",
    "plugins | hashing | blocks | places | sharing",
)
# importer -> imported, in spite of the layers
UPWARDS = {"plugins -> config": "a lazy import, for ConfigError alone"}
# files of these folders are plug-ins: they never import each other
INDEPENDENT = ("methods", "rewards", "backbones", "sources")

# library -> the only places that may import it
OWNERS = {
    "mlflow": ("tracking", "search"),
    "optuna": ("search",),
    "dvc": ("tracking", "search"),
    "peft": ("diffusion.policy",),
    "accelerate": ("training",),
    "argparse": ("stages",),
    "ruamel": ("config",),  # whoever wants params.yaml asks config
    "diffusers": ("backbones", "embedded"),
    # ...adapters are read and written with these two; no pipeline is seen
    "diffusers.loaders": ("diffusion.adapters",),
    "diffusers.utils": ("diffusion.adapters",),
    "yaml": (),  # PyYAML reads DVC's 1e-05 as a string
}
PURE = {"diffusion.process": {"torch"}, "diffusion.losses": {"torch"}}  # all else they need is the stdlib
TORCH_FREE = ("config", "plugins", "hashing", "tracking", "world", "evaluation")
HEAVY = {"torch", "transformers", "diffusers", "peft", "accelerate", "mlflow", "optuna"}
ENVIRONMENT = ("stages.common", "assembly", "places", "tracking", "search")  # may read os.environ
NAMES_THE_FILE = ("config", "stages", "tracking")  # may say "params.yaml"; only config opens it
READS_PARAMS = ("stages", "search")  # may call config.load and config.read_params

# Not watched by DVC: it cannot change an output, and a tweak of it must not retrain anything.
VIEW_ONLY = ("tracking",)
# Imports inside functions that only some stages run; () = its result goes to the tracking UI alone.
TAKEN_BY = {
    ("attune.build", "attune.spm.model"): ("align",),
    ("attune.finetune", "attune.evaluation.report.figures"): (),
}
# Sections of the profile that a stage reads and DVC need not watch for it.
UNWATCHED = {
    "align": {"generate"},  # how previews for the tracking UI are painted; a held-out score has its own sampling
}
# stage -> plug-ins that the code loads by name: kind -> where the name is in the profile, "*" = every block;
# ${key} and ${item.method} are a run's name and method, as in dvc.yaml
LOADS = {
    "prepare": {"backbones": "model.backbone", "sources": "data.source", "rewards": "*"},
    "train_preference": {"backbones": "model.backbone"},
    "align": {"backbones": "model.backbone", "methods": "${item.method}", "rewards": "methods.${key}.rewards"},
    "generate": {"backbones": "model.backbone"},
    "evaluate": {"rewards": "*"},
    "report": {},
}

FILE_LINES, FUNCTION_LINES = 300, 60


# --- reading the code -------------------------------------------------------------------------------------


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


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def walk(node: ast.AST, into_functions: bool = True) -> Iterator[ast.AST]:
    """All nodes that can run: `if TYPE_CHECKING:` is left out, function bodies on request."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        yield child
        if into_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from walk(child, into_functions)


@cache
def imports(module: str, into_functions: bool = True) -> frozenset[str]:
    """Dotted names a module imports; `from a import b` is `a.b` where that is a module of ours, else `a`."""
    found = set()
    for node in walk(tree(module), into_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in files() else node.module)
    return frozenset(found)


def ours(names: frozenset[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "attune"}


def closure(start: set[str], stage: str | None = None, into_functions: bool = True) -> set[str]:
    """First-party modules that importing and running `start` reaches, itself included."""
    seen, todo = set(), set(start)
    while todo:
        module = todo.pop()
        seen.add(module)
        for name in ours(imports(module, into_functions)) - seen:
            if stage is None or stage in TAKEN_BY.get((module, name), (stage,)):
                todo.add(name)
    return seen


def within(module: str, places: tuple[str, ...]) -> bool:
    """Whether a module is one of the places (`stages`, `diffusion.policy`) or inside one."""
    return any(module == f"attune.{place}" or module.startswith(f"attune.{place}.") for place in places)


def names_of(layer: str) -> list[str]:
    return [name.strip(" ()") for name in layer.split("|")]


def place_of(module: str) -> tuple[int, str] | None:
    """Level (0 = top) and name of the entry of LAYERS that holds the module."""
    for level, layer in enumerate(LAYERS):
        for name in names_of(layer):
            if within(module, (name,)):
                return level, name
    return None


# --- layers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("attune", cache_dir=None)


def is_container(module: str) -> bool:
    """attune itself and attune.diffusion: packages that only hold layers, and no code."""
    return any(f"attune.{name}".startswith(f"{module}.") for layer in LAYERS for name in names_of(layer))


def test_every_module_has_a_place_and_every_place_a_module(graph):
    modules = graph.modules
    lost = [m for m in modules if place_of(m) is None and not is_container(m)]
    assert not lost, f"give these a layer in LAYERS: {lost}"
    required = [name.strip() for layer in LAYERS for name in layer.split("|") if "(" not in name]
    gone = [name for name in required if f"attune.{name}" not in modules]
    assert not gone, f"LAYERS names modules that do not exist: {gone}"
    assert not [m for m in modules if is_container(m) and graph.find_modules_directly_imported_by(m)]


def test_imports_point_downwards(graph):
    wrong = []
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            above, below = place_of(importer), place_of(imported)
            if above is None or below is None or above == below:
                continue
            if above[0] >= below[0] and f"{above[1]} -> {below[1]}" not in UPWARDS:
                line = graph.get_import_details(importer=importer, imported=imported)[0]["line_number"]
                wrong.append(f"{importer}:{line} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_exceptions_are_still_needed(graph):
    edges = {
        f"{place_of(a)[1]} -> {place_of(b)[1]}"
        for a in graph.modules
        for b in graph.find_modules_directly_imported_by(a)
        if place_of(a) and place_of(b)
    }
    assert set(UPWARDS) <= edges
    for importer, imported in TAKEN_BY:
        assert imported in imports(importer), f"TAKEN_BY: {importer} no longer imports {imported}"
        assert imported not in imports(importer, into_functions=False), f"{importer} always imports {imported}"


def test_the_exceptional_import_is_lazy():
    assert not ours(imports("attune.config.plugins", into_functions=False))


@pytest.mark.parametrize("folder", INDEPENDENT)
def test_plug_ins_do_not_know_each_other(folder, graph):
    names = {f"attune.{folder}.{name}" for name in plugins.available(folder)}
    assert names
    for name in names:
        others = graph.find_modules_directly_imported_by(name) & (names - {name})
        assert not others, f"{name} imports {others}"


# --- libraries --------------------------------------------------------------------------------------------


def owners_of(imported: str) -> tuple[str, ...] | None:
    """The owners by the longest matching entry of OWNERS; None = anybody may import it."""
    parts = imported.split(".")
    for end in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:end])) in OWNERS:
            return OWNERS[prefix] + (OWNERS.get(parts[0], ()) if end > 1 else ())
    return None


def test_libraries_stay_with_their_owners():
    wrong = []
    for module in files():
        for imported in imports(module):
            owners = owners_of(imported)
            if owners is not None and not within(module, owners):
                wrong.append(f"{module} imports {imported}; only {owners} may")
    assert not wrong, "\n".join(wrong)


NEED_NO_USER = {"dvc", "yaml"}


@pytest.mark.parametrize("library", sorted(set(OWNERS) - NEED_NO_USER))
def test_owned_libraries_are_really_used(library):
    users = [m for m in files() if any(i == library or i.startswith(f"{library}.") for i in imports(m))]
    assert users, f"OWNERS speaks of {library}, which nobody imports"


@pytest.mark.parametrize("module", PURE)
def test_pure_mathematics_needs_torch_only(module):
    foreign = {name.split(".")[0] for name in imports(f"attune.{module}")} - set(sys.stdlib_module_names)
    assert foreign == PURE[module]


def heavy_imports(start: set[str], into_functions: bool) -> list[str]:
    reached = closure(start, into_functions=into_functions)
    pairs = [(m, i) for m in sorted(reached) for i in imports(m, into_functions)]
    return [f"{m} imports {i}" for m, i in pairs if i.split(".")[0] in HEAVY]


@pytest.mark.parametrize("place", TORCH_FREE)
def test_no_torch_in(place):
    modules = {m for m in files() if within(m, (place,))}
    assert modules
    found = heavy_imports(modules, into_functions=place not in ("plugins", "config", "tracking"))
    assert not found, found


@pytest.mark.parametrize("stage", LOADS)
def test_a_stage_checks_params_before_it_loads_anything_heavy(stage):
    found = heavy_imports({f"attune.stages.{stage}"}, into_functions=False)
    assert not found, found


def strings(module: str) -> Iterator[str]:
    """String constants of a module, docstrings and bare strings left out."""
    bare = {id(node.value) for node in ast.walk(tree(module)) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.value


def test_only_config_reads_params_yaml():
    knowing = [m for m in files() if any(re.search(r"\bparams\.yaml", text) for text in strings(m))]
    assert "attune.config.check" in knowing
    wrong = [m for m in knowing if not within(m, NAMES_THE_FILE)]
    assert not wrong, f"{wrong} know of params.yaml; they should be handed values"
    for module in files():
        for node in walk(tree(module)):
            if isinstance(node, ast.ImportFrom) and node.module == "attune.config.check":
                readers = {alias.name for alias in node.names} & {"load", "read_params"}
                assert not readers or within(module, READS_PARAMS), f"{module} reads params.yaml: {readers}"


def reads_environment(module: str) -> bool:
    names = {"environ", "getenv", "putenv"}
    used = {node.attr for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute)}
    taken = {
        alias.name
        for node in ast.walk(tree(module))
        if isinstance(node, ast.ImportFrom) and node.module == "os"
        for alias in node.names
    }
    return bool((used | taken) & names)


def test_the_environment_is_read_at_the_edges_only():
    wrong = [m for m in files() if reads_environment(m) and not within(m, ENVIRONMENT)]
    assert not wrong, wrong


# --- DVC --------------------------------------------------------------------------------------------------


def yaml(name: str) -> dict[str, Any]:
    return YAML(typ="safe").load(ROOT / name)


def filled(value: Any, slots: dict[str, str]) -> Any:
    """The value with every ${slot} filled in; a slot nobody knows is an error."""
    if isinstance(value, dict):
        return {filled(k, slots): filled(v, slots) for k, v in value.items()}
    if isinstance(value, list):
        return [filled(item, slots) for item in value]
    if isinstance(value, str):
        return re.sub(r"\$\{([^}]+)\}", lambda match: slots[match[1]], value)
    return value


@cache
def stages(profile: str) -> dict[str, dict[str, Any]]:
    """dvc.yaml's stages as DVC expands them: `align@spo` -> its cmd, deps, outs...; with one released adapter."""
    items = {"${run_methods}": yaml("params.yaml")["run_methods"], "${evaluate.extra}": {"released": "owner/name"}}
    expanded = {}
    for name, stage in yaml("dvc.yaml")["stages"].items():
        slots = {"profile": profile}
        if "foreach" not in stage:
            expanded[name] = filled(stage, slots)
            continue
        for key, item in items[stage["foreach"]].items():
            fields = {f"item.{k}": v for k, v in item.items()} if isinstance(item, dict) else {"item": item}
            more = {"key": key} | fields
            expanded[f"{name}@{key}"] = filled(stage["do"], slots | more)
    return expanded


PROFILES = list(yaml("params.yaml")["profiles"])
STAGES = list(stages(PROFILES[0]))


def entry(stage: dict[str, Any]) -> str:
    """Name of the stage module its command runs."""
    return re.fullmatch(
        r"PYTHONPATH=src python -m attune\.stages\.(\w+)( --method \w+)?( --run [\w-]+)?( --adapter '[^']+')?",
        stage["cmd"],
    )[1]


def chosen(name: str, stage: dict[str, Any], profile: dict[str, Any]) -> set[str]:
    """Plug-in modules the stage loads by name."""
    found = set()
    for kind, where in LOADS[entry(stage)].items():
        if where == "*":
            loaded = list(profile["scorers"])
        elif where == "${item.method}":
            loaded = re.findall(r" --method ([\w-]+)", stage["cmd"])
        elif where == "methods.${key}.rewards":
            loaded = list(profile["methods"][name.partition("@")[2]].get("rewards", {}))
        else:
            section, key = where.split(".")
            loaded = [profile[section][key]]
        found |= {f"attune.{kind}.{plugin}" for plugin in loaded}
    return found


def asks_scorers(name: str, stage: dict[str, Any]) -> bool:
    """Whether the stage loads scorers, which is a matter of the method's settings."""
    profiles = yaml("params.yaml")["profiles"].values()
    return any(module.startswith("attune.rewards.") for p in profiles for module in chosen(name, stage, p))


def has_code(module: str) -> bool:
    """False for an __init__.py with only a docstring: it cannot change an output."""
    return files()[module].name != "__init__.py" or len(tree(module).body) > 1


def reached_by(name: str, stage: dict[str, Any], profile: dict[str, Any]) -> dict[Path, str]:
    """Files (relative to the repository) that can change the stage's outputs -> their module."""
    start = {f"attune.stages.{entry(stage)}"} | chosen(name, stage, profile)
    modules = {m for m in closure(start, entry(stage)) if not within(m, VIEW_ONLY)}
    packages = {".".join(m.split(".")[:n]) for m in modules for n in range(1, m.count(".") + 1)}
    return {files()[m].relative_to(ROOT): m for m in modules | packages if has_code(m)}


def covered(file: Path, deps: list[str]) -> bool:
    return any(file == Path(dep) or Path(dep) in file.parents for dep in deps)


def each_stage() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for profile_name in PROFILES:
        profile = yaml("params.yaml")["profiles"][profile_name]
        for name, stage in stages(profile_name).items():
            yield f"{name} (profile {profile_name})", stage, profile


def test_dvc_watches_all_code_a_stage_runs():
    missing = []
    for label, stage, profile in each_stage():
        name = label.split(" ")[0]
        gaps = [f for f in reached_by(name, stage, profile) if not covered(f, stage["deps"])]
        missing += [f"{label}: {file}" for file in sorted(gaps)]
    assert not missing, "add to deps in dvc.yaml (or forget the import):\n" + "\n".join(missing)


def test_dvc_watches_nothing_that_a_stage_does_not_run():
    """In none of the profiles: one may need no oracle, and so nothing of the embedded world."""
    used: dict[str, set[str]] = {}
    watched: dict[str, set[str]] = {}
    for label, stage, profile in each_stage():
        name = label.split(" ")[0]
        used.setdefault(name, set()).update(reached_by(name, stage, profile))
        watched.setdefault(name, set()).update(dep for dep in stage["deps"] if dep.startswith("src"))
    for name, dep in ((name, dep) for name, deps in watched.items() for dep in deps):
        assert (ROOT / dep).exists(), f"{name}: {dep} does not exist"
    stale = [f"{n}: {d}" for n, deps in watched.items() for d in deps if not any(covered(f, [d]) for f in used[n])]
    assert not stale, "remove from deps in dvc.yaml:\n" + "\n".join(sorted(stale))


@pytest.mark.parametrize("name", STAGES)
def test_one_file_per_plug_in_is_one_stage_to_rerun(name):
    """align@spo must not watch another method's file, or touching that one would retrain it."""
    for dep in stages(PROFILES[0])[name]["deps"]:
        assert dep not in ("src", "src/attune", "src/attune/methods", "src/attune/stages"), f"{name}: {dep}"


@pytest.mark.parametrize("name", STAGES)
def test_outputs_keep_the_run_cache(name):
    """DVC forgets how to restore a stage that has an uncached or persistent out (mlops.md 1.2)."""
    stage = stages(PROFILES[0])[name]
    assert stage["outs"]
    for out in stage["outs"]:
        options = next(iter(out.values())) if isinstance(out, dict) else {}
        assert options.get("cache", True), f"{name}: outs must be cached; small metrics belong under metrics"
        assert not options.get("persist", False), f"{name}: a persistent out holds the previous run's model"
    assert not stage.get("always_changed", False)
    assert not stage.get("frozen", False)


def sections_read(stage_name: str) -> set[str]:
    """Sections of the profile (`profile.<section>`) that a stage's module, or assembly for it, reads."""
    assembly = {f.name: f for f in tree("attune.build").body if isinstance(f, ast.FunctionDef)}
    todo, seen, found = [tree(f"attune.stages.{stage_name}")], set(), set()
    while todo:
        for node in walk(todo.pop()):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "profile":
                found.add(node.attr)
            if isinstance(node, ast.Name) and node.id in assembly and node.id not in seen:
                seen.add(node.id)
                todo.append(assembly[node.id])
    return found


@pytest.mark.parametrize("name", STAGES)
def test_dvc_watches_all_parameters_a_stage_reads(name):
    stage, prefix = stages(PROFILES[0])[name], f"profiles.{PROFILES[0]}."
    watched = {p.removeprefix(prefix).split(".")[0] for p in stage["params"] if p.startswith(prefix)}
    unwatched = sections_read(entry(stage)) - watched - UNWATCHED.get(name.partition("@")[0], set())
    if "rewards" in LOADS[entry(stage)] and not asks_scorers(name, stage):
        unwatched -= {"scorers"}  # a new scorer to evaluate with must not retrain what never asks one
    assert not unwatched, f"{name} reads {unwatched}: add to its params in dvc.yaml"
    assert "profile" in stage["params"], f"{name}: a change of profile must rerun it"
    if entry(stage) == "align":
        run = name.partition("@")[2]
        assert f"{prefix}methods.{run}" in stage["params"]
        assert f"{prefix}methods" not in stage["params"], "another method's beta must not retrain this one"


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_is_valid(name, tmp_path):
    values = yaml("params.yaml") | {"profile": name}
    with (tmp_path / "params.yaml").open("w") as file:
        YAML().dump(values, file)
    params, profile = config.load(tmp_path / "params.yaml")
    assert params.profile == name
    assert set(params.run_methods) <= set(profile.methods)


# --- budgets and habits -----------------------------------------------------------------------------------


def test_files_stay_short():
    long = {m: n for m, p in files().items() if (n := len(p.read_text().splitlines())) > FILE_LINES}
    assert not long, f"over {FILE_LINES} lines: {long}"


def test_functions_stay_short():
    long = {
        f"{module}.{node.name}": lines
        for module in files()
        for node in ast.walk(tree(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := node.end_lineno - node.lineno + 1) > FUNCTION_LINES
    }
    assert not long, f"over {FUNCTION_LINES} lines: {long}"


def calls(module: str) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nobody_prints():
    found = [f"{m}:{node.lineno}" for m in files() for name, node in calls(m) if name == "print"]
    assert not found, f"use logging, tqdm or a file: {found}"


def test_no_bare_except():
    handlers = [(m, node) for m in files() for node in ast.walk(tree(m)) if isinstance(node, ast.ExceptHandler)]
    assert handlers
    bare = [f"{m}:{node.lineno}" for m, node in handlers if node.type is None]
    assert not bare, bare


def test_weights_are_never_unpickled_unsafely():
    unsafe = []
    for module in files():
        for name, node in calls(module):
            options = {k.arg: k.value for k in node.keywords}
            value = options.get("weights_only")
            safe = isinstance(value, ast.Constant) and value.value is True
            if (name in ("torch.load", "load_torch") or "weights_only" in options) and not safe:
                unsafe.append(f"{module}:{node.lineno}")
            if name.split(".")[0] in ("pickle", "joblib", "dill") or name == "torch.serialization.load":
                unsafe.append(f"{module}:{node.lineno}")
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.ImportFrom) and node.module in ("torch", "pickle"):
                hidden = {alias.name for alias in node.names} & {"load", "loads", "Unpickler"}
                unsafe += [f"{module}:{node.lineno}"] if hidden else []
    assert not unsafe, f"torch.load needs weights_only=True, and nothing may be unpickled: {unsafe}"
