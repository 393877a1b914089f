"""The examples, each as the process its first lines tell to start, against a local federation."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import requests

from local_federation.testing import Federation
from tests.rig.dask_cluster import DaskCluster
from tests.rig.process import ROOT, NeuronProcess, wait_for

RunExample = Callable[..., NeuronProcess]


@pytest.fixture
def run_example(run_neuron: Callable[..., NeuronProcess], federation: Federation) -> RunExample:
    """`run_example("minimal")`: `python -m examples.minimal` in a directory of its own."""

    def run(name: str, **settings: Any) -> NeuronProcess:
        return run_neuron(
            script=Path("-m"), arguments=[f"examples.{name}"], federation_url=federation.url, **settings
        )

    return run


def run_task(federation: Federation, task: str, params: dict[str, Any]) -> str:
    neuron_id = federation.wait_for_neuron(timeout=20)
    return federation.issue(neuron_id, "run_task", {"task": task, "params": params})


def test_minimal_greets_in_fifteen_lines(run_example: RunExample, federation: Federation) -> None:
    process = run_example("minimal")
    command = run_task(federation, "greet", {"name": "world"})
    assert federation.outcome(command)["response"]["result"] == "Hello, world!"
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    assert len((ROOT / "examples/minimal.py").read_text().splitlines()) <= 15


def orders(database: Path) -> tuple[int, int]:
    """`(orders, cents)` so far."""
    if not database.exists():
        return 0, 0
    with closing(sqlite3.connect(database)) as connection:
        try:
            found: tuple[int, int] = connection.execute("SELECT count(*), sum(cents) FROM orders").fetchone()
        except sqlite3.OperationalError:  # not made yet
            return 0, 0
    return found


@pytest.mark.slow
def test_etl_loads_each_order_once_though_it_was_killed_half_way(
    run_example: RunExample, federation: Federation, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    total = 60_000
    with (data / "orders.csv").open("w") as file:
        file.write("order_id,customer,amount\n")
        file.writelines(f"A{number},customer {number % 7},{number % 90}.5\n" for number in range(total))
    first = run_example("etl_neuron", data_dir=str(data))
    command = run_task(federation, "load_orders", {"file": "orders.csv"})
    database = data / "orders.db"
    wait_for(lambda: orders(database)[0] > 0, 15, "the first orders")
    first.kill()
    assert orders(database)[0] < total

    run_example("etl_neuron", data_dir=str(data))
    result = federation.outcome(command, timeout=30)["response"]
    assert (result["outcome"], result["result"]) == ("succeeded", {"loaded": total, "skipped": 0})
    assert orders(database) == (total, sum(number % 90 * 100 + 50 for number in range(total)))


def test_etl_counts_the_rows_that_are_none_and_refuses_what_is_no_such_file(
    run_example: RunExample, federation: Federation, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "orders.csv").write_text("order_id,customer,amount\n1,ann,2.50\n2,bob,much\n3,cy\n")
    (data / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "secret.csv").write_text("order_id,customer,amount\n")
    process = run_example("etl_neuron", data_dir=str(data))
    command = run_task(federation, "load_orders", {"file": "orders.csv"})
    assert federation.outcome(command)["response"]["result"] == {"loaded": 1, "skipped": 2}
    assert process.wait_logged("orders.csv: order 2 left out")
    for file in ("other.csv", "../secret.csv", "none.csv"):
        command = run_task(federation, "load_orders", {"file": file})
        assert federation.outcome(command)["response"]["outcome"] == "rejected", file
    neuron_id = federation.wait_for_neuron()
    wait_for(lambda: "orders_loaded" in str(federation.heartbeats(neuron_id)[-1]), 10, "the metric")
    status = requests.get(f"{process.address()}/status", timeout=5).json()
    assert status["customMetrics"]["orders_loaded"] == 1
    assert status["dependencies"]["orders_database"]["status"] == "healthy"


@pytest.fixture
def flask_service(federation: Federation, tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Starts the command of flask_service.py's first lines; returns the service's address."""
    started: list[subprocess.Popen[bytes]] = []
    log = tmp_path / "gunicorn.log"

    def start() -> str:
        text = (ROOT / "examples/flask_service.py").read_text()
        command = re.search(r"^    gunicorn (.*)$", text, re.MULTILINE)
        assert command is not None
        environ = {
            **os.environ, "PYTHONPATH": str(ROOT), "NEURON_FEDERATION_URL": federation.url, "NEURON_NAME": "shop",
            "NEURON_STATE_DIR": str(tmp_path / "state"), "NEURON_HEARTBEAT_INTERVAL": "0.2",
        }
        with log.open("wb") as stream:
            started.append(subprocess.Popen(
                [sys.executable, "-m", "gunicorn", *command[1].split(), "--bind", "127.0.0.1:0"],
                env=environ, cwd=tmp_path, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
            ))
        found = wait_for(lambda: re.search(r"Listening at: (\S+)", log.read_text()), 15, "gunicorn")
        return str(found[1])

    yield start
    for process in started:
        process.terminate()
        assert process.wait(20) == 0
    assert "the service runs without its neuron" not in log.read_text()
    # Each worker said goodbye.
    for row in federation.store.neurons():
        assert federation.heartbeats(row["neuronId"])[-1]["status"] == "inactive"


@pytest.mark.slow
def test_a_flask_service_reports_the_requests_of_all_its_workers(
    flask_service: Callable[[], str], federation: Federation
) -> None:
    address = flask_service()
    wait_for(lambda: len(federation.store.neurons()) == 2, 15, "a neuron for each worker")
    ids = sorted(row["neuronId"] for row in federation.store.neurons())
    assert ids[0].startswith("shop-1-")
    assert ids[1].startswith("shop-2-")
    for _ in range(30):
        assert requests.get(f"{address}/price/2", timeout=5).json() == {"gross": 238}
    for _ in range(3):
        assert requests.get(f"{address}/broken", timeout=5).status_code == 500

    def reported() -> tuple[int, int, int]:
        sums = [0, 0, 0]
        for neuron_id in ids:
            beats = federation.heartbeats(neuron_id)
            if beats:
                figures = beats[-1]["applicationMetrics"]
                told = beats[-1]["performanceMetrics"]["customMetrics"].get("prices_told", 0)
                for at, value in enumerate((figures["total_requests"], figures["failed_requests"], told)):
                    sums[at] += value
        return sums[0], sums[1], sums[2]

    wait_for(lambda: reported() == (33, 3, 30), 10, f"all figures (so far {reported()})")


@pytest.mark.slow
def test_dask_neuron_counts_on_a_cluster(
    run_example: RunExample, federation: Federation, tmp_path: Path
) -> None:
    directory = tmp_path / "cluster"
    directory.mkdir()
    with DaskCluster(directory, workers=1) as cluster:
        run_example("dask_neuron", executor=cluster.address)
        command = run_task(federation, "count_primes", {"start": 0, "stop": 10_000})
        assert federation.outcome(command, timeout=30)["response"]["result"] == {"primes": 1229}
        command = run_task(federation, "count_primes", {"start": 5, "stop": 0})
        assert federation.outcome(command)["response"]["outcome"] == "rejected"
