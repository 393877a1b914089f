"""Tasks on a Dask cluster: a real scheduler and workers on loopback, lost one by one."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import trustme

from local_federation.testing import Federation
from neuron.dask_engine import DaskEngine, run_on_worker
from neuron.errors import ConfigError, EngineUnavailable, WorkerLost
from neuron.executors import Call, open_engine
from neuron_client import APINeuron, NeuronConfig
from tests.rig import work
from tests.rig.dask_cluster import DaskCluster
from tests.rig.process import ROOT, NeuronProcess, wait_for

pytestmark = pytest.mark.slow

MakeNeuron = Callable[..., APINeuron]


@pytest.fixture(scope="module")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskCluster]:
    with DaskCluster(tmp_path_factory.mktemp("dask")) as running:
        yield running


@pytest.fixture
def cluster(_cluster: DaskCluster) -> DaskCluster:
    """Shared by the tests of this file; each finds two workers."""
    _cluster.add_workers(2 - len(_cluster.workers))
    return _cluster


@pytest.fixture
def start(make_neuron: MakeNeuron, federation: Federation) -> Callable[..., APINeuron]:
    """`start("dask://…")`: a running neuron with the tasks of tests/rig/work.py."""

    def start(executor: str, **settings: Any) -> APINeuron:
        neuron = make_neuron(federation_url=federation.url, executor=executor, **settings)
        neuron.task("effect", timeout=30)(work.effect)
        neuron.task("idempotent_effect", idempotent=True, timeout=30)(work.effect)
        for function in (work.double, work.half_way, work.until_cancelled, work.deaf, work.returns_unpicklable):
            neuron.task(function.__name__, timeout=30)(function)
        neuron.task("deaf_for_a_second", timeout=1)(work.deaf)
        neuron.task("exits", timeout=30)(work.exits)
        assert neuron.start()
        federation.wait_for_neuron(neuron.neuron_id)
        return neuron

    return start


def run_task(federation: Federation, neuron: APINeuron, task: str, **params: Any) -> str:
    return federation.issue(neuron.neuron_id, "run_task", {"task": task, "params": params})


def outcome(federation: Federation, command: str) -> tuple[str, Any]:
    """`(outcome, result or error message)` of a command."""
    row = federation.outcome(command, timeout=30)
    response = row["response"]
    return response["outcome"], response.get("result", row["errorMessage"])


def executor_reason(neuron: APINeuron) -> str:
    """What health says of the executor, '' while all is well."""
    return next((reason for reason in neuron.health()["reasons"] if "dask" in reason), "")


def await_effect(path: Path, number: int = 1) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = wait_for(
        lambda: len(seen := work.lines(path)) >= number and seen, 20, f"effect {number}"
    )
    return found


# -- what works as on one machine --------------------------------------------------------------------------------------


def test_the_same_task_with_the_same_parameters_runs_each_time_it_is_asked_for(
    cluster: DaskCluster, start: Callable[..., APINeuron], federation: Federation, tmp_path: Path
) -> None:
    neuron = start(cluster.address)
    effects = tmp_path / "effects"
    commands = [run_task(federation, neuron, "effect", effects=str(effects)) for _ in range(3)]
    assert [outcome(federation, command)[0] for command in commands] == ["succeeded"] * 3
    ran = work.lines(effects)
    assert len(ran) == 3
    assert {pid for _, pid in ran} <= set(cluster.workers)


def test_progress_and_log_lines_come_back_from_the_worker(
    cluster: DaskCluster, start: Callable[..., APINeuron], federation: Federation, tmp_path: Path
) -> None:
    neuron = start(cluster.address)
    command = run_task(federation, neuron, "half_way", release=str(tmp_path / "release"))
    wait_for(lambda: any(run.get("progress") == 0.5 for run in neuron.desk.running()), 20, "progress")

    def told() -> bool:
        beat = federation.heartbeats(neuron.neuron_id)[-1]["performanceMetrics"]["runningCommands"]
        return any(run.get("text") == "rows 500/1000" for run in beat)

    wait_for(told, 10, "progress in the heartbeat")
    wait_for(lambda: any("half of half_way" in line for line in neuron.status()["log"]["warnings"]), 10, "the log line")
    (tmp_path / "release").touch()
    assert outcome(federation, command) == ("succeeded", "done")


def test_cancel_reaches_a_task_on_a_worker(
    cluster: DaskCluster, start: Callable[..., APINeuron], federation: Federation
) -> None:
    neuron = start(cluster.address)
    command = run_task(federation, neuron, "until_cancelled")
    wait_for(lambda: any(run.get("text") == "waiting" for run in neuron.desk.running()), 20, "the task's start")
    started = time.monotonic()
    federation.issue(neuron.neuron_id, "cancel_task", {"commandId": command})
    assert outcome(federation, command)[0] == "cancelled"
    # The task heard it: a deaf one would have been given up after five seconds.
    assert time.monotonic() - started < 4
    assert neuron.desk.given_up() == 0


def test_a_task_past_its_time_limit_is_reported_and_watched_until_it_ends(
    cluster: DaskCluster, start: Callable[..., APINeuron], federation: Federation, tmp_path: Path
) -> None:
    neuron = start(cluster.address)
    command = run_task(federation, neuron, "deaf_for_a_second", started=str(tmp_path / "started"))
    assert outcome(federation, command)[0] == "timed_out"
    assert neuron.desk.given_up() == 1
    # Nothing but the end of its worker ends it.
    cluster.kill_worker(int((tmp_path / "started").read_text()))
    wait_for(lambda: neuron.desk.given_up() == 0, 20, "the end of the given up task")


def test_a_task_that_exits_or_returns_what_cannot_travel_fails_and_the_worker_lives(
    cluster: DaskCluster, start: Callable[..., APINeuron], federation: Federation
) -> None:
    neuron = start(cluster.address)
    kind, message = outcome(federation, run_task(federation, neuron, "exits"))
    assert kind == "failed"
    assert "SystemExit(3)" in message
    kind, message = outcome(federation, run_task(federation, neuron, "returns_unpicklable"))
    assert kind == "failed"
    assert "cannot leave its process" in message
    assert outcome(federation, run_task(federation, neuron, "double", n=4)) == ("succeeded", 8)
    assert all(process.poll() is None for process in cluster.workers.values())


# -- what is lost ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["allowed-failures 0", "allowed-failures 3"])
def any_cluster(request: pytest.FixtureRequest, cluster: DaskCluster, tmp_path: Path) -> Iterator[DaskCluster]:
    """The recommended setting, and the default, at which the scheduler repeats what it lost."""
    if request.param == "allowed-failures 0":
        yield cluster
    else:
        directory = tmp_path / "cluster"
        directory.mkdir()
        with DaskCluster(directory, environ={"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "3"}) as other:
            yield other


def test_a_worker_killed_mid_task_costs_an_idempotent_task_one_more_run_and_any_other_its_outcome(
    any_cluster: DaskCluster, start: Callable[..., APINeuron], federation: Federation, tmp_path: Path
) -> None:
    neuron = start(any_cluster.address)
    release = tmp_path / "release"
    once, again = tmp_path / "once", tmp_path / "again"
    plain = run_task(federation, neuron, "effect", effects=str(once), release=str(release))
    any_cluster.kill_worker(await_effect(once)[0][1])
    kind, message = outcome(federation, plain)
    assert kind == "failed"
    assert "WorkerLost" in message

    any_cluster.add_workers(1)
    idempotent = run_task(federation, neuron, "idempotent_effect", effects=str(again), release=str(release))
    lost = await_effect(again)[0][1]
    any_cluster.kill_worker(lost)
    (_, _), (attempt, pid) = await_effect(again, 2)
    assert (attempt, pid != lost) == (2, True)
    release.touch()
    assert outcome(federation, idempotent) == ("succeeded", {"pid": pid, "attempt": 2})
    assert len(work.lines(once)) == 1
    assert len(work.lines(again)) == 2


def test_what_a_scheduler_repeats_by_itself_does_not_begin_twice(cluster: DaskCluster, tmp_path: Path) -> None:
    effects = tmp_path / "effects"
    call = Call(work.effect, {"effects": str(effects)}, True, "effect", "c1", 1, time.time() + 30)
    distributed = importlib.import_module("distributed")
    with distributed.Client(cluster.address.replace("dask", "tcp"), set_as_default=False) as client:
        token = distributed.Queue("run-1", client=client)
        token.put(1)
        first = client.submit(run_on_worker, call, "run-1", "topic", pure=False)
        assert first.result(20)["attempt"] == 1
        second = client.submit(run_on_worker, call, "run-1", "topic", pure=False)
        with pytest.raises(WorkerLost):
            second.result(20)
        token.close()
    assert len(work.lines(effects)) == 1


def test_without_its_scheduler_a_neuron_is_degraded_and_takes_no_task_until_it_is_there(
    start: Callable[..., APINeuron], federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "cluster"
    directory.mkdir()
    cluster = DaskCluster(directory, workers=1)
    monkeypatch.setattr("neuron.dask_engine.CONNECT_SECONDS", 1.0)
    neuron = start(cluster.address)
    command = run_task(federation, neuron, "double", n=4)
    wait_for(lambda: "Timed out" in executor_reason(neuron), 15, "the reason in health")
    assert f"127.0.0.1:{cluster.port}" in executor_reason(neuron)
    assert federation.heartbeats(neuron.neuron_id)[-1]["healthScore"] < 100
    # The built-in ones need no cluster, and nothing waits in their way.
    assert outcome(federation, run_task(federation, neuron, "cleanup"))[0] == "succeeded"
    assert federation.store.command(command)["status"] == "pending"  # type: ignore[index]

    with cluster:
        assert outcome(federation, command) == ("succeeded", 8)
        assert executor_reason(neuron) == ""

        effects = tmp_path / "effects"
        again, release = tmp_path / "again", tmp_path / "release"
        plain = run_task(federation, neuron, "effect", effects=str(effects), release=str(release))
        idempotent = run_task(federation, neuron, "idempotent_effect", effects=str(again), release=str(release))
        await_effect(effects)
        await_effect(again)
    # Scheduler and workers are gone, mid-task.
    kind, message = outcome(federation, plain)
    assert kind == "failed"
    assert "WorkerLost" in message
    wait_for(lambda: executor_reason(neuron), 10, "the loss in health")
    command = run_task(federation, neuron, "double", n=5)
    release.touch()
    with cluster:
        assert outcome(federation, command) == ("succeeded", 10)
        assert outcome(federation, idempotent)[0] == "succeeded"
    assert (len(work.lines(effects)), len(work.lines(again))) == (1, 2)


def test_a_scheduler_that_hangs_while_a_task_is_handed_over_runs_it_once_in_the_end(
    cluster: DaskCluster, start: Callable[..., APINeuron], federation: Federation, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("neuron.dask_engine.CALL_SECONDS", 0.3)
    neuron = start(cluster.address)
    assert outcome(federation, run_task(federation, neuron, "double", n=1))[0] == "succeeded"
    cluster.signal_scheduler(signal.SIGSTOP)
    try:
        command = run_task(federation, neuron, "effect", effects=str(tmp_path / "effects"))
        said = f"command {command} waits"
        wait_for(lambda: str(neuron.status()["log"]["warnings"]).count(said) >= 3, 15, "three tries")
    finally:
        cluster.signal_scheduler(signal.SIGCONT)
    assert outcome(federation, command)[0] == "succeeded"
    assert outcome(federation, run_task(federation, neuron, "double", n=1))[0] == "succeeded"
    assert len(work.lines(tmp_path / "effects")) == 1


def test_stop_leaves_a_deaf_task_and_the_cluster_behind_in_time_and_no_thread(
    cluster: DaskCluster, start: Callable[..., APINeuron], federation: Federation, tmp_path: Path
) -> None:
    before = set(threading.enumerate())
    neuron = start(cluster.address, shutdown_grace=2)
    run_task(federation, neuron, "deaf", started=str(tmp_path / "started"))
    wait_for((tmp_path / "started").exists, 20, "the task's start")
    began = time.monotonic()
    neuron.stop()
    assert time.monotonic() - began < 2.5
    wait_for(lambda: set(threading.enumerate()) <= before, 3, "the end of all threads")
    assert "dask" not in str([t.name for t in threading.enumerate()])
    engine = open_engine(cluster.address)
    wait_for(lambda: _is_ready(engine), 10, "another engine's connection")
    engine.close()
    cluster.kill_worker(int((tmp_path / "started").read_text()))


def _is_ready(engine: Any) -> bool:
    try:
        engine.ready()
    except EngineUnavailable:
        return False
    return True


def test_ready_never_blocks_even_where_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        engine = DaskEngine(f"dask://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(EngineUnavailable, match="connecting"):
            engine.ready()
        assert time.monotonic() - began < 0.2
        engine.close()
        with pytest.raises(EngineUnavailable):
            engine.ready()


# -- the program -------------------------------------------------------------------------------------------------------


def test_the_program_runs_its_own_tasks_there_and_writes_nothing_but_its_log(
    cluster: DaskCluster, run_neuron: Callable[..., NeuronProcess], federation: Federation
) -> None:
    process = run_neuron(federation_url=federation.url, executor=cluster.address)
    neuron_id = federation.wait_for_neuron(timeout=20)
    command = federation.issue(neuron_id, "run_task", {"task": "word_count", "params": {"text": "to be or not to be"}})
    kind, result = outcome(federation, command)
    assert (kind, result["words"]) == ("succeeded", 6)
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    assert process.stderr == ""
    assert not [line for line in process.lines if line.get("unparsed")]


def test_a_forked_copy_neither_hangs_nor_speaks_nor_disturbs_its_parent(cluster: DaskCluster, tmp_path: Path) -> None:
    program = f"""
