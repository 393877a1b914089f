"""Tasks: what is refused at registration, what a command's parameters are checked against, and the context of a run."""

from __future__ import annotations

import functools
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, List, Literal, NotRequired, Optional, TypedDict  # noqa: UP035 - what adopters write

import pytest

from neuron.errors import Cancelled, DefinitionError, Rejected
from neuron.tasks import TaskContext, TaskRegistry
from neuron_client import APINeuron
from tests.rig.process import ROOT, wait_for
from tests.rig.recording import RecordingFederation

HERE = Path(__file__).name


class Row(TypedDict):
    id: int
    note: NotRequired[str]


class Dated(TypedDict):
    when: datetime


class Tree(TypedDict):
    children: list[Tree]


@pytest.fixture
def registry() -> TaskRegistry:
    return TaskRegistry()


def refusal(registry: TaskRegistry, function: Any, name: str = "mine", **options: Any) -> str:
    with pytest.raises(DefinitionError) as caught:
        registry.add(name, function, **options)
    assert registry.names() == [] or name in registry.names()
    return str(caught.value)


def line_of(function: Any) -> str:
    return f"{HERE}:{function.__code__.co_firstlineno}"


def faults_of(registry: TaskRegistry, function: Callable[..., Any], params: Any) -> list[str]:
    """What the check says against these parameters of this function; empty where they fit."""
    task = registry.add("mine", function)
    try:
        task.arguments(params)
    except Rejected as refused:
        text, told = str(refused), refused.details.get("faults")
    else:
        return []
    faults = told if isinstance(told, list) else [text]
    assert all(fault in text for fault in faults), "every fault is in the sentence too"
    return faults


# -- registration


def first(params: dict[str, Any]) -> None: ...


def second(params: dict[str, Any]) -> None: ...


def test_a_duplicate_name_is_refused_with_both_lines(registry: TaskRegistry) -> None:
    registry.add("mine", first)
    text = refusal(registry, second)
    assert line_of(second) in text
    assert line_of(first) in text
    assert "'mine' is registered already" in text
    assert registry.get("mine").function is first


def test_a_built_in_name_is_replaced_only_by_saying_so(make_neuron: Callable[..., APINeuron]) -> None:
    neuron = make_neuron()
    with pytest.raises(DefinitionError, match=r"built in.*replace=True") as caught:
        neuron.task("cleanup")(first)
    assert line_of(first) in str(caught.value)
    neuron.task("cleanup", replace=True)(first)
    assert neuron.tasks.get("cleanup").function is first
    neuron.task("word")(first)
    with pytest.raises(DefinitionError, match="registered already"):
        neuron.task("word", replace=True)(second)


def test_a_task_decorator_gives_the_function_back(make_neuron: Callable[..., APINeuron]) -> None:
    neuron = make_neuron()

    @neuron.task("double")
    def double(number: int) -> int:
        return 2 * number

    assert double(4) == 8


@pytest.mark.parametrize("name", ["", " x", "a\nb", "x" * 101, 5, None, ["x"]])
def test_a_name_that_is_no_plain_text_is_refused(registry: TaskRegistry, name: Any) -> None:
    assert line_of(first) in refusal(registry, first, name=name)


def misspelt(rows: lst[str]) -> None: ...  # type: ignore[name-defined]  # noqa: F821


def misspelt_attribute(when: functools.Partial) -> None: ...  # type: ignore[name-defined]


def no_expression(rows: "list[") -> None: ...  # type: ignore[valid-type] # noqa: F722


def of_a_date(when: datetime) -> None: ...


def of_dates(when: list[datetime | None]) -> None: ...


def of_a_dated_record(record: Dated) -> None: ...


def of_a_tuple(pair: tuple[int, int]) -> None: ...


def of_a_list_literal(numbers: Any) -> None: ...


of_a_list_literal.__annotations__["numbers"] = [int]  # as in a module without postponed annotations


async def coroutine(params: dict[str, Any]) -> None: ...


def generator(params: dict[str, Any]) -> Iterator[int]:
    yield 1


def positional(text: str, /) -> None: ...


def starred(*texts: str) -> None: ...


