"""A Dask scheduler and workers as processes on loopback, to be lost one by one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.rig.process import ROOT, wait_for


class DaskCluster:
    """`address` is what the setting `executor` wants. Workers have no nanny: what is killed stays dead."""

    def __init__(self, directory: Path, *, workers: int = 2, environ: Mapping[str, str] | None = None) -> None:
        self._directory = directory
        self._environ = {
            **os.environ, "PYTHONPATH": str(ROOT), "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0",
            **(environ or {}),
        }
        self._protocol = "tls" if environ and "DASK_DISTRIBUTED__COMM__TLS__CA_FILE" in environ else "tcp"
        self._wanted = workers
        self._scheduler: subprocess.Popen[bytes] | None = None
        self.workers: dict[int, subprocess.Popen[bytes]] = {}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"dask://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """The scheduler and its workers; returns when all of them are there."""
        self._scheduler, log = self._run("scheduler", "--port", str(self.port))
        wait_for(lambda: b"Scheduler at:" in log.read_bytes(), 30, "the dask scheduler")
        self.add_workers(self._wanted)

    def add_workers(self, number: int) -> None:
        started = [
            self._run("worker", f"{self._protocol}://127.0.0.1:{self.port}", "--no-nanny", "--nthreads", "2")
            for _ in range(number)
        ]
        logs = [log for _, log in started]
        wait_for(lambda: all(b"Registered to:" in log.read_bytes() for log in logs), 30, "the dask workers")
        self.workers.update((process.pid, process) for process, _ in started)

    def kill_worker(self, pid: int) -> None:
        _kill(self.workers.pop(pid))

    def signal_scheduler(self, number: signal.Signals) -> None:
        assert self._scheduler is not None
        self._scheduler.send_signal(number)

    def stop(self) -> None:
        for pid in list(self.workers):
            self.kill_worker(pid)
        if self._scheduler is not None:
            _kill(self._scheduler)

    def _run(self, kind: str, *arguments: str) -> tuple[subprocess.Popen[bytes], Path]:
        log = self._directory / f"{kind}-{len(list(self._directory.iterdir()))}.log"
        command = [
            sys.executable, "-m", f"distributed.cli.dask_{kind}", "--host", "127.0.0.1", "--protocol", self._protocol,
            "--no-dashboard", *arguments,
        ]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, env=self._environ, cwd=self._directory
            )
        return process, log


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