import gc, os, sys, time, logging
from neuron.executors import open_engine, Call
from neuron.errors import EngineUnavailable
from neuron.tasks import Run
from tests.rig import work
from tests.rig.process import wait_for

def ready(engine):
    try:
        engine.ready()
    except EngineUnavailable:
        return False
    return True

def doubled(engine, n):
    call = Call(work.double, {{"n": n}}, False, "double", "c1", 1, time.time() + 30)
    return engine.start(call, Run("c1", "run_task"), logging.LoggerAdapter(logging.getLogger())).future.result(20)

def connected():
    engine = open_engine({cluster.address!r})
    wait_for(lambda: ready(engine), 10)
    return engine

engine = connected()
if (pid := os.fork()) == 0:
    engine = None
    gc.collect()
    own = connected()
    own_result = doubled(own, 3)
    own.close()
    sys.exit(own_result)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 6
print(doubled(engine, 4))
engine.close()
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", program], capture_output=True, text=True, timeout=60,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "8\n", "")


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("dask://10.0.0.5:8786", "beyond loopback TLS is a must"),
        ("dask://scheduler", "beyond loopback TLS is a must"),
        ("dask://", "not of the form"),
        ("dask", "not of the form"),
        ("dask://127.0.0.1:many", "not a URL"),
        ("dask://127.0.0.1:8786/path", "not of the form"),
    ],
)
def test_an_executor_url_that_cannot_be_used_safely_is_refused_before_the_start(
    url: str, fault: str, tmp_path: Path
) -> None:
    neuron = APINeuron(NeuronConfig(executor=url, state_dir=str(tmp_path / "state"), port=0))
    with pytest.raises(ConfigError, match=fault):
        neuron.begin()


