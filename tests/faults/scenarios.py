"""Short trials of one promise each. A scenario returns what was violated: nothing, for the neuron as it should be.

Tests run them on the neuron, and tests/test_mutants.py on builds of it with one known bug each.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.durability import SYSCALLS, out_of_order
from tests.faults.kill_points import Place, enumerate_kill_points
from tests.faults.launcher import Launcher, afflicted
from tests.faults.trials import Stuck, Trial
from tests.rig.fault_proxy import FaultProxy, TcpFault
from tests.rig.raw_server import RawServer, answer, drip_body, redirect
from tests.rig.recording import Fault

Scenario = Callable[[Path, Path], list[str]]


def scenario(run: Scenario) -> Scenario:
    """What does not come about is a violation too."""

    @functools.wraps(run)
    def checked(source: Path, directory: Path) -> list[str]:
        try:
            return run(source, directory)
        except Stuck as stuck:
            return [str(stuck)]

    return checked


def _told(trial: Trial) -> list[str]:
    return [f"{name}: {fault}" for name, faults in trial.violations().items() for fault in faults]


@scenario
def killed_while_it_works(source: Path, directory: Path) -> list[str]:
    """F1 in small: one task that must not run twice, killed at the writes of each of its steps."""
    places = [
        Place("pending", "pwrite64", 4), Place("acknowledge", "pwrite64"), Place("acknowledge", "sendto"),
        Place("complete", "pwrite64", 6),
    ]
    counts = enumerate_kill_points(
        directory, [(place, one_task) for place in places], source=source, stop_at_first=True
    )
    return counts.details


def one_task(trial: Trial) -> None:
    trial.issue_task("effect")


@scenario
def listed_again(source: Path, directory: Path) -> list[str]:
    """F25: a reported command is pending again, in the same life and in the next; then with another payload."""
    with Launcher(directory, source=source) as launcher, Trial(launcher, directory) as trial:
        child = trial.start()
        command = trial.issue_task("effect")
        trial.until(trial.idle)
        trial.list_again(command)
        trial.until(trial.idle, what="the stored result, sent again")
        child.kill()
        trial.start()
        trial.list_again(command)
        trial.until(trial.idle, what="the stored result, sent by the next process")
        found = _told(trial)
        completes = len(trial.federation.of("complete", command))
        acknowledges = len(trial.federation.of("acknowledge", command))
        if (completes, acknowledges) != (3, 1):
            found.append(f"{completes} completions and {acknowledges} acknowledges, wanted 3 and 1")
        if found:
            return found
        trial.list_again(command, {"task": "effect", "params": {"n": 77}})
        trial.until(lambda: trial.ended(command), what="the refusal of a reused id")
        if trial.outcome(command) != "rejected" or len(trial.effects()) != 1:
            found.append(f"a reused id ended {trial.outcome(command)} with {len(trial.effects())} effects")
        if not trial.child or not trial.child.logged("came again with another payload"):
            found.append("a reused id is not in the log")
        return found


@scenario
def replies_lost(source: Path, directory: Path) -> list[str]:
    """F10: the federation has acted, and the answer to acknowledge and complete does not arrive."""
    with Launcher(directory, source=source) as launcher, Trial(launcher, directory) as trial:
        with FaultProxy(trial.federation.port) as proxy:
            proxy.script([TcpFault("drop_reply", "/acknowledge"), TcpFault("drop_reply", "/complete")])
            command = trial.issue_task("effect")
            trial.start(federation_url=proxy.url)
            trial.until_settled()
            trial.until(lambda: not trial.ended(command) or len(trial.federation.of("complete")) > 1)
            return _told(trial) + [f"{proxy.counts}"] * (proxy.counts["drop_reply"] != 2)


@scenario
def power_cut(source: Path, directory: Path) -> list[str]:
    """F3: what a step rests on is durable before that step."""
    with Launcher(directory, source=source) as launcher, Trial(launcher, directory) as trial:
        child = trial.start(trace=[SYSCALLS])
        for kind, data in (
            ("run_task", {"task": "effect", "params": {"n": 1}}), ("no_such_command", {}),
            ("config_update", {"log_level": "DEBUG"}), ("run_task", {"task": "effect", "params": {"n": 2}}),
        ):
            # One after the other: what one writes must not be taken for what another rests on.
            trial.issue(kind, data)
            trial.until(trial.idle)
        child.kill()
        trace = Path(f"{trial.state}.strace").read_text(errors="replace")
        seen, faults = out_of_order(trace, Path(f"{trial.state}.effects"))
        if (seen.acknowledges, seen.completes, seen.effects) != (4, 4, 2):
            faults.append(f"the trace is not whole: {seen}")
        return faults


@scenario
def disk_full(source: Path, directory: Path) -> list[str]:
    """F22: nothing is acknowledged that cannot be written down; when it can, all is as if nothing had been."""
    with Launcher(directory, source=source) as launcher, Trial(launcher, directory) as trial:
        child = trial.start()
        trial.issue_task("effect")
        trial.until(trial.idle)
        before = len(trial.federation.of("acknowledge"))
        with afflicted(child, "pwrite64:error=ENOSPC"):
            trial.issue_task("effect")
            looks = len(trial.federation.of("pending"))
            trial.until(lambda: len(trial.federation.of("pending")) >= looks + 3 or child.logged("cannot be written"))
            beats = len(trial.federation.of("heartbeat"))
            trial.until(lambda: len(trial.federation.of("heartbeat")) >= beats + 2, what="heartbeats while it is full")
            acknowledged = len(trial.federation.of("acknowledge")) - before
        if acknowledged:
            return [f"{acknowledged} acknowledges without a durable entry"]
        found = []
        cured = time.monotonic()
        trial.until(trial.idle, what="the command that waited for the disk")
        if time.monotonic() - cured > 3:
            found.append(f"recovered after {time.monotonic() - cured:.1f} s")
        return found + _told(trial)


@scenario
def redirected(source: Path, directory: Path) -> list[str]:
    """F15: what the federation's address redirects to hears nothing."""
    with Launcher(directory, source=source) as launcher, RawServer(answer(b"{}")) as elsewhere:
        with RawServer(redirect(f"{elsewhere.url}/api")) as server, Trial(launcher, directory) as trial:
            trial.start(federation_url=server.url)
            trial.until(
                lambda: elsewhere.conversations or sum(one.closed is not None for one in server.conversations) >= 5,
                what="five calls that were redirected",
            )
            return [f"{len(elsewhere.conversations)} connections to elsewhere"] * bool(elsewhere.conversations)