def both(params: dict[str, Any], top: int) -> None: ...


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (misspelt, "'lst' is not defined"),
        (misspelt_attribute, "Partial"),
        (no_expression, "signature cannot be read"),
        (of_a_date, "parameter 'when'"),
        (of_dates, "not a JSON type"),
        (of_a_dated_record, "not a JSON type"),
        (of_a_tuple, "list[…]"),
        (coroutine, "write a plain function"),
        (of_a_list_literal, "not a JSON type"),
        (generator, "write a plain function"),
        (positional, "parameter 'text' cannot be given by name"),
        (starred, "parameter 'texts' cannot be given by name"),
        (both, "takes `params` whole and its keys by name"),
    ],
)
def test_a_function_that_could_not_work_is_refused_with_its_line(
    registry: TaskRegistry, function: Any, words: str
) -> None:
    text = refusal(registry, function)
    assert line_of(function) in text
    assert "'mine'" in text
    assert words in text


@pytest.mark.parametrize("thing", [None, 42, "os.system", {"a": 1}])
def test_what_cannot_be_called_is_refused_by_its_repr(registry: TaskRegistry, thing: Any) -> None:
    assert f"{thing!r} is not a function" in refusal(registry, thing)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": "5"}, "timeout='5'"),
        ({"timeout": float("inf")}, "timeout=inf"),
        ({"retries": -1}, "retries=-1"),
        ({"retries": 1.5}, "retries=1.5"),
        ({"retries": 2}, "wants idempotent=True"),
    ],
)
def test_an_option_that_could_not_work_is_refused_with_the_line(
    registry: TaskRegistry, options: dict[str, Any], words: str
) -> None:
    text = refusal(registry, first, **options)
    assert line_of(first) in text
    assert words in text


def test_a_task_of_another_process_must_stand_at_the_top_of_a_module(make_neuron: Callable[..., APINeuron]) -> None:
    neuron = make_neuron(executor="processes")
    with pytest.raises(DefinitionError, match="defined inside a function"):

        @neuron.task("inner")
        def inner(text: str) -> None: ...

    neuron.task("outer")(first)


def test_an_unknown_task_is_rejected_with_the_supported_ones_and_the_nearest(registry: TaskRegistry) -> None:
    registry.add("word_count", first)
    with pytest.raises(Rejected, match="did you mean 'word_count'") as caught:
        registry.get("word_cound")
    assert caught.value.details["supported"] == ["word_count"]
    for name in (None, 5, ["word_count"], {"a": 1}, "os.system", "__class__"):
        with pytest.raises(Rejected):
            registry.get(name)


# -- parameters


def import_rows(
    source: str, limit: int, ratio: float = 1.0, dry: bool = False, mode: Literal["append", "replace"] = "append"
) -> None: ...


def test_every_fault_of_the_parameters_is_named_at_once(registry: TaskRegistry) -> None:
    faults = faults_of(registry, import_rows, {"limit": "5", "ratio": "1", "dry": 1, "mode": "apend", "sourc": "x"})
    assert faults == [
        "params.source: is missing",
        'params.limit: "5" is not a whole number',
        'params.ratio: "1" is not a number',
        "params.dry: 1 is not true or false",
        "params.mode: \"apend\" is none of 'append', 'replace'",
        "params.sourc: is unknown; did you mean 'source'?",
    ]


def test_parameters_that_fit_are_passed_by_name_and_defaults_are_left_out(registry: TaskRegistry) -> None:
    task = registry.add("mine", import_rows)
    assert task.arguments({"source": "x", "limit": 5, "ratio": 2}) == {"source": "x", "limit": 5, "ratio": 2}


def of_anything(value: Any, other=None) -> None: ...  # type: ignore[no-untyped-def]


def of_number(value: float) -> None: ...


def of_whole(value: int) -> None: ...


def of_null(value: None) -> None: ...


def of_optional(value: Optional[int] = None) -> None: ...  # noqa: UP045


def of_union(value: int | str | None) -> None: ...


def of_list(value: list[int]) -> None: ...


def of_bare_list(value: list) -> None: ...  # type: ignore[type-arg]


def of_old_list(value: List) -> None: ...  # type: ignore[type-arg] # noqa: UP006


