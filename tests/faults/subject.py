"""The neuron that the fault tests start, kill and start again: the real program with tasks whose effects count.

Each effect is one line `commandId pid`, appended in one write to the file that the variable EFFECTS names.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

from neuron.program import run
from neuron_client import APINeuron, NeuronConfig, TaskContext


def effect(n: int, context: TaskContext) -> dict[str, Any]:
    _leave_trace("EFFECTS", context.command_id)
    return {"value": 2 * n}


def again(n: int, context: TaskContext) -> dict[str, Any]:
    _leave_trace("REPEATABLE_EFFECTS", context.command_id)
    return {"value": 2 * n}


def slow(n: int, context: TaskContext, seconds: float = 0.2) -> dict[str, Any]:
    _leave_trace("EFFECTS", context.command_id)
    context.cancelled.wait(seconds)
    return {"value": 2 * n}


def _leave_trace(variable: str, command_id: str) -> None:
    descriptor = os.open(os.environ[variable], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, f"{command_id} {os.getpid()}\n".encode())
    os.close(descriptor)


def correct(command_data: Any, response: Any) -> bool:
    """Whether a task that succeeded told what its parameters make it tell."""
    params = command_data.get("params") if isinstance(command_data, dict) else None
    return not params or response.get("result") == {"value": 2 * params["n"]}


def build(config: NeuronConfig) -> APINeuron:
    neuron = APINeuron(config)
    neuron.task("effect")(effect)
    neuron.task("again", idempotent=True)(again)
    neuron.task("slow")(slow)
    if "DEEDS" in os.environ:
        watch_for_deeds(config.federation_url, f"{config.state_dir}/", os.environ["EFFECTS"], os.devnull)
    if rate := int(os.environ.get("HOOK_RATE", "0")):
        threading.Thread(target=serve_requests, args=(neuron, rate), daemon=True).start()
    return neuron


def watch_for_deeds(origin: str, *allowed: str) -> None:
    """Writes down, to the file that DEEDS names, each process started, each connection to another than the origin
    and each file opened for writing that is below none of `allowed`."""
    file = os.open(os.environ["DEEDS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    port = int(origin.rpartition(":")[2])

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        suspicious = event in ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "pty.spawn")
        if event == "socket.connect":
            suspicious = arguments[1][1:2] != (port,)
        elif event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            suspicious = not arguments[0].startswith(allowed)
        if suspicious:
            os.write(file, f"{event} {arguments!r}\n".encode(errors="replace"))

    sys.addaudithook(hook)


def serve_requests(neuron: APINeuron, rate: int) -> None:
    """A host that counts `rate` requests a second, and writes down how many they were before it goes on."""
    pause = threading.Event()
    file = os.open(os.environ["HOOK_COUNT"], os.O_WRONLY | os.O_CREAT, 0o600)
    for made in itertools.count(1):
        neuron.simple_request(True, 1.0)
        os.pwrite(file, str(made).encode(), 0)
        pause.wait(1 / rate)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(build, arguments)


if __name__ == "__main__":
    sys.exit(main())
