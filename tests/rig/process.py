"""The neuron as a real process: started, watched through its log lines, signalled, killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def wait_for(predicate: Callable[[], Any], timeout: float = 10.0, what: str = "the state") -> Any:
    """Poll until `predicate` returns something true, and return that. Raises AssertionError at the deadline."""
    pause = threading.Event()
    deadline = time.monotonic() + timeout
    while not (result := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come within {timeout:g} s")
        pause.wait(0.01)
    return result


class NeuronProcess:
    """`python neuron_client.py` (or another script) with settings as `--set`, its log lines parsed as they come."""

    def __init__(
        self,
        state_dir: Path,
        *,
        script: Path = ROOT / "neuron_client.py",
        arguments: Sequence[str] = (),
        environ: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        settings = {
            "state_dir": str(state_dir), "port": 0, "heartbeat_interval": 0.5, "command_interval": 0.2,
            "analytics_interval": 1, "request_timeout": 3, **settings,
        }
        command = [*prefix, sys.executable, str(script), *arguments]
        for name, value in settings.items():
            command += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("NEURON_")}
        self.lines: list[dict[str, Any]] = []
        self.raw: list[str] = []
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=state_dir.parent,
            env={**clean, "PYTHONPATH": str(ROOT), **(environ or {})},
        )
        self.stderr = ""
        self._readers = [
            threading.Thread(target=self._read_stdout, daemon=True),
            threading.Thread(target=self._read_stderr, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read_stdout(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.raw.append(line)
            try:
                self.lines.append(json.loads(line))
            except ValueError:
                self.lines.append({"message": line, "unparsed": True})

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.stderr += line

    @property
    def pid(self) -> int:
        return self.process.pid

    def logged(self, text: str) -> dict[str, Any] | None:
        """The first log line whose message contains `text`."""
        return next((line for line in self.lines if text in str(line.get("message"))), None)

    def wait_logged(self, text: str, timeout: float = 15.0) -> dict[str, Any]:
        what = f"the log line {text!r} (so far {self.raw})"
        found: dict[str, Any] = wait_for(lambda: self.logged(text), timeout, what)
        return found

    def address(self) -> str:
        """Base URL of the endpoints, from the start's log line."""
        return str(self.wait_logged("neuron started")["message"].rpartition("endpoints ")[2])

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()

    def wait(self, timeout: float = 20.0) -> int:
        """The exit code."""
        code = self.process.wait(timeout)
        for reader in self._readers:
            reader.join(5)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        return code