def of_old_dict(value: Dict) -> None: ...  # type: ignore[type-arg] # noqa: UP006


def of_dict(value: dict[str, list[float]]) -> None: ...


def of_rows(value: list[Row]) -> None: ...


def of_row_or_rows(value: Row | list[Row]) -> None: ...


def of_tree(value: Tree) -> None: ...


def of_literal(value: Literal[1, "one", True]) -> None: ...


@pytest.mark.parametrize(
    ("function", "value", "fault"),
    [
        (of_anything, {"a": [None]}, None),
        (of_number, 1, None),
        (of_number, True, "params.value: true is not a number"),
        (of_whole, 1.0, "params.value: 1.0 is not a whole number"),
        (of_whole, False, "params.value: false is not a whole number"),
        (of_whole, None, "params.value: null is not a whole number"),
        (of_null, None, None),
        (of_null, 0, "params.value: 0 is not null"),
        (of_optional, None, None),
        (of_optional, 3, None),
        (of_optional, "3", 'params.value: "3" is not a whole number'),
        (of_union, "x", None),
        (of_union, [1], "params.value: [1] is not a whole number"),
        (of_list, [], None),
        (of_list, [1, "2", None], 'params.value[1]: "2" is not a whole number'),
        (of_list, {"0": 1}, 'params.value: {"0": 1} is not a list'),
        (of_bare_list, [1, "x"], None),
        (of_old_list, [1, "x"], None),
        (of_old_list, "x", 'params.value: "x" is not a list'),
        (of_old_dict, {"a": 1}, None),
        (of_dict, {"a": [1, 2.5]}, None),
        (of_dict, {"a": [1], "b": 5}, "params.value.b: 5 is not a list"),
        (of_dict, {"a": ["x"]}, 'params.value.a[0]: "x" is not a number'),
        (of_rows, [{"id": 1}, {"id": 2, "note": "n"}], None),
        (of_rows, [{"id": 1}, {"note": "n"}], "params.value[1].id: is missing"),
        (of_rows, [{"id": 1, "nota": "n"}], "params.value[0].nota: is unknown; did you mean 'note'?"),
        (of_rows, [{"id": 1, "note": None}], "params.value[0].note: null is not a text"),
        (of_row_or_rows, [{"id": "1"}], 'params.value[0].id: "1" is not a whole number'),
        (of_tree, {"children": [{"children": []}]}, None),
        (of_tree, {"children": [{"children": [5]}]}, "params.value.children[0].children[0]: 5 is not an object"),
        (of_literal, "one", None),
        (of_literal, 1.0, "params.value: 1.0 is none of 1, 'one', True"),
    ],
)
def test_a_value_is_checked_against_its_annotation(
    registry: TaskRegistry, function: Callable[..., Any], value: Any, fault: str | None
) -> None:
    faults = faults_of(registry, function, {"value": value})
    assert faults[:1] == ([fault] if fault else [])


def test_a_long_value_is_not_repeated_in_full_in_its_fault(registry: TaskRegistry) -> None:
    (fault,) = faults_of(registry, of_whole, {"value": "x" * 100_000})
    assert len(fault) < 200


def test_many_faults_are_bounded(registry: TaskRegistry) -> None:
    assert len(faults_of(registry, of_list, {"value": ["x"] * 10_000})) == 20


@pytest.mark.parametrize("params", [None, 5, "text", [1], True])
def test_params_that_are_no_object_are_rejected(registry: TaskRegistry, params: Any) -> None:
    (fault,) = faults_of(registry, first, params)
    assert "is not an object" in fault


def of_typed_params(params: Row) -> None: ...


def open_ended(text: str, **others: Any) -> None: ...


def test_params_taken_whole_are_checked_as_their_annotation(registry: TaskRegistry) -> None:
    assert faults_of(registry, of_typed_params, {"idd": 1}) == [
        "params.id: is missing", "params.idd: is unknown; did you mean 'id'?",
    ]


def test_a_function_that_takes_any_keyword_takes_any_parameter(registry: TaskRegistry) -> None:
    assert faults_of(registry, open_ended, {"text": "x", "more": 1}) == []


