"""Does the fault suite see bugs? Each build of the neuron below has one known bug, and a scenario must catch it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults import scenarios
from tests.faults.scenarios import Scenario
from tests.rig.process import ROOT


@dataclass(frozen=True)
class Mutant:
    """`old` stands exactly once in `file`."""

    bug: str
    file: str
    old: str
    new: str
    caught_by: Scenario


MUTANTS = [
    Mutant(
        "acknowledges before the journal knows", "neuron/commands.py",
        "        entry, new = self._journal.receive(command_id",
        "        self._neuron.acknowledge(command_id)\n        entry, new = self._journal.receive(command_id",
        scenarios.killed_while_it_works,
    ),
    Mutant(
        "runs again what was running", "neuron/commands.py",
        "            elif entry.type in CONTROL or self._may_run_again(entry):",
        "            elif True:",
        scenarios.killed_while_it_works,
    ),
    Mutant(
        "runs again what had finished", "neuron/journal.py",
        "state IN ('received', 'acknowledged', 'running') ORDER",
        "state IN ('received', 'acknowledged', 'running', 'finished') ORDER",
        scenarios.killed_while_it_works,
    ),
    Mutant(
        "completes from memory before the journal knows", "neuron/commands.py",
        "        try:\n            self._journal.finish(entry, outcome, body)\n        except JournalUnavailable:",
        "        try:\n            self._neuron.complete(entry.command_id, body)\n"
        "            self._journal.finish(entry, outcome, body)\n        except JournalUnavailable:",
        scenarios.killed_while_it_works,
    ),
    Mutant(
        "begins the task before `running` is written", "neuron/commands.py",
        '                self._journal.advance(entry, "running")\n                result = '
        "self._neuron.handlers[entry.type](entry)\n",
        "                result = self._neuron.handlers[entry.type](entry)\n"
        '                self._journal.advance(entry, "running")\n',
        scenarios.killed_while_it_works,
    ),
    Mutant(
        "forgets the ids it has reported", "neuron/journal.py",
        "        def work(connection: sqlite3.Connection) -> tuple[Entry, bool]:\n",
        "        def work(connection: sqlite3.Connection) -> tuple[Entry, bool]:\n"
        "            connection.execute(\"DELETE FROM commands WHERE state = 'reported'\")\n",
        scenarios.listed_again,
    ),
    Mutant(
        "acknowledges what it has completed", "neuron/commands.py",
        "            self._journal.deliver_again(entry)\n",
        "            self._neuron.acknowledge(entry.command_id)\n            self._journal.deliver_again(entry)\n",
        scenarios.listed_again,
    ),
    Mutant(
        "takes another payload under a known id for the same command", "neuron/commands.py",
        "        if entry.digest != digest_of(kind, data):\n",
        "        if False:\n",
        scenarios.listed_again,
    ),
    Mutant(
        "forgets a command whose acknowledge got no answer", "neuron/commands.py",
        "            self._backlog[key] = entry\n            try:\n",
        "            try:\n",
        scenarios.replies_lost,
    ),
    Mutant(
        "tells two outcomes", "neuron/commands.py",
        "                self._neuron.complete(entry.command_id, entry.result)\n",
        "                entry.result[\"response\"][\"toldAt\"] = time.time()\n"
        "                self._neuron.complete(entry.command_id, entry.result)\n",
        scenarios.replies_lost,
    ),
    Mutant(
        "leaves durability to the operating system", "neuron/journal.py",
        '        connection.execute("PRAGMA synchronous = FULL")\n',
        '        connection.execute("PRAGMA synchronous = OFF")\n',
        scenarios.power_cut,
    ),
    Mutant(
        "acknowledges with a full disk", "neuron/journal.py",
        "        return self._run(work)\n\n    def refuse_reused_id",
        "        try:\n            return self._run(work)\n        except JournalUnavailable:\n"
        "            return Entry(command_id, digest, command_type, data, priority, timeout_at, 'received', 0, None, "
        "None, 0, 0.0, now), True\n\n    def refuse_reused_id",
        scenarios.disk_full,
    ),
    Mutant(
        "delivers the newest result first", "neuron/journal.py",
        "IIF(deliveries >= ?, next_delivery, sequence) LIMIT",
        "IIF(deliveries >= ?, next_delivery, sequence) DESC LIMIT",
        scenarios.served_late,
    ),
    Mutant(
        "takes a token where it is redirected to", "neuron/transport.py",
        "                allow_redirects=False,\n",
        "                allow_redirects=True,\n",
        scenarios.redirected,
    ),
    Mutant(
        "bounds each read and not the call", "neuron/transport.py",
        "    left: float = _call.deadline - time.monotonic()\n",
        "    left = 0.5\n",
        scenarios.dripped,
    ),
    Mutant(
        "shares its state directory", "neuron/journal.py",
        "                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "                pass\n",
        scenarios.started_twice,
    ),
]
ROUNDS = 3
SCENARIOS = list(dict.fromkeys(mutant.caught_by for mutant in MUTANTS))


def copy_of_the_neuron(directory: Path) -> Path:
    source = directory / "source"
    shutil.copytree(ROOT / "neuron", source / "neuron", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "neuron_client.py", source)
    return source


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_the_neuron_as_it_is_passes(scenario: Scenario, tmp_path: Path) -> None:
    assert scenario(copy_of_the_neuron(tmp_path), tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug)
def test_a_build_with_a_known_bug_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    source = copy_of_the_neuron(tmp_path)
    file = source / mutant.file
    text = file.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} has changed: this mutant must be brought up to date"
    file.write_text(text.replace(mutant.old, mutant.new))

    # Where a kill lands, and when an answer comes, differs from run to run: what one misses, the next may meet.
    for number in range(ROUNDS):
        directory = tmp_path / f"round-{number}"
        directory.mkdir()
        if found := mutant.caught_by(source, directory):
            print(f"{mutant.bug}: {found}")
            return
    pytest.fail(f"{ROUNDS} runs of {mutant.caught_by.__name__} did not see it")
