"""The machine's CPU, memory, disk, network and GPUs while a run goes on, as MLflow's tab System metrics shows them."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

PREFIX = "system/"  # the UI shows what begins so in a tab of its own, over time
SWITCH = "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"  # MLflow's own, and false is the only value that counts here
FIRST_POINT = 0.2  # s after the start: CPU use is of the time between two points
PAUSES = (1.0, 0.05, 60.0)  # s to the second point; later a share of the time so far, at most so many s
LOG = logging.getLogger("attune.tracking")


class Monitor:
    """Measures in a thread, at the run's start and end and in between: three points of a second, 1,500 of a day.

    MLflow's own monitor would write to the store by itself, and ask it for the run's status at every point. This one
    reads MLflow's collectors, so that names and units are its own, and gives what they say to the run.
    """

    def __init__(self, log: Callable[[Mapping[str, float]], None]):
        self._log, self._over = log, threading.Event()
        self._collectors = collectors()
        self._thread = threading.Thread(target=self._run, name="system metrics", daemon=True)

    @classmethod
    def start(cls, log: Callable[[Mapping[str, float]], None]) -> Monitor | None:
        """A monitor that runs; None where the environment says false, or nothing can be measured."""
        if os.environ.get(SWITCH, "").lower() in ("false", "0"):
            return None
        try:
            monitor = cls(log)
            monitor._thread.start()
        except Exception as error:
            LOG.warning("no system metrics are logged: %s: %s", type(error).__name__, error)
            return None
        return monitor

    def stop(self) -> None:
        """Ends after a last point."""
        self._over.set()
        self._thread.join(5)

    def _run(self) -> None:
        first, share, longest = PAUSES
        began = time.monotonic()
        self._over.wait(FIRST_POINT)
        while True:
            ending = self._over.is_set()
            with suppress(Exception):  # a collector whose device is gone
                self._log(measure(self._collectors))
            if ending:
                return
            self._over.wait(min(longest, max(first, share * (time.monotonic() - began))))


def collectors() -> list[Any]:
    """MLflow's collectors that work here; that of the GPUs needs a GPU and the package nvidia-ml-py."""
    import psutil
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    psutil.cpu_percent()  # of the time since the last call: the first call gives 0
    found = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(Exception):
        found.append(GPUMonitor())
    return found


def measure(some: list[Any]) -> dict[str, float]:
    """What the collectors say now, by the names that the UI knows."""
    found: dict[str, float] = {}
    for collector in some:
        collector.collect_metrics()
        found |= {PREFIX + name: value for name, value in collector.aggregate_metrics().items()}
        collector.clear_metrics()
    return found