def with_context(text: str, context: TaskContext) -> None: ...


def test_the_context_is_no_parameter_of_a_command(registry: TaskRegistry) -> None:
    (fault,) = faults_of(registry, with_context, {"text": "x", "context": {"command_id": "forged"}})
    assert fault.startswith("params.context: is unknown")


# -- the context


@pytest.fixture
def running(oracle: RecordingFederation, make_neuron: Callable[..., APINeuron]) -> APINeuron:
    return make_neuron(federation_url=oracle.url, neuron_id="n-tasks", log_level="DEBUG")


def started(neuron: APINeuron) -> APINeuron:
    assert neuron.start()
    wait_for(neuron.registered.is_set, what="the registration")
    return neuron


def run_task(oracle: RecordingFederation, task: str, params: Any = None, **extra: Any) -> str:
    return oracle.issue("n-tasks", "run_task", {"task": task, "params": {} if params is None else params}, **extra)


def response_of(oracle: RecordingFederation, command_id: str, timeout: float = 15) -> dict[str, Any]:
    oracle.wait_until(lambda: oracle.of("complete", command_id), timeout, f"the completion of {command_id}")
    return {**oracle.of("complete", command_id)[0].body["response"], **oracle.of("complete", command_id)[0].body}


def test_progress_shows_in_status_and_in_the_heartbeat(oracle: RecordingFederation, running: APINeuron) -> None:
    release = threading.Event()

    @running.task("long")
    def long(context: TaskContext) -> str:
        context.progress(0.4, "rows 400/1000")
        release.wait(20)
        return context.command_id

    started(running)
    command = run_task(oracle, "long")
    try:
        shown = wait_for(lambda: running.status()["commands"]["running"], what="the running task")[0]
        shown = wait_for(
            lambda: [run for run in running.status()["commands"]["running"] if "progress" in run], what="progress"
        )[0]
        assert (shown["commandId"], shown["task"]) == (command, "long")
        assert (shown["progress"], shown["text"]) == (0.4, "rows 400/1000")

        def beaten() -> list[Any]:
            return [
                run
                for beat in oracle.of("heartbeat")
                for run in beat.body["performanceMetrics"]["runningCommands"]
                if run.get("progress") == 0.4
            ]

        oracle.wait_until(beaten, 10, "a heartbeat with the progress")
        assert beaten()[0]["commandId"] == command
    finally:
        release.set()
    assert response_of(oracle, command)["result"] == command


@pytest.mark.parametrize(
    ("told", "shown"), [(2, 1.0), (-1, 0.0), (float("nan"), 0.0), (float("inf"), 0.0), (True, 1.0)]
)
def test_progress_is_held_between_nothing_and_all(told: float, shown: float) -> None:
    reported: list[tuple[float, str]] = []
    context = TaskContext(
        task="t", command_id="c", attempt=1, deadline=time.time() + 5, cancelled=threading.Event(),
        logger=logging.getLogger("neuron.test"), report=lambda *progress: reported.append(progress),
    )
    context.progress(told, "x" * 1000)
    assert reported == [(shown, "x" * 200)]
    assert 0 < context.remaining() <= 5
    context.check_cancelled()
    context.cancelled.set()  # type: ignore[attr-defined]
    with pytest.raises(Cancelled):
        context.check_cancelled()


def test_the_context_tells_deadline_attempt_and_logs_under_the_neuron(
    oracle: RecordingFederation, running: APINeuron, caplog: pytest.LogCaptureFixture
) -> None:
    @running.task("look", timeout=30)
    def look(context: TaskContext) -> dict[str, Any]:
        context.logger.warning("from inside")
        return {"left": context.remaining(), "attempt": context.attempt, "cancelled": context.cancelled.is_set()}

    started(running)
    with caplog.at_level(logging.DEBUG, logger="neuron"):
        result = response_of(oracle, run_task(oracle, "look"))["result"]
    assert 25 < result["left"] <= 30
    assert (result["attempt"], result["cancelled"]) == (1, False)
    record = next(record for record in caplog.records if record.getMessage() == "from inside")
    assert record.__dict__["neuron_id"] == "n-tasks"


