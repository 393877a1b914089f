"""Reads a trace of system calls and says what a power cut could have undone. SIGKILL cannot show that: what was
written survives in the page cache."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SYSCALLS = "fsync,fdatasync,pwrite64,write,sendto,rename,renameat,renameat2,openat"

_WHOLE = re.compile(r"^(\d+) +(\w+)\((.*)\) += (-?\d+)")
_BEGUN = re.compile(r"^(\d+) +(\w+)\((.*?),? <unfinished \.\.\.>$")
_ENDED = re.compile(r"^(\d+) +<\.\.\. (\w+) resumed>.*\) += (-?\d+)")


@dataclass(frozen=True)
class Step:
    """A call begun or ended (then with its result, 0 or above where it succeeded)."""

    name: str
    text: str
    begun: bool
    ended: bool
    good: bool = True

    @property
    def path(self) -> str:
        """Of the descriptor it was given."""
        found = re.match(r"\d+<([^>]*)>", self.text)
        return found[1] if found else ""


def steps(trace: str) -> Iterator[Step]:
    open_calls: dict[tuple[str, str], str] = {}
    for line in trace.splitlines():
        if whole := _WHOLE.match(line):
            yield Step(whole[2], whole[3], True, True, int(whole[4]) >= 0)
        elif begun := _BEGUN.match(line):
            open_calls[begun[1], begun[2]] = begun[3]
            yield Step(begun[2], begun[3], True, False)
        elif ended := _ENDED.match(line):
            yield Step(ended[2], open_calls.pop((ended[1], ended[2]), ""), False, True, int(ended[3]) >= 0)


@dataclass
class Verdict:
    acknowledges: int = 0
    completes: int = 0
    effects: int = 0
    renames: int = 0
    registrations: int = 0


def out_of_order(trace: str, effects: Path) -> tuple[Verdict, list[str]]:
    """What was seen, and which steps came before what they rest on was durable."""
    seen, faults = Verdict(), []
    unsynced: set[str] = set()  # files with writes that no sync has followed
    syncing: dict[str, bool] = {}  # a sync under way, and whether nothing was written since it began
    unsynced_directories: set[str] = set()

    def check(what: str) -> None:
        for path in sorted(unsynced):
            faults.append(f"{what} before {Path(path).name} was durable")
        for path in sorted(unsynced_directories):
            faults.append(f"{what} before the entries of {Path(path).name} were durable")

    for step in steps(trace):
        ours = "journal.db" in step.path or "identity.json" in step.path
        if step.name in ("pwrite64", "write") and ours and not step.path.endswith("-shm") and step.begun:
            unsynced.add(step.path)
            syncing[step.path] = False
        elif step.name in ("fsync", "fdatasync"):
            if step.begun:
                syncing[step.path] = True
            if step.ended and step.good and syncing.pop(step.path, False):
                unsynced.discard(step.path)
                unsynced_directories.discard(step.path)
        elif step.name.startswith("rename") and step.begun:
            source, target = re.findall(r'"([^"]*)"', step.text)[:2]
            seen.renames += 1
            if source in unsynced:
                faults.append(f"{Path(source).name} was renamed before it was durable")
            unsynced_directories.add(str(Path(target).parent))
        elif step.name == "openat" and step.begun and str(effects) in step.text:
            seen.effects += 1
            check("an effect")
        elif step.name == "sendto" and step.begun and (call := re.search(r'"[A-Z]+ (\S+) HTTP', step.text)):
            verb = call[1].rpartition("/")[2]
            seen.acknowledges += verb == "acknowledge"
            seen.completes += verb == "complete"
            seen.registrations += verb == "register"
            if verb in ("acknowledge", "complete", "register"):
                check(verb)
    return seen, faults
