"""One `attune repro` of the `short` profile, which all tests of the pipeline share."""

import shutil

import pytest
from clones import CODE, JUNK, PARAMS, ROOT, RUNS, STAGES, TRACER, Project


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Project:
    """A clone in which `attune repro` has succeeded once, two stages at a time; most later ones are `dvc repro`."""
    folder = tmp_path_factory.mktemp("clone")
    made = Project(folder, tmp_path_factory.mktemp("loaded"))
    for name in CODE:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=JUNK)
        else:
            shutil.copy(source, target)
    (folder / "src" / "sitecustomize.py").write_text(TRACER)
    for key, value in {"profile": "short", "runs": {name: PARAMS["runs"][name] for name in RUNS}}.items():
        (folder / "params.yaml").write_text(made.params(key, value, "params.yaml"))
    made.run("git", "init", "--quiet")
    made.run("git", "add", "--all")
    made.run("git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "-m", "clone")
    ran = made.side_by_side(tracking="on")
    assert sorted(ran) == sorted(STAGES)
    assert ran[0] == "prepare"
    assert ran[-1] == "report"
    return made