def test_a_failing_task_is_tried_again_as_often_as_it_asked(oracle: RecordingFederation, running: APINeuron) -> None:
    attempts: list[int] = []
    broken_attempts: list[int] = []

    @running.task("flaky", idempotent=True, retries=1)
    def flaky(context: TaskContext) -> int:
        attempts.append(context.attempt)
        if len(attempts) < 2:
            raise OSError("not yet")
        return len(attempts)

    @running.task("broken")
    def broken(context: TaskContext) -> None:
        broken_attempts.append(context.attempt)
        raise OSError("never")

    started(running)
    flaky_id, broken_id = run_task(oracle, "flaky"), run_task(oracle, "broken")
    assert response_of(oracle, flaky_id)["result"] == 2
    answer = response_of(oracle, broken_id)
    assert (answer["outcome"], answer["errorMessage"]) == ("failed", "OSError: never")
    assert attempts == [1, 2]
    assert broken_attempts == [1]


def test_a_task_that_refuses_its_request_is_not_tried_again(oracle: RecordingFederation, running: APINeuron) -> None:
    attempts = []

    @running.task("picky", idempotent=True, retries=5)
    def picky() -> None:
        attempts.append(1)
        raise Rejected("the table does not exist", known=["a", "b"])

    started(running)
    answer = response_of(oracle, run_task(oracle, "picky"))
    assert (answer["outcome"], answer["errorMessage"], answer["known"]) == (
        "rejected", "the table does not exist", ["a", "b"],
    )
    assert attempts == [1]


# -- hostile commands

HOSTILE: list[Any] = [
    {"task": "os.system", "params": {"command": "touch pwned"}},
    {"task": "subprocess.run", "params": {"args": ["touch", "pwned"]}},
    {"task": "__import__('os').system('touch pwned')", "params": {}},
    {"task": "__class__", "params": {}},
    {"task": "eval", "params": {"source": "1"}},
    {"task": "../../bin/sh", "params": {}},
    {"task": ["word_count"], "params": {}},
    {"task": {"name": "word_count"}, "params": {}},
    {"task": None, "params": {"text": "x"}},
    {"task": 5},
    {"task": "word_count\0", "params": {"text": "x"}},
    {"task": "x" * 90_000, "params": {}},
    {"task": "word_count", "params": {"text": "$(touch pwned)", "top": "$(touch pwned)"}},
    {"task": "word_count", "params": {"text": "`touch pwned`", "__class__": "x"}},
    {"task": "word_count", "params": {"text": 5}},
    {"task": "word_count", "params": {"text": ["a"]}},
    {"task": "word_count", "params": {"text": "x", "self": 1}},
    {"task": "word_count", "params": {"text": "x", "context": {"deadline": 0}}},
    {"task": "word_count", "params": ["x"]},
    {"task": "word_count", "params": "text=x"},
    {"task": "word_count", "params": None},
    {"task": "data_processing", "params": {"file": "../../../etc/passwd"}},
    {"task": "data_processing", "params": {"file": "/etc/passwd"}},
    {"task": "data_processing", "params": {"file": "a\0b"}},
    {"task": "data_processing", "params": {"file": "out/passwd"}},
    {"task": "data_processing", "params": {"file": "."}},
    {"task": "data_processing", "params": {"file": "x" * 5000}},
    {"task": "data_processing", "params": {"file": "http://127.0.0.1:1/x"}},
    {"task": "data_processing", "params": {"records": [], "file": "rows.csv"}},
    {"task": "data_processing", "params": {"records": "rows.csv"}},
    {"task": "batch_processing", "params": {"batches": [{"file": "/etc/passwd"}]}},
    {"task": "batch_processing", "params": {"batches": [{"fiel": "rows.csv"}]}},
    {"task": "report_generation", "params": {"path": "/etc/cron.d/x"}},
    {"task": "cleanup", "params": {"path": "/"}},
    "word_count",
    ["word_count", {"text": "x"}],
    None,
    5,
    {},
]
HARMLESS: list[Any] = [
    {"task": "word_count", "params": {"text": "$(touch pwned) `touch pwned` ; touch pwned | sh"}},
    {"task": "word_count", "params": {"text": "\u202e\u001b[2J\u0000 ../../x {0.__class__} %s %n"}},
    {"task": "word_count", "params": {"text": "x" * 90_000}},
    {"task": "data_processing", "params": {"records": [{"__class__": "x", "$where": "1"}, {"a": "\u0000"}]}},
    {"task": "data_processing", "params": {"file": "rows.csv"}},
]

