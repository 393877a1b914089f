"""Where tasks run: threads, processes, executors of a host. What works on each, and what breaks."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from local_federation.testing import Federation
from neuron import commands
from neuron.errors import ConfigError, DefinitionError
from neuron.executors import Call, ProcessEngine, open_engine
from neuron.tasks import Run
from neuron_client import APINeuron, NeuronConfig
from tests.rig import work
from tests.rig.process import NeuronProcess, wait_for

ALL = ("threads", "processes", "a host's threads", "a host's processes")
APART = ("processes", "a host's processes")

Start = Callable[..., APINeuron]


def program(directory: Path) -> Path:
    """A neuron_client.py of somebody's own, one task in the program itself."""
    script = directory / "program.py"
    script.write_text(
        """
import sys
from neuron.program import run
from neuron_client import APINeuron
from tests.rig import work


def own(n: int) -> int:
    return 3 * n


def build(config):
    neuron = APINeuron(config)
    neuron.task("own")(own)
    neuron.task("effect", timeout=30)(work.effect)
    neuron.task("idempotent_effect", timeout=30, idempotent=True)(work.effect)
    neuron.task("deaf")(work.deaf)
    neuron.task("prints")(work.prints)
    return neuron


if __name__ == "__main__":
    sys.exit(run(build))
""",
        encoding="utf-8",
    )
    return script


def make_executor(kind: str) -> Executor | None:
    if kind == "a host's threads":
        return ThreadPoolExecutor(2)
    if kind == "a host's processes":
        return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    return None


@pytest.fixture
def start(tmp_path: Path, federation: Federation) -> Iterator[Start]:
    """`start("processes")`: a running neuron with the tasks of tests/rig/work.py on that executor."""
    neurons: list[APINeuron] = []
    executors: list[Executor] = []

    def start(kind: str, **settings: Any) -> APINeuron:
        executor = make_executor(kind)
        if executor is not None:
            executors.append(executor)
        defaults = {
            "federation_url": federation.url, "state_dir": str(tmp_path / f"state-{len(neurons)}"), "port": 0,
            "heartbeat_interval": 0.2, "command_interval": 0.1, "shutdown_grace": 2,
            "executor": kind if executor is None else "threads",
        }
        neuron = APINeuron(NeuronConfig(**{**defaults, **settings}), executor=executor)
        neurons.append(neuron)
        neuron.task("idempotent_effect", timeout=30, idempotent=True)(work.effect)
        neuron.task("deaf_for_a_second", timeout=1)(work.deaf)
        for function in work.TASKS:
            neuron.task(function.__name__, timeout=30)(function)
        assert neuron.start()
        federation.wait_for_neuron(neuron.neuron_id)
        return neuron

    yield start
    for neuron in neurons:
        neuron.stop()
    for executor in executors:
        executor.shutdown(wait=True, cancel_futures=True)


def run_task(federation: Federation, neuron: APINeuron | str, task: str, **params: Any) -> str:
    neuron_id = neuron if isinstance(neuron, str) else neuron.neuron_id
    return federation.issue(neuron_id, "run_task", {"task": task, "params": params})


def outcome(federation: Federation, command: str) -> tuple[str, Any]:
    """`(outcome, result or error message)` of a command."""
    row = federation.outcome(command, timeout=20)
    return row["response"]["outcome"], row["response"].get("result", row["errorMessage"])


def status_of(federation: Federation, command: str) -> str:
    row = federation.store.command(command)
    assert row is not None
    return str(row["status"])


def reasons(neuron: APINeuron) -> str:
    return " ".join(neuron.health()["reasons"])


def pid_in(file: Path) -> int:
    return int(wait_for(lambda: file.exists() and file.read_text(encoding="utf-8"), 15, "the task's start"))


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# -- the same on all of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_results_errors_and_refusals_come_back_from_every_executor(
    kind: str, start: Start, federation: Federation
) -> None:
    neuron = start(kind)
    wanted = {
        "double": ("succeeded", "8"), "raises": ("failed", "KeyError: 'no such row'"),
        "refuses": ("rejected", "the rows have no price"), "exits": ("failed", "SystemExit: 3"),
        "raises_unpicklable": ("failed", "no"), "returns_unpicklable": ("failed", "lock"),
        "returns_much": ("succeeded", "xxx"),
    }
    if kind == "a host's processes":
        # The standard pool breaks at a SystemExit's like; what it makes of it is tested below.
        del wanted["raises_unpicklable"]
    asked = {
        task: run_task(federation, neuron, task, **({"n": 4} if task == "double" else {})) for task in wanted
    }
    for task, (kind_of_end, text) in wanted.items():
        ended, told = outcome(federation, asked[task])
        assert ended == kind_of_end, (task, told)
        assert text in str(told)
    assert federation.outcome(asked["refuses"])["response"]["rows"] == 3


