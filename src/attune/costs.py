"""What a stage costs: seconds, memory, energy and samples through the denoiser, as every process measures of itself.

`measured` writes .checkpoints/costs/<profile>/<stage>.json while the stage works, so that a kill loses half a minute of
it at most; `read_costs` reads all of a profile. A training that is stopped and goes on from its checkpoint has several
parts, which are added up. Of several processes that train together, each has a file. Nothing depends on these numbers.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

from attune.files import write_atomically
from attune.paths import COSTS, TIMES, project_root

FIRST_NOTE, SHARE, LAST_NOTE = (
    1.0,
    0.05,
    30.0,
)  # s to the first note, then a share of the time so far, at most so many s
JOULES_PER_WATT_HOUR = 3600.0
_denoised = [0]


@dataclass(frozen=True)
class Cost:
    """What was measured of a stage, or of one process of a part of it; None where it cannot be measured."""

    seconds: float  # of the main process
    cpu_seconds: float  # of all processes, in their own code and the system's, with their ended children
    device: str  # a GPU's name, or the CPU's
    processes: int
    peak_memory: int  # bytes of resident memory, of all processes
    denoiser_samples: int | None  # rows of the denoiser's calls, with and without gradient; guidance doubles them
    energy_wh: float | None  # of the GPUs used, as NVML counts it: the whole card, whoever else uses it
    peak_gpu_memory: int | None = None  # bytes of tensors, of all processes


@dataclass(frozen=True)
class Reading:
    """The counters of this process at one moment."""

    at: float  # s
    cpu_seconds: float
    denoised: int
    device: str
    peak_memory: int  # bytes
    gpu: tuple[str, int] | None = None  # UUID of the one that is used, and the most bytes of tensors on it
    joules: Mapping[str, float] = field(default_factory=dict)  # GPU's UUID -> since its driver was loaded


def count_denoised(samples: int) -> None:
    """Adds to this process's counter. Like the system's of CPU time it only grows; a cost is what lies between two."""
    _denoised[0] += samples


@contextmanager
def measured(profile: str, stage: str, plan: str, *, resumed: bool, rank: int = 0) -> Iterator[Callable[[], Cost]]:
    """Measures the with-body; gives a function that says what it has cost so far, with its earlier parts.

    Args:
        plan: identifies the work; parts of another plan are forgotten.
        resumed: whether the work goes on from a checkpoint, so that earlier parts count.
        rank: of this process, among those that do the work together.
    """
    file = _file(project_root(), profile, stage, rank)
    parts, began, over = (_parts(file, plan) if resumed else []), read_counters(), threading.Event()

    def note() -> Cost:
        now = between(began, read_counters())
        with suppress(OSError):  # a full disk costs the note, not the work
            write_atomically(file, json.dumps({"plan": plan, "parts": [*map(asdict, parts), asdict(now)]}).encode())
        return reduce(one_after_another, [*parts, now])

    def note_now_and_then() -> None:
        while not over.wait(pause(read_counters().at - began.at)):
            note()

    thread = threading.Thread(target=note_now_and_then, name=f"costs of {stage}", daemon=True)
    thread.start()
    try:
        yield note
    finally:
        over.set()
        thread.join()
        note()


def read_costs(profile: str, works: Mapping[str, str] | None = None) -> dict[str, Cost]:
    """Stage (`align@spo`) -> what it cost the last time it ran here; empty where nothing has run.

    Args:
        works: stage -> what identifies the work (`measured`): of other stages, and of other work, nothing is told.
    """
    found: dict[str, Cost] = {}
    folder = project_root() / COSTS / profile
    for file in sorted(folder.glob("*.json")):
        stage, _, rank = file.stem.partition(".")
        if rank or not (content := _content(file)):
            continue
        if works is not None and works.get(stage) != content["plan"]:
            continue
        others = [_parts(other, content["plan"]) for other in sorted(folder.glob(f"{stage}.*.json"))]
        each = [reduce(one_after_another, parts) for parts in (_parts(file, content["plan"]), *others) if parts]
        if each:
            found[stage] = reduce(side_by_side, each)
    return found


def noted_seconds() -> dict[str, float]:
    """Stage -> how long it took here the last time."""
    with suppress(OSError, ValueError, AttributeError):
        known = json.loads((project_root() / TIMES).read_text()).items()
        return {stage: float(seconds) for stage, seconds in known if isinstance(seconds, int | float)}
    return {}


def one_after_another(first: Cost, second: Cost) -> Cost:
    """Two parts of one process's work."""
    return replace(
        second,
        seconds=first.seconds + second.seconds,
        cpu_seconds=first.cpu_seconds + second.cpu_seconds,
        peak_memory=max(first.peak_memory, second.peak_memory),
        denoiser_samples=_known(sum, first.denoiser_samples, second.denoiser_samples),
        energy_wh=_known(sum, first.energy_wh, second.energy_wh),
        peak_gpu_memory=_known(max, first.peak_gpu_memory, second.peak_gpu_memory),
    )


