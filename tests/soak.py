"""`python -m tests.soak`: hundreds of kills and network faults, every kill point, then ten minutes at a fast clock.

Prints what it counted. A run that proves nothing (no duplicate completion, no interrupted command, fewer than a
hundred acknowledged ones) says so and fails, as does any violation. Exit codes: 0 all held, 1 violated, 3 void.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import requests

from tests.faults.kill_points import enumerate_kill_points
from tests.faults.launcher import Launcher
from tests.faults.random_kills import kills_and_network_faults, kills_under_load
from tests.faults.test_kill_points import places
from tests.faults.trials import Trial

SPEED = 50
"""How much faster the clock runs: the intervals as shipped (60, 5 and 300 s), each divided by this."""
SAMPLES = 60


def kills(seeds: int, total: int) -> tuple[list[str], list[str]]:
    """F2 over several seeds. Returns what was violated and why a run is void."""
    violated, void = [], []
    for seed in range(1, seeds + 1):
        with tempfile.TemporaryDirectory() as directory:
            run = kills_and_network_faults(seed, -(-total // seeds), Path(directory))
        print(run, flush=True)
        violated += [f"seed {seed}: {name}: {faults}" for name, faults in run.violations.items()]
        void += [f"seed {seed}: {reason}" for reason in run.void]
    return violated, void


def every_kill_point() -> list[str]:
    """F1, at every single write."""
    with tempfile.TemporaryDirectory() as directory:
        counts = enumerate_kill_points(Path(directory), places(every=1))
    print(counts, flush=True)
    return counts.details


def totals(seeds: int) -> list[str]:
    """F31 over several seeds."""
    violated = []
    for seed in range(1, seeds + 1):
        with tempfile.TemporaryDirectory() as directory:
            counted = kills_under_load(seed, 40, Path(directory), senders=6)
        print(f"load, seed {seed}: {counted}", flush=True)
        violated += counted.violations
    return violated


def fast_clock(minutes: float) -> tuple[list[str], list[str]]:
    """F36: an undisturbed neuron under a steady trickle of commands and requests; what must stay flat does."""
    settings = {
        "host": "127.0.0.1", "port": 0, "heartbeat_interval": 60 / SPEED, "command_interval": 5 / SPEED,
        "analytics_interval": 300 / SPEED,
    }
    pause = threading.Event()
    samples: list[tuple[float, int, int, int, int]] = []
    with tempfile.TemporaryDirectory() as name, Launcher(Path(name)) as launcher:
        with Trial(launcher, Path(name), analytics="accept") as trial:
            child = trial.start(**settings)
            address = str(child.wait_logged("neuron started")["message"]).rpartition("endpoints ")[2]
            process = psutil.Process(child.pid)
            began = time.monotonic()
            while (elapsed := time.monotonic() - began) < minutes * 60:
                # No config_update: each makes the neuron beat at once.
                for task in ("effect", "again", "slow"):
                    trial.issue_task(task)
                trial.issue("health_check")
                requests.post(f"{address}/data/process", json=[{"x": 1}], timeout=5)
                pause.wait(max(0.2, minutes * 60 / 400))
                if elapsed >= len(samples) * minutes * 60 / SAMPLES:
                    size = sum(path.stat().st_size for path in trial.state.iterdir())
                    memory = process.memory_info().rss
                    samples.append((elapsed, memory, process.num_threads(), process.num_fds(), size))
            trial.until(trial.idle, 30)
            elapsed = time.monotonic() - began
            beats = len(trial.federation.of("heartbeat"))
            violations = [f"{kind}: {faults}" for kind, faults in trial.violations().items()]
            violations += trial.federation.analytics_regressions()
            acknowledged = len(trial.federation.of("acknowledge"))
    half = samples[len(samples) // 2 :]
    growth = [(half[-1][index] - half[0][index]) for index in range(1, 5)]
    hours = (half[-1][0] - half[0][0]) * SPEED / 3600
    expected = elapsed / (60 / SPEED)
    print(
        f"fast clock: {elapsed / 60:.1f} min as {elapsed * SPEED / 3600:.1f} h, {acknowledged} commands, {beats} "
        f"heartbeats (expected {expected:.0f}); second half: RSS {half[0][1] / 1e6:.1f} -> {half[-1][1] / 1e6:.1f} MB, "
        f"threads {half[0][2]} -> {half[-1][2]}, descriptors {half[0][3]} -> {half[-1][3]}, state directory "
        f"{half[0][4] / 1e6:.2f} -> {half[-1][4] / 1e6:.2f} MB",
        flush=True,
    )
    if growth[0] > 1e6 * max(1.0, hours):
        violations.append(f"RSS grew by {growth[0] / 1e6:.1f} MB in {hours:.1f} h")
    # A command under way has a thread, and its connection.
    for what, grown in zip(("threads", "descriptors"), growth[1:3], strict=True):
        violations += [f"{what} grew by {grown}"] * (grown > 4)
    if growth[3] > 2e6 or half[-1][4] > 2e7:
        violations.append(f"the state directory grew by {growth[3]} to {half[-1][4]} bytes")
    if abs(beats - expected) > expected * 0.1 + 2:
        violations.append(f"{beats} heartbeats, expected {expected:.0f}")
    void = [f"{acknowledged} acknowledged commands"] if acknowledged < min(100, minutes * 40) else []
    return violations, void


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="random sequences of kills and faults (default 5)")
    parser.add_argument("--kills", type=int, default=500, help="kills over all seeds (default 500)")
    parser.add_argument("--minutes", type=float, default=10, help=f"at {SPEED} times the clock (default 10)")
    options = parser.parse_args()
    began = time.monotonic()
    violated, void = kills(options.seeds, options.kills)
    violated += every_kill_point()
    violated += totals(min(3, options.seeds))
    if options.minutes:
        for found, into in zip(fast_clock(options.minutes), (violated, void), strict=True):
            into += found
    print(f"{time.monotonic() - began:.0f} s")
    for line in violated:
        print(f"VIOLATED: {line}")
    for line in void:
        print(f"VOID, proves nothing: {line}")
    return 1 if violated else 3 if void else 0


if __name__ == "__main__":
    sys.exit(main())
