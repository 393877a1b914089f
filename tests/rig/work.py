"""Tasks of the tests, importable where another process has to find them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from neuron.errors import Rejected
from neuron.tasks import TaskContext


def double(n: int) -> int:
    return 2 * n


def effect(effects: str, release: str = "", *, context: TaskContext) -> dict[str, Any]:
    """Leaves one line `attempt pid` in `effects`, then waits for the file `release`, if one is named."""
    with Path(effects).open("a", encoding="utf-8") as file:
        file.write(f"{context.attempt} {os.getpid()}\n")
    while release and not Path(release).exists():
        context.check_cancelled()
        context.cancelled.wait(0.02)
    return {"pid": os.getpid(), "attempt": context.attempt}


def lines(path: Path) -> list[tuple[int, int]]:
    """`(attempt, pid)` of every effect so far."""
    if not path.exists():
        return []
    return [(int(a), int(b)) for a, b in (line.split() for line in path.read_text(encoding="utf-8").splitlines())]


def half_way(release: str, context: TaskContext) -> str:
    context.logger.warning("half of %s", context.task)
    context.progress(0.5, "rows 500/1000")
    while not Path(release).exists():
        context.cancelled.wait(0.02)
    return "done"


def until_cancelled(context: TaskContext) -> str:
    context.progress(0.1, "waiting")
    context.cancelled.wait(30)
    context.check_cancelled()
    return "nobody cancelled"


def deaf(started: str, over: str = "") -> None:
    """Hears no cancellation; ends when the file `over` is there, or after a minute."""
    Path(started).write_text(str(os.getpid()), encoding="utf-8")
    _wait_for(over)


def _wait_for(file: str) -> None:
    """A minute at most: what a failed test leaves behind ends too."""
    deadline = time.monotonic() + 60
    while not (file and Path(file).exists()) and time.monotonic() < deadline:
        threading.Event().wait(0.02)


def raises() -> None:
    raise KeyError("no such row")


def refuses() -> None:
    raise Rejected("the rows have no price", rows=3)


class Picky(Exception):
    """Cannot be unpickled: it wants two arguments and keeps one."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


def raises_unpicklable() -> None:
    raise Picky("no", "way")


def returns_unpicklable() -> Any:
    return threading.Lock()


def returns_much() -> str:
    return "x" * 10_000_000


def exits() -> None:
    sys.exit(3)


def segfaults() -> None:
    ctypes.string_at(0)


def prints() -> str:
    print("a line of the task, no JSON")
    subprocess.run([sys.executable, "-c", "print('a line of its child')"], check=True)
    return "printed"


def forks(over: str) -> int:
    """Its copy lives on until `over`, holds what the task's process had open, and returns too."""
    pid = os.fork()
    if pid == 0:
        _wait_for(over)
    return pid


def forks_and_dies(over: str) -> None:
    if forks(over):
        os.kill(os.getpid(), signal.SIGKILL)


def leaves_a_thread(started: str) -> str:
    threading.Thread(target=deaf, args=(started,)).start()
    return "returned"


TASKS = (
    double, effect, half_way, until_cancelled, deaf, raises, refuses, raises_unpicklable, returns_unpicklable,
    returns_much, exits, segfaults, prints, forks, forks_and_dies, leaves_a_thread,
)