def side_by_side(main: Cost, other: Cost) -> Cost:
    """Two processes that worked at the same time, each on a GPU of its own where there are GPUs."""
    return replace(
        main,
        cpu_seconds=main.cpu_seconds + other.cpu_seconds,
        processes=main.processes + other.processes,
        peak_memory=main.peak_memory + other.peak_memory,
        denoiser_samples=_known(sum, main.denoiser_samples, other.denoiser_samples),
        energy_wh=_known(sum, main.energy_wh, other.energy_wh),
        peak_gpu_memory=_known(sum, main.peak_gpu_memory, other.peak_gpu_memory),
    )


def between(first: Reading, last: Reading) -> Cost:
    """The cost of this process between two readings."""
    card, memory = last.gpu or ("", None)
    both = card in first.joules.keys() & last.joules.keys()
    return Cost(
        seconds=round(last.at - first.at, 2),
        cpu_seconds=round(last.cpu_seconds - first.cpu_seconds, 2),
        device=last.device,
        processes=1,
        peak_memory=last.peak_memory,
        denoiser_samples=(last.denoised - first.denoised) or None,
        energy_wh=round((last.joules[card] - first.joules[card]) / JOULES_PER_WATT_HOUR, 4) if both else None,
        peak_gpu_memory=memory,
    )


def read_counters() -> Reading:
    """This process's counters now."""
    name, gpu = _device()
    return Reading(time.monotonic(), sum(os.times()[:4]), _denoised[0], name, _peak_memory(), gpu, _joules())


def pause(elapsed: float) -> float:
    """Seconds from one measurement to the next: short stages have some, and a day's training some thousands."""
    return min(LAST_NOTE, max(FIRST_NOTE, SHARE * elapsed))


def _joules() -> dict[str, float]:
    """GPU -> J; {} without `nvidia-ml-py` or a GPU, and without those that do not count (before Volta, MIG parts)."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except Exception:  # the package is not there, or the driver
        return {}
    found = {}
    for index in range(nvml.nvmlDeviceGetCount()):
        with suppress(nvml.NVMLError):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            found[str(nvml.nvmlDeviceGetUUID(handle))] = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    return found


def _device() -> tuple[str, tuple[str, int] | None]:
    """The name of what computes; of a GPU also its UUID as NVML writes it, and the most bytes of tensors so far.

    A process that has not imported torch uses no GPU; a thread may come upon a torch that is half imported.
    """
    torch: Any = sys.modules.get("torch")
    with suppress(AttributeError):
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
            return torch.cuda.get_device_name(), (f"GPU-{uuid}", torch.cuda.max_memory_allocated())
    return _cpu(), None


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _peak_memory() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # of `ru_maxrss`
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _known(join: Callable[[Sequence[Any]], Any], *values: Any) -> Any:
    """The sum or the largest of those values that are known; None where none is."""
    known = [value for value in values if value is not None]
    return join(known) if known else None


def _file(root: Path, profile: str, stage: str, rank: int) -> Path:
    return root / COSTS / profile / (f"{stage}.{rank}.json" if rank else f"{stage}.json")


def _content(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        content = json.loads(file.read_text())
        return content if isinstance(content, dict) and content.keys() >= {"plan", "parts"} else {}
    return {}


def _parts(file: Path, plan: str) -> list[Cost]:
    """The parts of a process's work on this plan; none of a file that another version has written."""
    content = _content(file)
    with suppress(TypeError):
        return [Cost(**part) for part in content["parts"]] if content.get("plan") == plan else []
    return []