def test_tls_settings_that_cannot_be_used_are_refused_before_the_start(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.pem")
    with importlib.import_module("dask").config.set({
        "distributed.comm.tls.ca-file": missing, "distributed.comm.tls.client.cert": missing,
    }):
        with pytest.raises(ConfigError, match=r"Dask's TLS settings cannot be used.*No such file"):
            open_engine("dask://10.0.0.5")


def test_without_the_extra_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r"pip install -r requirements-dask\.txt"):
        open_engine("dask://127.0.0.1")


@pytest.fixture
def tls(tmp_path: Path) -> dict[str, str]:
    """Dask's own settings of one certificate for scheduler, workers and neuron."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    files = {name: str(tmp_path / f"{name}.pem") for name in ("ca", "cert", "key")}
    authority.cert_pem.write_to_path(files["ca"])
    certificate.cert_chain_pems[0].write_to_path(files["cert"])
    certificate.private_key_pem.write_to_path(files["key"])
    environ = {"DASK_DISTRIBUTED__COMM__TLS__CA_FILE": files["ca"]}
    for role in ("SCHEDULER", "WORKER", "CLIENT"):
        environ[f"DASK_DISTRIBUTED__COMM__TLS__{role}__CERT"] = files["cert"]
        environ[f"DASK_DISTRIBUTED__COMM__TLS__{role}__KEY"] = files["key"]
    return environ


def test_with_tls_configured_tasks_run_through_it_and_a_client_without_is_shut_out(
    tls: dict[str, str], run_neuron: Callable[..., NeuronProcess], federation: Federation, tmp_path: Path
) -> None:
    directory = tmp_path / "cluster"
    directory.mkdir()
    with DaskCluster(directory, workers=1, environ=tls) as cluster:
        process = run_neuron(federation_url=federation.url, executor=cluster.address, environ=tls)
        neuron_id = federation.wait_for_neuron(timeout=20)
        command = federation.issue(neuron_id, "run_task", {"task": "word_count", "params": {"text": "a b a"}})
        assert outcome(federation, command)[0] == "succeeded"

        stranger = open_engine(cluster.address)
        assert not _is_ready(stranger)
        wait_for(lambda: "connecting" not in _refusal(stranger), 10, "the stranger's failure")
        stranger.close()

    # The loss is told once, by the neuron, in its own words.
    url = f"{process.address()}/health"
    wait_for(lambda: "connection was lost" in requests.get(url, timeout=5).text, 20, "the loss in health")
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    assert process.stderr == ""
    assert not [line for line in process.lines if line.get("unparsed") or "econnect" in line["message"]]


def _refusal(engine: Any) -> str:
    with pytest.raises(EngineUnavailable) as raised:
        engine.ready()
    return str(raised.value)