@scenario
def dripped(source: Path, directory: Path) -> list[str]:
    """F11: a call ends at its deadline, though the answer drips on."""
    with Launcher(directory, source=source) as launcher, RawServer(drip_body(0.1)) as server:
        with Trial(launcher, directory) as trial:
            trial.start(federation_url=server.url, request_timeout=0.5)
            trial.until(lambda: server.conversations, what="a call")
            first = server.conversations[0]
            trial.until(lambda: first.closed or first.seconds_open > 2, what="its end")
            return [f"a call of 0.5 s took {first.seconds_open:.1f} s"] * (first.seconds_open > 1.5)


@scenario
def started_twice(source: Path, directory: Path) -> list[str]:
    """F7: a second process on the same state directory ends at once and has sent nothing."""
    with Launcher(directory, source=source) as launcher, Trial(launcher, directory) as trial:
        first = trial.start()
        trial.until(lambda: trial.federation.of("heartbeat"))
        first.signal(signal.SIGSTOP)
        # What it had on the way when it was stopped is not the second's.
        quiet = threading.Event()
        seen = -1
        while seen != len(trial.federation.requests):
            seen = len(trial.federation.requests)
            quiet.wait(0.3)
        began = time.monotonic()
        second = trial.start()
        ended = second.ended(1.0)
        seconds = time.monotonic() - began
        sent = len(trial.federation.requests) - seen
        first.signal(signal.SIGCONT)
        first.kill()
        if not ended:
            return ["the second process goes on"]
        return [f"the second ended {second.wait()} after {seconds:.1f} s, {sent} requests"] * (
            second.wait() != os.EX_TEMPFAIL or sent > 0
        )


@scenario
def served_late(source: Path, directory: Path) -> list[str]:
    """The outbox: results of an outage go out in the order they came about, each once, and no heartbeat queues."""
    with Launcher(directory, source=source) as launcher, Trial(launcher, directory) as trial:
        trial.start(max_concurrent_tasks=1)
        commands = [trial.issue_task("effect") for _ in range(6)]
        trial.federation.always("complete", Fault(503))
        trial.until(lambda: len(trial.effects()) == 6, what="six effects")
        trial.federation.always("complete", None)
        trial.until(trial.idle, what="six results")
        taken = [one.command_id for one in trial.federation.transitions if one.new == "completed"]
        return _told(trial) + [f"delivered in the order {taken} and not {commands}"] * (taken != commands)
