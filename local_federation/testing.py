"""A pytest fixture for neurons of one's own: ``from local_federation.testing import federation``.

def test_it_scores(federation):
    with APINeuron(NeuronConfig(federation_url=federation.url, ...)):
        neuron_id = federation.wait_for_neuron()
        command = federation.issue(neuron_id, "run_task", {"task": "score"})
        assert federation.outcome(command)["response"]["outcome"] == "succeeded"
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest

from local_federation import bodies
from local_federation.server import LocalFederation

T = TypeVar("T")


class Federation(LocalFederation):
    """A local federation on a free loopback port, with what a test wants to ask of it.

    ``stop()`` and ``start()`` play an outage; commands can be issued and neurons looked at meanwhile.
    """

    def issue(
        self, neuron_id: str, command_type: str, command_data: Any = None, priority: int = 5, **extra: Any
    ) -> str:
        """Issues a command and returns its id. ``extra``: commandId, timeoutAt, metadata, maxRetries.

        Raises LookupError for an unknown neuron, wire.Refused for a malformed command.
        """
        self.neuron(neuron_id)
        body = {
            "commandType": command_type,
            "commandData": {} if command_data is None else command_data,
            "priority": priority,
            **extra,
        }
        command = bodies.check(body, bodies.COMMAND, "Invalid command")
        return str(self.store.issue(neuron_id, command)["commandId"])

    def outcome(self, command_id: str, timeout: float = 10) -> dict[str, Any]:
        """The command's row, ``status`` and ``response`` in it, once it is completed or failed.

        Raises TimeoutError, naming the last status, after ``timeout`` seconds.
        """
        ended = _poll(lambda: self._ended(command_id), timeout)
        if ended is None:
            status = (self.store.command(command_id) or {}).get("status", "unknown here")
            raise TimeoutError(f"command {command_id} has not ended in {timeout:g} s; last status: {status}")
        return ended

    def _ended(self, command_id: str) -> dict[str, Any] | None:
        command = self.store.command(command_id)
        return command if command and command["status"] in ("completed", "failed") else None

    def neuron(self, neuron_id: str) -> dict[str, Any]:
        """What the federation knows of a neuron. Raises LookupError."""
        neuron = self.store.neuron(neuron_id)
        if neuron is None:
            known = ", ".join(row["neuronId"] for row in self.store.neurons()) or "none"
            raise LookupError(f"no neuron {neuron_id!r} is registered; registered: {known}")
        return neuron

    def heartbeats(self, neuron_id: str) -> list[dict[str, Any]]:
        """The neuron's heartbeats, oldest first."""
        return self.store.heartbeats(neuron_id)

    def analytics(self, neuron_id: str) -> list[dict[str, Any]]:
        """The neuron's reports of the last week, one a day, oldest first."""
        return self.store.analytics(neuron_id)

    def wait_for_neuron(self, neuron_id: str | None = None, timeout: float = 10) -> str:
        """The id of the first neuron, or of ``neuron_id``, once it has registered and beaten.

        Raises TimeoutError, naming who did register, after ``timeout`` seconds.
        """
        found = _poll(lambda: self._beating(neuron_id), timeout)
        if found is None:
            seen = ", ".join(row["neuronId"] for row in self.store.neurons()) or "none"
            wanted = neuron_id or "any neuron"
            raise TimeoutError(f"{wanted} has not registered and beaten in {timeout:g} s; registered: {seen}")
        return found

    def _beating(self, neuron_id: str | None) -> str | None:
        for row in self.store.neurons():
            if neuron_id in (None, row["neuronId"]) and row["lastHeartbeat"]:
                return str(row["neuronId"])
        return None


@pytest.fixture
def federation() -> Iterator[Federation]:
    """A fresh federation for one test, in correct mode."""
    with Federation() as running:
        yield running


def _poll(probe: Callable[[], T | None], timeout: float) -> T | None:
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while (found := probe()) is None and time.monotonic() < deadline:
        pause.wait(0.02)
    return found
