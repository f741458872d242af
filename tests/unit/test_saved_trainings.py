"""What trainings that did not end have left behind: what `make plan` lists and `make clean-checkpoints` removes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

from attune.config.plan import StagePlan, to_json
from attune.planning import checkpoints as saved
from attune.planning.checkpoints import saved_trainings
from attune.stages import clean_checkpoints, common
from attune.training.checkpoint import resumable

PLAN = StagePlan(profile="tiny", code={"attune.methods.dpo": "1"})
OTHERS = {
    "resumable": PLAN,
    "stale": PLAN.model_copy(update={"code": {"attune.methods.dpo": "2"}}),
    "of another profile": PLAN.model_copy(update={"profile": "sd15"}),
}


class Died(Exception):
    """As if the process had been killed."""


def leave(root: Path, stage: str, plan: StagePlan) -> Path:
    """The checkpoint folder of a training that ended after it had saved."""
    found = []

    def training():
        with resumable(root, stage, plan, []) as checkpoint:
            checkpoint.file.write_bytes(b"0" * 1000)
            found.append(checkpoint.folder)
            raise Died

    with pytest.raises(Died):
        training()
    return found[0]


@pytest.fixture
def left(tmp_path) -> dict[str, Path]:
    folders = {state: leave(tmp_path, f"align@{i}", plan) for i, (state, plan) in enumerate(OTHERS.items())}
    (tmp_path / ".checkpoints/runs").mkdir()  # ids of tracked runs, which are no checkpoints
    (folders["stale"] / "state.pt").unlink()
    (folders["stale"] / "pieces-1").mkdir()  # each process's pieces, in a folder of their own
    (folders["stale"] / "pieces-1/shard-00001.safetensors").write_bytes(b"0" * 1000)
    old = tmp_path / ".checkpoints/align-old-123"  # of a version that wrote no about.json
    old.mkdir()
    (old / "state.pt").write_bytes(b"")
    return folders | {"old": old}


def test_each_is_what_it_is(tmp_path, left):
    plans = {Path("plan/align-dpo.json"): to_json(PLAN)}
    found = {training.folder: training for training in saved_trainings(tmp_path, "tiny", plans)}
    assert {folder: training.state for folder, training in found.items()} == {
        left["resumable"]: "resumable",
        left["stale"]: "stale",
        left["of another profile"]: "of another profile",
        left["old"]: "stale",
    }
    about = len((left["stale"] / "about.json").read_text())
    assert found[left["stale"]].size == 1000 + about
    assert str(found[left["old"]]) == "align-old-123: 0.0 MB, stale"
    with FileLock(left["stale"].with_suffix(".lock")):
        states = [training.state for training in saved_trainings(tmp_path, "tiny", plans)]
    assert states.count("running") == 1


@pytest.mark.parametrize("everything", [False, True])
def test_only_what_nothing_will_read_is_removed_unless_all_is(tmp_path, left, monkeypatch, capsys, everything):
    class Tiny:
        profile = "tiny"

    monkeypatch.setattr(clean_checkpoints, "load", Tiny)
    monkeypatch.setattr(clean_checkpoints, "texts", lambda settings: {Path("a"): to_json(PLAN)})
    monkeypatch.setattr(clean_checkpoints, "project_root", lambda: tmp_path)
    monkeypatch.setattr("sys.argv", ["clean", *(["--all"] if everything else [])])
    with FileLock(left["of another profile"].with_suffix(".lock")):  # it runs
        clean_checkpoints.main()
    kept = {"of another profile"} | (set() if everything else {"resumable"})
    assert {state for state, folder in left.items() if folder.exists()} == kept
    assert not left["stale"].with_suffix(".lock").exists()
    said = capsys.readouterr().out.splitlines()
    assert said[-1].endswith(f"MB of {tmp_path / '.checkpoints'} are free again")
    assert len(said) == 5


@pytest.mark.parametrize("text", ["[]", '{"stage": "x"}', "{", "7"])
def test_a_damaged_note_is_stale(tmp_path, text):
    folder = leave(tmp_path, "align@x", PLAN)
    (folder / "about.json").write_text(text)
    folder.with_suffix(".lock").unlink(missing_ok=True)
    (training,) = saved_trainings(tmp_path, "tiny", {})
    assert training.state == "stale"
    assert not folder.with_suffix(".lock").exists()  # asking leaves nothing behind


def test_a_folder_on_another_disk_is_removed_with_its_link(tmp_path):
    folder = leave(tmp_path, "align@x", PLAN)
    elsewhere = tmp_path / "scratch"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    (training,) = saved_trainings(tmp_path, "tiny", {})
    assert saved.remove(training)
    assert not elsewhere.exists()
    assert not folder.is_symlink()


def test_shards_on_another_disk_are_removed_with_their_link(tmp_path):
    folder, elsewhere = tmp_path / ".checkpoints/generate-tiny-dpo", tmp_path / "scratch"
    elsewhere.mkdir()
    folder.parent.mkdir()
    folder.symlink_to(elsewhere)
    (elsewhere / "about.json").write_text('{"done": true}')
    saved.remove_done(tmp_path)
    assert not elsewhere.exists()
    assert not folder.is_symlink()


def test_shards_that_a_stage_takes_up_again_are_not_removed_by_one_beside_it(tmp_path):
    folder = tmp_path / ".checkpoints/generate-tiny-dpo"
    folder.mkdir(parents=True)
    (folder / "about.json").write_text('{"done": true}')
    with FileLock(folder.with_suffix(".lock")):
        saved.remove_done(tmp_path)
        assert folder.exists()
    saved.remove_done(tmp_path)
    assert not folder.exists()


def test_stages_that_end_at_the_same_time_all_note_their_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "project_root", lambda: tmp_path)
    (tmp_path / ".checkpoints").mkdir()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: common.note_seconds(f"generate@{i}", i), range(64)))
    assert json.loads((tmp_path / ".checkpoints/seconds.json").read_text()) == {f"generate@{i}": i for i in range(64)}


def test_the_plan_that_identifies_a_checkpoint_is_the_plan_file(tmp_path):
    """What `resumable` hashes is what the file holds, so that a training is found by its plan."""
    folder = leave(tmp_path, "align@x", PLAN)
    about = json.loads((folder / "about.json").read_text())
    assert about == {"stage": "align@x", "profile": "tiny", "plan": saved.values_sha(json.loads(to_json(PLAN)))}


@pytest.mark.parametrize(
    ("error", "lacking"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . can't allocate memory: you tried to allocate 5"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_a_lack_of_memory_is_told_from_other_errors(error, lacking):
    assert common.is_out_of_memory(error) is lacking


def test_a_stage_without_memory_says_what_to_lower(monkeypatch):
    class Quiet:
        tracking, tools = None, {}

    monkeypatch.setattr(common, "read", lambda kind, stage: Quiet)

    def work():
        with common.stage("align@dpo", PLAN, {}):
            raise RuntimeError("can't allocate memory: you tried to allocate 512 bytes\nframe 1")

    with pytest.raises(SystemExit) as stop:
        work()
    assert str(stop.value) == (
        "align@dpo: out of memory (can't allocate memory: you tried to allocate 512 bytes): lower batch_size of the "
        "run in methods, with accumulation as many times higher, or set gradient_checkpointing"
    )