@pytest.mark.parametrize("kind", ["threads", "processes", "a host's threads"])
def test_progress_and_log_lines_show_while_the_task_runs(
    kind: str, start: Start, federation: Federation, tmp_path: Path
) -> None:
    neuron = start(kind)
    command = run_task(federation, neuron, "half_way", release=str(tmp_path / "release"))

    def told() -> bool:
        beat = federation.heartbeats(neuron.neuron_id)[-1]["performanceMetrics"]["runningCommands"]
        return any((run.get("progress"), run.get("text")) == (0.5, "rows 500/1000") for run in beat)

    wait_for(told, 15, "progress in the heartbeat")
    assert neuron.status()["commands"]["running"][0]["progress"] == 0.5
    assert any("half of half_way" in line for line in neuron.status()["log"]["warnings"])
    (tmp_path / "release").touch()
    assert outcome(federation, command) == ("succeeded", "done")


@pytest.mark.parametrize("kind", ["threads", "processes", "a host's threads"])
def test_cancel_reaches_the_task(kind: str, start: Start, federation: Federation) -> None:
    neuron = start(kind)
    command = run_task(federation, neuron, "until_cancelled")
    wait_for(lambda: any(run.get("text") == "waiting" for run in neuron.desk.running()), 15, "the task's start")
    began = time.monotonic()
    federation.issue(neuron.neuron_id, "cancel_task", {"commandId": command})
    assert outcome(federation, command)[0] == "cancelled"
    assert time.monotonic() - began < 4
    assert neuron.desk.given_up() == 0


@pytest.mark.parametrize("kind", ALL)
def test_a_task_past_its_time_limit_is_reported_at_once_and_its_slot_is_free(
    kind: str, start: Start, federation: Federation, tmp_path: Path
) -> None:
    neuron = start(kind, max_concurrent_tasks=1)
    over = tmp_path / "over"
    command = run_task(federation, neuron, "deaf_for_a_second", started=str(tmp_path / "started"), over=str(over))
    pid = pid_in(tmp_path / "started")
    assert outcome(federation, command)[0] == "timed_out"
    if kind == "processes":
        wait_for(lambda: gone(pid), 5, "the end of the killed process")
        wait_for(lambda: neuron.desk.given_up() == 0, 5, "the end of the watch")
    else:
        assert neuron.desk.given_up() == 1
        assert "run on past their time limit" in reasons(neuron)
    # One slot, and the next task finds it free.
    assert outcome(federation, run_task(federation, neuron, "cleanup"))[0] == "succeeded"
    over.touch()
    wait_for(lambda: neuron.desk.given_up() == 0, 5, "the end of the watch")


# -- processes that die ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", APART)
def test_a_killed_process_costs_an_idempotent_task_one_more_run_and_any_other_its_outcome(
    kind: str, start: Start, federation: Federation, tmp_path: Path
) -> None:
    neuron = start(kind)
    release, once = tmp_path / "release", tmp_path / "once"
    command = run_task(federation, neuron, "effect", effects=str(once), release=str(release))
    os.kill(_effect(once)[-1][1], signal.SIGKILL)
    ended, message = outcome(federation, command)
    assert ended == "failed"
    assert "WorkerLost" in message
    if kind == "processes":
        assert "SIGKILL" in message
        again = tmp_path / "again"
        command = run_task(federation, neuron, "idempotent_effect", effects=str(again), release=str(release))
        os.kill(_effect(again)[-1][1], signal.SIGKILL)
        (_, _), (attempt, pid) = _effect(again, 2)
        release.touch()
        assert (attempt, outcome(federation, command)) == (2, ("succeeded", {"pid": pid, "attempt": 2}))
        # One more, not one more each time.
        command = run_task(federation, neuron, "idempotent_effect", effects=str(again), release=str(tmp_path / "no"))
        for number in (3, 4):
            os.kill(_effect(again, number)[-1][1], signal.SIGKILL)
        assert outcome(federation, command)[0] == "failed"
    assert len(work.lines(once)) == 1


def _effect(path: Path, number: int = 1) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = wait_for(
        lambda: len(seen := work.lines(path)) >= number and seen, 15, f"effect {number}"
    )
    return found