AUDITED = """
import sys
effects = open({effects!r}, "a")
allowed = {allowed!r}
busy = False
def hook(event, args):
    global busy
    if busy:
        return
    busy = True
    try:
        told = event in ("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "pty.spawn",
                         "subprocess.Popen", "os.startfile", "ctypes.dlopen", "shutil.rmtree")
        if event == "socket.connect" and args[1][1:2] != ({port},):
            told = True
        if event == "open" and isinstance(args[0], str) and isinstance(args[2], int) and args[2] & 3:
            told = not args[0].startswith(tuple(allowed))
        if event == "open" and isinstance(args[0], (str, bytes)) and "passwd" in str(args[0]):
            told = True
        if told:
            effects.write(f"{{event}} {{args!r}}\\n")
            effects.flush()
    finally:
        busy = False
sys.argv = [{script!r}, *sys.argv[1:]]
sys.path.insert(0, {root!r})
import neuron_client, neuron.program, neuron.endpoints, neuron.data_profile, requests, bottle, waitress
sys.addaudithook(hook)
sys.exit(neuron_client.main())
"""


@pytest.mark.slow
def test_hostile_parameters_spawn_nothing_open_nothing_and_connect_nowhere(
    oracle: RecordingFederation, run_neuron: Callable[..., Any], tmp_path: Path
) -> None:
    data, state, effects = tmp_path / "data", tmp_path / "state", tmp_path / "effects"
    data.mkdir()
    (data / "rows.csv").write_text("a,b\n1,2\n")
    (data / "out").symlink_to("/etc")
    script = tmp_path / "audited.py"
    script.write_text(
        AUDITED.format(
            effects=str(effects), allowed=[str(state), "/dev/null"], port=oracle.port,
            script=str(ROOT / "neuron_client.py"), root=str(ROOT),
        )
    )
    process = run_neuron(
        script=script, federation_url=oracle.url, neuron_id="n-tasks", data_dir=str(data), command_interval=0.05
    )
    hostile = [oracle.issue("n-tasks", "run_task", payload) for payload in HOSTILE]
    kinds = ("exec", "shell", "__init__", "\u202e")
    unknown = [oracle.issue("n-tasks", kind, {"cmd": "touch pwned"}) for kind in kinds]
    harmless = [oracle.issue("n-tasks", "run_task", payload) for payload in HARMLESS]

    oracle.wait_until(lambda: not oracle.lost_commands(), 40, "an end of every command")

    def outcome(command_id: str) -> str:
        return str(oracle.of("complete", command_id)[0].body["response"]["outcome"])

    not_rejected = [(HOSTILE[at], outcome(one)) for at, one in enumerate(hostile) if outcome(one) != "rejected"]
    assert not_rejected == []
    assert [outcome(one) for one in unknown] == ["rejected"] * len(unknown)
    assert [outcome(one) for one in harmless] == ["succeeded"] * len(harmless)
    process.signal(2)
    assert process.wait() == 0
    assert effects.read_text() == ""
    assert not list(tmp_path.rglob("pwned"))
    assert not any("unparsed" in line for line in process.lines)
    assert oracle.own_4xx() == []
    assert oracle.schema_violations() == []


def test_the_audit_hook_of_the_test_above_sees_what_it_is_for(tmp_path: Path) -> None:
    effects = tmp_path / "effects"
    script = AUDITED.format(effects=str(effects), allowed=["/dev/null"], port=1, script="x", root=str(ROOT))
    before, _, _ = script.partition("sys.exit(")
    script = f"{before}\nimport os\nos.system('true')\nopen({str(tmp_path / 'new')!r}, 'w')\nopen('/etc/passwd')\n"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30, cwd=tmp_path)
    assert [line.split()[0] for line in effects.read_text().splitlines()] == ["os.system", "open", "open"]
