"""Fixtures of all tests. A test that leaves a thread behind, or warns, fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from local_federation.testing import federation
from neuron_client import APINeuron, NeuronConfig
from tests.rig.process import NeuronProcess, wait_for
from tests.rig.recording import RecordingFederation

__all__ = ["federation", "wait_for"]

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """Hostile texts get into captured output; the way from a worker to the terminal takes none with half characters."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "replace").decode()) for name, text in report.sections]
    return report


# Files of processes, clusters and many small waits: not in the inner loop.
SLOW_FILES = {
    "test_analytics.py", "test_commands.py", "test_credentials.py", "test_dask.py", "test_docs.py", "test_embedded.py",
    "test_endpoints.py", "test_examples.py", "test_executors.py", "test_local_federation.py", "test_rig.py",
    "test_transport.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in SLOW_FILES or item.path.parent.name == "faults":
            item.add_marker(pytest.mark.slow)


FAST = {"heartbeat_interval": 0.2, "command_interval": 0.1, "analytics_interval": 0.3, "request_timeout": 3.0}


@pytest.fixture(autouse=True)
def no_thread_outlives_its_test() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5
    left = [thread for thread in threading.enumerate() if thread not in before]
    for thread in left:
        thread.join(max(0.0, deadline - time.monotonic()))
    remaining = [thread.name for thread in left if thread.is_alive()]
    assert not remaining, f"threads left behind: {remaining}"


@pytest.fixture
def oracle() -> Iterator[RecordingFederation]:
    """A recording federation that behaves as the real one was measured to."""
    with RecordingFederation() as running:
        yield running


@pytest.fixture
def make_neuron(tmp_path: Path) -> Iterator[Callable[..., APINeuron]]:
    """`make_neuron(federation_url=…, **settings)`: a neuron in this process, not started, stopped at the end."""
    made: list[APINeuron] = []

    def make(*, neuron_class: type[APINeuron] = APINeuron, **settings: Any) -> APINeuron:
        defaults = {"state_dir": str(tmp_path / "state"), "port": 0, "shutdown_grace": 3.0, **FAST}
        neuron = neuron_class(NeuronConfig(**{**defaults, **settings}))
        made.append(neuron)
        return neuron

    yield make
    for neuron in made:
        neuron.stop()


@pytest.fixture
def run_neuron(tmp_path: Path) -> Iterator[Callable[..., NeuronProcess]]:
    """`run_neuron(federation_url=…, **settings)`: the neuron as a process, killed at the end if it still runs."""
    started: list[NeuronProcess] = []

    def run(*, state_dir: Path | None = None, **options: Any) -> NeuronProcess:
        process = NeuronProcess(state_dir or tmp_path / "state", **options)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