def test_a_segfault_is_the_failure_of_its_task_alone(start: Start, federation: Federation) -> None:
    neuron = start("processes")
    ended, message = outcome(federation, run_task(federation, neuron, "segfaults"))
    assert ended == "failed"
    assert "SIGSEGV" in message
    assert outcome(federation, run_task(federation, neuron, "double", n=4)) == ("succeeded", 8)


def test_a_broken_pool_of_a_host_is_told_in_health_and_tasks_stay_pending(
    start: Start, federation: Federation
) -> None:
    neuron = start("a host's processes")
    assert "WorkerLost" in outcome(federation, run_task(federation, neuron, "segfaults"))[1]
    command = run_task(federation, neuron, "double", n=4)
    wait_for(lambda: "the executor takes no task" in reasons(neuron), 5, "the reason in health")
    untouched = run_task(federation, neuron, "double", n=5)
    assert outcome(federation, run_task(federation, neuron, "cleanup"))[0] == "succeeded"
    # The first found out and waits; what came after is left to the federation.
    assert (status_of(federation, command), status_of(federation, untouched)) == ("acknowledged", "pending")


@pytest.mark.slow
def test_what_a_task_forks_keeps_neither_its_result_nor_its_end_from_being_seen(
    start: Start, federation: Federation, tmp_path: Path
) -> None:
    neuron = start("processes")
    over = tmp_path / "over"
    ended, copy = outcome(federation, run_task(federation, neuron, "forks", over=str(over)))
    assert ended == "succeeded"
    # Its copy holds the other end of the pipe, and of whatever else would tell of an end.
    ended, message = outcome(federation, run_task(federation, neuron, "forks_and_dies", over=str(over)))
    assert (ended, "SIGKILL" in message) == ("failed", True)
    assert not gone(copy)
    over.touch()
    wait_for(lambda: gone(copy), 5, "the copy's end")


def test_a_thread_left_behind_does_not_keep_the_process(
    start: Start, federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuron.executors.END_SECONDS", 0.2)
    neuron = start("processes")
    command = run_task(federation, neuron, "leaves_a_thread", started=str(tmp_path / "started"))
    assert outcome(federation, command) == ("succeeded", "returned")
    pid = pid_in(tmp_path / "started")
    wait_for(lambda: gone(pid), 5, "the process's end")


def test_a_process_finds_its_cancel_event_though_nobody_kept_the_handle() -> None:
    engine = ProcessEngine()
    logger = logging.LoggerAdapter(logging.getLogger("neuron"))
    call = Call(work.double, {"n": 4}, False, "double", "c1", 1, time.time() + 30)
    future = engine.start(call, Run("c1", "run_task"), logger).future
    gc.collect()
    assert future.result(20) == 8
    engine.close()


def test_a_stop_kills_what_does_not_listen(start: Start, federation: Federation, tmp_path: Path) -> None:
    neuron = start("processes", shutdown_grace=1)
    run_task(federation, neuron, "deaf", started=str(tmp_path / "started"))
    pid = pid_in(tmp_path / "started")
    began = time.monotonic()
    neuron.stop()
    assert time.monotonic() - began < 2
    wait_for(lambda: gone(pid), 5, "the process's end")


# -- the program -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tasks_of_the_program_itself_run_in_processes_and_print_beside_the_log(
    run_neuron: Callable[..., NeuronProcess], federation: Federation, tmp_path: Path
) -> None:
    process = run_neuron(script=program(tmp_path), federation_url=federation.url, executor="processes")
    neuron_id = federation.wait_for_neuron(timeout=20)
    assert outcome(federation, run_task(federation, neuron_id, "own", n=4)) == ("succeeded", 12)
    assert outcome(federation, run_task(federation, neuron_id, "prints"))[0] == "succeeded"
    assert outcome(federation, run_task(federation, neuron_id, "report_generation"))[0] == "succeeded"
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    assert not [line for line in process.lines if line.get("unparsed")]
    assert process.stderr == "a line of the task, no JSON\na line of its child\n" or sorted(
        process.stderr.splitlines()
    ) == ["a line of its child", "a line of the task, no JSON"]


@pytest.mark.slow
def test_a_killed_neuron_takes_its_task_processes_with_it(
    run_neuron: Callable[..., NeuronProcess], federation: Federation, tmp_path: Path
) -> None:
    process = run_neuron(script=program(tmp_path), federation_url=federation.url, executor="processes")
    neuron_id = federation.wait_for_neuron(timeout=20)
    command = run_task(federation, neuron_id, "deaf", started=str(tmp_path / "started"))
    pid = pid_in(tmp_path / "started")
    process.signal(signal.SIGKILL)
    try:
        wait_for(lambda: gone(pid), 5, "the end of the task's process")
    finally:
        # One that lives on would hold the log's pipe, and this test with it.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run_neuron(script=program(tmp_path), federation_url=federation.url, executor="processes")
    assert outcome(federation, command)[0] == "interrupted"


