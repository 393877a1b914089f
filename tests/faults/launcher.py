"""Neurons by the dozen, each of which may be traced, made to fail at a system call, or killed."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.rig.process import ROOT, wait_for

FAST: dict[str, Any] = {
    "host": "", "heartbeat_interval": 0.4, "command_interval": 0.05, "analytics_interval": 30, "request_timeout": 2,
    "shutdown_grace": 3, "task_timeout": 20,
}


class Child:
    """A neuron of the launcher. Its log lines, JSON and others, are in the file `log`."""

    def __init__(self, launcher: Launcher, pid: int, log: Path) -> None:
        self.pid = pid
        self.log = log
        self._launcher = launcher
        self._watched = os.pidfd_open(pid)
        self._status: int | None = None
        self.strace: subprocess.Popen[bytes] | None = None

    def ended(self, timeout: float = 0.0) -> bool:
        """Whether it has ended, after waiting for that for up to `timeout` seconds."""
        if self._status is None and select.select([self._watched], [], [], timeout)[0]:
            self._status = self._launcher.reap(self.pid)
            os.close(self._watched)
            if self.strace is not None:
                self.strace.wait(10)
        return self._status is not None

    def wait(self, timeout: float = 15.0) -> int:
        """The exit code, negative for a signal. Raises AssertionError when it goes on."""
        assert self.ended(timeout), f"the neuron did not end within {timeout:g} s:\n{self.text()}"
        assert self._status is not None
        return os.waitstatus_to_exitcode(self._status)

    def status(self, field: str) -> str:
        """A field of /proc/<pid>/status."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith(f"{field}:"))

    def kill(self) -> None:
        if not self.ended():
            self.signal(signal.SIGKILL)
            self.wait()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def lines(self) -> list[dict[str, Any]]:
        """The log lines that are whole JSON objects."""
        found = []
        for line in self.text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return [line for line in found if isinstance(line, dict)]

    def logged(self, text: str) -> dict[str, Any] | None:
        return next((line for line in self.lines() if text in str(line.get("message"))), None)

    def wait_logged(self, text: str, timeout: float = 10.0) -> dict[str, Any]:
        found: dict[str, Any] = wait_for(lambda: self.logged(text), timeout, f"{text!r} in\n{self.text()}")
        return found


class Launcher:
    """A fork server over the sources in `source`, which is this project or a changed copy of it."""

    def __init__(self, directory: Path, *, source: Path = ROOT) -> None:
        self.directory = directory
        self._started = 0
        self._children: list[Child] = []
        clean = {name: value for name, value in os.environ.items() if not name.startswith("NEURON_")}
        self._server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/faults/fork_server.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, cwd=directory, env={**clean, "PYTHONPATH": f"{source}:{ROOT}"},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._children:
            child.kill()
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait(10)

    def start(
        self,
        state: Path,
        *,
        inject: Sequence[str] = (),
        trace: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> Child:
        """A neuron on the state directory. `inject`, `trace`: expressions for strace's `-e`, whose own output goes
        to `<state>.strace`."""
        self._started += 1
        log = state.with_name(f"{state.name}.{self._started}.log")
        arguments = []
        for name, value in {"state_dir": str(state), **FAST, **settings}.items():
            arguments += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
        effects = {"EFFECTS": f"{state}.effects", "REPEATABLE_EFFECTS": f"{state}.repeatable"}
        held = bool(inject or trace)
        answer = self._ask(
            {"arguments": arguments, "environ": {**effects, **(environ or {})}, "log": str(log), "held": held}
        )
        child = Child(self, answer["pid"], log)
        self._children.append(child)
        if held:
            wait_for(lambda: child.status("State").startswith("T"), what="the neuron held before its first step")
            options = [f"-einject={one}" for one in inject] + [f"-etrace={one}" for one in trace]
            if not trace:
                options.append(f"-etrace={','.join(one.partition(':')[0] for one in inject)}")
            child.strace = attach(child, ["-y", "-s", "160", "-o", f"{state}.strace", *options])
            child.signal(signal.SIGCONT)
        return child

    def reap(self, pid: int) -> int:
        return int(self._ask({"reap": pid})["status"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return answer


def attach(child: Child, options: Sequence[str]) -> subprocess.Popen[bytes]:
    """strace on a neuron that runs, once it has hold of it, or has ended it already."""
    strace = subprocess.Popen(["strace", "-f", "-qq", "-esignal=none", *options, "-p", str(child.pid)])
    wait_for(
        lambda: child.status("TracerPid") != "0" or child.status("State").startswith("Z"), what="strace on the neuron"
    )
    return strace


@contextlib.contextmanager
def afflicted(child: Child, *injections: str) -> Iterator[None]:
    """Meanwhile system calls of a running neuron fail as strace's `inject=` says."""
    names = ",".join(one.partition(":")[0] for one in injections)
    options = [f"-etrace={names}", "-o", os.devnull, *(f"-einject={one}" for one in injections)]
    strace = attach(child, options)
    try:
        yield
    finally:
        strace.terminate()
        strace.wait(10)