@pytest.mark.slow
def test_a_signal_to_the_whole_group_lets_the_task_finish_within_the_grace(
    run_neuron: Callable[..., NeuronProcess], federation: Federation, tmp_path: Path
) -> None:
    process = run_neuron(
        script=program(tmp_path), federation_url=federation.url, executor="processes", prefix=["setsid"]
    )
    neuron_id = federation.wait_for_neuron(timeout=20)
    effects, release = tmp_path / "effects", tmp_path / "release"
    command = run_task(federation, neuron_id, "effect", effects=str(effects), release=str(release))
    pid = _effect(effects)[0][1]
    os.killpg(os.getpgid(pid), signal.SIGTERM)
    process.wait_logged("stopping")
    release.touch()
    assert outcome(federation, command)[0] == "succeeded"
    assert process.wait() == 0


# -- registration and settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_a_task_that_another_process_could_not_import_is_refused_at_registration(kind: str, tmp_path: Path) -> None:
    def local() -> None:
        """Only this function knows it."""

    executor = make_executor(kind)
    settings = NeuronConfig(
        executor=kind if executor is None else "threads", state_dir=str(tmp_path / "state"), port=0
    )
    neuron = APINeuron(settings, executor=executor)
    if kind in APART:
        with pytest.raises(DefinitionError, match=r"test_executors\.py:\d+: task 'local'.*top level of a module"):
            neuron.task("local")(local)
    else:
        neuron.task("local")(local)
    if executor is not None:
        executor.shutdown()


def test_a_decorator_without_its_name_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    neuron: Any = APINeuron(NeuronConfig(state_dir=str(tmp_path / "state"), port=0))
    for kind in ("task", "command", "dependency"):
        with pytest.raises(DefinitionError, match=rf'work\.py:\d+: write @neuron\.{kind}\("a name"\)'):
            getattr(neuron, kind)(work.double)


def test_an_executor_that_was_shut_down_leaves_tasks_pending_until_there_is_another(
    start: Start, federation: Federation, tmp_path: Path
) -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    neuron = APINeuron(
        NeuronConfig(
            federation_url=federation.url, state_dir=str(tmp_path / "own"), port=0, heartbeat_interval=0.2,
            command_interval=0.1,
        ),
        executor=pool,
    )
    neuron.task("double")(work.double)
    with neuron:
        federation.wait_for_neuron(neuron.neuron_id)
        command = run_task(federation, neuron, "double", n=2)
        wait_for(lambda: "cannot schedule new futures" in reasons(neuron), 5, "the reason in health")
        assert federation.heartbeats(neuron.neuron_id)
        assert status_of(federation, command) != "completed"


def test_a_machine_without_room_for_a_process_makes_tasks_wait(
    start: Start, federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuron.executors.UNAVAILABLE_SECONDS", 0.2)
    neuron = start("processes")
    engine = neuron.engine()
    assert isinstance(engine, ProcessEngine)
    pipe = engine._context.Pipe
    refusals: list[int] = []

    def no_room() -> Any:
        if len(refusals) < 3:
            refusals.append(1)
            raise OSError(errno.EMFILE, "Too many open files")
        return pipe()

    monkeypatch.setattr(engine._context, "Pipe", no_room, raising=False)
    assert outcome(federation, run_task(federation, neuron, "double", n=4)) == ("succeeded", 8)
    assert len(refusals) == 3


def test_an_unknown_executor_is_named_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="'forks' is none of threads, processes, dask"):
        open_engine("forks")
    with pytest.raises(ConfigError, match="did you mean processes"):
        NeuronConfig(executor="process")


def test_cancel_across_a_hosts_processes_gives_the_task_up_after_the_grace(
    start: Start, federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "CANCEL_GRACE", 0.3)
    neuron = start("a host's processes")
    effects = tmp_path / "effects"
    command = run_task(federation, neuron, "effect", effects=str(effects), release=str(tmp_path / "release"))
    _effect(effects)
    federation.issue(neuron.neuron_id, "cancel_task", {"commandId": command})
    assert outcome(federation, command)[0] == "cancelled"
    assert neuron.desk.given_up() == 1
    (tmp_path / "release").touch()
    wait_for(lambda: neuron.desk.given_up() == 0, 5, "its end")
