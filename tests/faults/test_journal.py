"""F4, F7, F22, F40: a journal that is torn, flipped, emptied, newer, older, locked, too big, or cannot be written."""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import resource
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from neuron import journal as journal_module
from neuron.errors import JournalError, JournalUnavailable
from neuron.journal import KEPT_SECONDS, MIGRATIONS, Entry, Journal
from neuron.logs import NeuronLogger
from tests.faults import scenarios
from tests.faults.launcher import Launcher, afflicted
from tests.faults.trials import Trial
from tests.rig.process import ROOT, NeuronProcess, wait_for
from tests.rig.recording import RecordingFederation

LOGGER = NeuronLogger({"neuron_id": "t", "neuron_name": "t", "neuron_type": "t"})
PAYLOAD = {"task": "effect", "params": {}}
VERSION_1 = Path(__file__).with_name("journal-version-1.sql")


def opened(directory: Path) -> Journal:
    journal = Journal(str(directory), LOGGER)
    journal.open()
    return journal


def received(journal: Journal, command_id: str, data: Any = None) -> Entry:
    return journal.receive(command_id, "run_task", data or PAYLOAD, priority=5, timeout_at=None)[0]


def finished(journal: Journal, command_id: str) -> Entry:
    entry = received(journal, command_id)
    journal.advance(entry, "acknowledged")
    journal.advance(entry, "running")
    journal.finish(entry, "succeeded", {"success": True, "response": {"outcome": "succeeded"}})
    return entry


@pytest.fixture(scope="module")
def full_of_everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory whose journal has commands in every state, days and settings."""
    directory = tmp_path_factory.mktemp("journal") / "state"
    journal = opened(directory)
    for number in range(30):
        journal.delivered(finished(journal, f"reported-{number}"))
    for number in range(5):
        finished(journal, f"finished-{number}")
    received(journal, "received-0")
    journal.advance(received(journal, "acknowledged-0"), "acknowledged")
    journal.save_day("2026-01-01", {"day": "2026-01-01", "successful": 3})
    journal.set_setting("config_update", {"log_level": "DEBUG"})
    journal.close()
    return directory


def everything_read(journal: Journal) -> dict[str, str]:
    """What a starting neuron reads of it: `{commandId: state}`. Raises whatever would stop that neuron."""
    entries = [*journal.unfinished(), *journal.undelivered(10, 1000)]
    journal.counts(), journal.recent(), journal.open_days("2999-01-01"), journal.queued_reports()
    journal.setting("config_update"), journal.day_totals("2026-01-01")
    return {entry.command_id: entry.state for entry in entries}


def damaged(source: Path, target: Path, change: Callable[[bytearray], bytes | bytearray]) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    file = target / "journal.db"
    file.write_bytes(change(bytearray(file.read_bytes())))
    return target


def starts_and_works(directory: Path) -> Journal:
    """The damaged journal, opened, read and written as by a neuron. The caller closes it."""
    journal = opened(directory)
    everything_read(journal)
    journal.delivered(finished(journal, "fresh"))
    assert journal.failure is None
    assert journal.receive("fresh", "run_task", PAYLOAD, priority=5, timeout_at=None)[1] is False
    return journal


@pytest.fixture
def quick_disk(tmp_path: Path) -> Iterator[Path]:
    """Where a sync costs nothing, if there is such a place."""
    memory = Path("/dev/shm")
    directory = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else tmp_path))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Each of thousands of damaged journals says so; once is enough for a test to look at."""
    logging.getLogger("neuron").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("neuron").setLevel(logging.INFO)


# -- who may read it, and who may have it ------------------------------------------------------------------------------


def test_nobody_else_may_read_what_the_neuron_keeps(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with Launcher(tmp_path) as launcher, Trial(launcher, tmp_path, registered=False) as trial:
            trial.start()
            trial.until(lambda: trial.federation.of("heartbeat"))
            modes = {
                path.name: stat.S_IMODE(path.stat().st_mode) for path in [trial.state, *trial.state.iterdir()]
            }
    finally:
        os.umask(before)

    assert modes.pop(trial.state.name) == 0o700
    assert set(modes) >= {"journal.db", "journal.db-wal", "identity.json", "lock"}
    assert set(modes.values()) == {0o600}


def test_a_second_process_on_the_directory_ends_having_sent_nothing(tmp_path: Path) -> None:
    assert scenarios.started_twice(ROOT, tmp_path) == []


def test_the_whole_program_is_refused_within_a_second(
    oracle: RecordingFederation, run_neuron: Callable[..., NeuronProcess], tmp_path: Path
) -> None:
    first = run_neuron(federation_url=oracle.url)
    first.wait_logged("registered as")
    began = time.process_time(), time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    second = subprocess.run(
        [sys.executable, str(ROOT / "neuron_client.py"), "--set", f"state_dir={tmp_path / 'state'}", "--set", "port=0"],
        capture_output=True, text=True, cwd=tmp_path, timeout=20,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)

    assert second.returncode == os.EX_TEMPFAIL
    assert "used by another process" in second.stderr
    # Of processor time, which a busy machine does not stretch.
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{seconds:.2f} s of processor, {time.monotonic() - began[1]:.2f} s by the clock")
    assert seconds < 1


# -- damage ------------------------------------------------------------------------------------------------------------


def cut_at(offset: int, content: bytearray) -> bytearray:
    return content[:offset]


@pytest.mark.slow
def test_a_journal_cut_anywhere_is_set_aside_and_the_rest_goes_on(full_of_everything: Path, quick_disk: Path) -> None:
    size = (full_of_everything / "journal.db").stat().st_size
    offsets = sorted({*range(0, size, 131), *range(0, 120, 5), *range(4096 - 3, size, 4096)})
    for offset in offsets:
        directory = damaged(full_of_everything, quick_disk / "state", functools.partial(cut_at, offset))
        journal = starts_and_works(directory)
        if 0 < offset < size:
            assert journal.set_aside_files, f"cut at {offset} and nothing was said"
        for name in journal.set_aside_files:
            assert (directory / name).exists()
            assert name.startswith("journal.db.damaged-2")
        journal.close()
    print(f"{len(offsets)} cuts, all started")


@pytest.mark.slow
def test_a_flipped_byte_anywhere_stops_nothing_and_is_never_run_as_a_command(
    full_of_everything: Path, quick_disk: Path
) -> None:
    chance = random.Random(4)
    size = (full_of_everything / "journal.db").stat().st_size
    offsets = [*range(100), *(chance.randrange(100, size) for _ in range(400))]
    aside = 0
    for offset in offsets:
        flip = chance.choice([1, 2, 4, 8, 16, 32, 64, 128, 255])

        def change(content: bytearray, at: int = offset, by: int = flip) -> bytearray:
            content[at] ^= by
            return content

        journal = starts_and_works(damaged(full_of_everything, quick_disk / "state", change))
        aside += len(journal.set_aside_files)
        for entry in journal.unfinished():
            assert entry.data == PAYLOAD, f"byte {offset} ^ {flip} changed what would run"
        journal.close()
    print(f"{len(offsets)} flips, all started, {aside} set aside")
    assert aside > 50


@pytest.mark.parametrize(
    "change",
    [
        lambda _: b"",
        lambda content: b"\0" * len(content),
        lambda content: b"\0" * 4096 + content[4096:],
        lambda _: b"<html>",
        lambda content: content[:60] + (99).to_bytes(4, "big") + content[64:],
        lambda content: content[:60] + (0).to_bytes(4, "big") + content[64:],
        lambda content: content[:60] + b"\xff\xff\xff\xff" + content[64:],
    ],
    ids=["empty", "zeros", "first page zeros", "another file", "newer version", "version 0", "version -1"],
)
def test_what_is_no_journal_of_ours_is_kept_and_replaced(
    change: Callable[[bytearray], bytes], full_of_everything: Path, tmp_path: Path
) -> None:
    starts_and_works(damaged(full_of_everything, tmp_path / "state", change)).close()


def test_a_row_that_cannot_be_read_costs_that_row_alone_and_is_said_loudly(
    full_of_everything: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("neuron").setLevel(logging.INFO)
    directory = tmp_path / "state"
    shutil.copytree(full_of_everything, directory)
    with sqlite3.connect(directory / "journal.db") as connection:
        connection.execute("UPDATE commands SET result = 'not json' WHERE command_id = 'finished-2'")
    connection.close()

    journal = opened(directory)
    states = everything_read(journal)

    expected = {"received-0", "acknowledged-0", *(f"finished-{number}" for number in (0, 1, 3, 4))}
    assert set(states) == expected
    assert journal.counts()["reported"] == 30
    assert journal.setting("config_update") == {"log_level": "DEBUG"}
    assert journal.day_totals("2026-01-01") == {"day": "2026-01-01", "successful": 3}
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "damaged" in errors[0]
    assert "38 rows" in errors[0]
    assert journal.set_aside_files[0] in errors[0]
    journal.close()


def test_a_torn_page_costs_its_own_rows_and_none_of_those_behind_it(tmp_path: Path) -> None:
    journal = opened(tmp_path / "state")
    for number in range(400):
        journal.delivered(finished(journal, f"command-{number:03}"))
    journal.close()
    file = tmp_path / "state" / "journal.db"
    content = bytearray(file.read_bytes())
    # A page of the table itself: the only place where a command's data stand beside its id.
    page = content.index(b"command-200") // 4096
    while b'"params"' not in content[page * 4096 : (page + 1) * 4096]:
        page = content.index(b"command-200", (page + 1) * 4096) // 4096
    content[page * 4096 : (page + 1) * 4096] = random.Random(0).randbytes(4096)
    file.write_bytes(content)

    journal = opened(tmp_path / "state")
    kept = journal.counts()["reported"]
    print(f"{kept} of 400 rows kept")
    assert journal.set_aside_files
    assert kept >= 380
    journal.close()


def test_a_log_cut_anywhere_loses_no_more_than_the_last_record(tmp_path: Path) -> None:
    """As a power cut leaves it: the write-ahead log ends in the middle of a write."""
    journal = opened(tmp_path / "state")
    for number in range(6):
        received(journal, f"command-{number}")
    log = tmp_path / "state" / "journal.db-wal"
    before_last = log.stat().st_size
    received(journal, "last")
    shutil.copytree(tmp_path / "state", tmp_path / "crashed")
    journal.close()
    whole = (tmp_path / "crashed" / "journal.db-wal").read_bytes()
    for cut in range(before_last, len(whole), 211):
        shutil.rmtree(tmp_path / "state")
        shutil.copytree(tmp_path / "crashed", tmp_path / "state")
        (tmp_path / "state" / "journal.db-wal").write_bytes(whole[:cut])
        again = opened(tmp_path / "state")
        assert {entry.command_id for entry in again.unfinished()} >= {f"command-{number}" for number in range(6)}
        again.close()


def test_a_crash_while_a_damaged_journal_is_replaced_costs_nothing(full_of_everything: Path, tmp_path: Path) -> None:
    directory = damaged(full_of_everything, tmp_path / "state", lambda content: content[:-4096])
    # What a process leaves that died when the damaged file was gone and the salvaged one not yet in its place.
    shutil.copy(full_of_everything / "journal.db", directory / "journal.db.fresh")
    (directory / "journal.db").rename(directory / "journal.db.damaged-20260101T000000Z")

    journal = starts_and_works(directory)

    assert journal.counts()["reported"] == 31
    journal.close()


def test_a_neuron_with_a_damaged_journal_says_so_and_obeys(launcher: Launcher, tmp_path: Path) -> None:
    with Trial(launcher, tmp_path) as trial:
        child = trial.start()
        command = trial.issue_task("effect")
        trial.until(trial.idle)
        child.kill()
        (trial.state / "journal.db").write_bytes(b"\xff" * 10_000)
        (trial.state / "journal.db-wal").unlink()
        child = trial.start()
        child.wait_logged("the journal was damaged")
        second = trial.issue_task("effect")
        trial.until(lambda: trial.ended(second))
        heartbeat = trial.federation.of("heartbeat")[-1].body

        assert trial.ended(command)
        assert any("the journal was damaged" in json.dumps(one.body) for one in trial.federation.of("heartbeat"))
        assert heartbeat["status"] == "active"


# -- versions ----------------------------------------------------------------------------------------------------------


def test_the_journal_of_the_first_version_loads_and_its_commands_end(tmp_path: Path) -> None:
    """Written by version 1, as text: it must load in every version to come."""
    (tmp_path / "state").mkdir(mode=0o700)
    connection = sqlite3.connect(tmp_path / "state" / "journal.db")
    connection.executescript(VERSION_1.read_text())
    connection.close()

    journal = opened(tmp_path / "state")

    assert journal.set_aside_files == []
    once = dict.fromkeys(("received", "acknowledged", "running", "finished", "aside"), 1)
    assert journal.counts() == {**once, "reported": 2}
    assert [entry.command_id for entry in journal.unfinished()] == ["v1-received", "v1-acknowledged", "v1-running"]
    assert [entry.result for entry in journal.undelivered(10)] == [
        {"success": True, "response": {"outcome": "succeeded", "result": {"value": 2}}}
    ]
    assert journal.setting("config_update") == {"heartbeat_interval": 30}
    assert journal.day_totals("2026-11-23") is not None
    journal.close()


def test_an_older_journal_is_brought_up_to_date_in_one_step_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = opened(tmp_path / "state")
    finished(journal, "kept")
    journal.close()

    monkeypatch.setattr(
        journal_module, "MIGRATIONS", [*MIGRATIONS, "CREATE TABLE extra (x TEXT); INSERT INTO extra VALUES ('new');"]
    )
    journal = opened(tmp_path / "state")
    assert [entry.command_id for entry in journal.undelivered(10)] == ["kept"]
    assert journal.set_aside_files == []
    journal.close()
    with sqlite3.connect(tmp_path / "state" / "journal.db") as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS) + 1,)
        assert connection.execute("SELECT x FROM extra").fetchall() == [("new",)]
    connection.close()


def test_the_journal_of_a_newer_version_is_kept_and_its_commands_are_known(
    full_of_everything: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "state"
    shutil.copytree(full_of_everything, directory)
    with sqlite3.connect(directory / "journal.db") as connection:
        connection.execute("ALTER TABLE commands ADD COLUMN later TEXT")
        connection.execute("PRAGMA user_version = 7")
    connection.close()

    journal = starts_and_works(directory)

    assert journal.set_aside_files
    assert journal.counts()["reported"] == 31
    journal.close()


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_an_id_is_remembered_for_thirty_days_and_then_forgotten(tmp_path: Path) -> None:
    journal = opened(tmp_path / "state")
    for command_id in ("young", "old", "undelivered"):
        entry = finished(journal, command_id)
        if command_id != "undelivered":
            journal.delivered(entry)
    with sqlite3.connect(tmp_path / "state" / "journal.db") as connection:
        for command_id, age in (("young", KEPT_SECONDS - 60), ("old", KEPT_SECONDS + 60), ("undelivered", 1e8)):
            connection.execute(
                "UPDATE commands SET changed_at = ? WHERE command_id = ?", (time.time() - age, command_id)
            )
    connection.close()

    assert journal.prune() == 1
    known = {command_id: not journal.receive(command_id, "x", None, priority=5, timeout_at=None)[1]
             for command_id in ("young", "old", "undelivered")}
    assert known == {"young": True, "old": False, "undelivered": True}
    journal.close()


def test_the_journal_stays_bounded_and_keeps_what_is_not_delivered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "KEPT_ROWS", 50)
    monkeypatch.setattr(journal_module, "KEPT_RESULTS", 10)
    journal = opened(tmp_path / "state")
    for number in range(120):
        entry = received(journal, f"command-{number}", {"task": "effect", "padding": "x" * 2000})
        response = {"outcome": "succeeded", "result": "y" * 2000}
        journal.finish(entry, "succeeded", {"success": True, "response": response})
        if number % 10:
            journal.delivered(entry)
    for day in range(60):
        journal.save_day(f"2026-{1 + day // 28:02}-{1 + day % 28:02}", {"n": day})

    journal.prune()

    assert journal.counts() == {"finished": 12, "reported": 50}
    waiting = journal.undelivered(10, 100)
    assert [len(entry.result["response"]["result"]) for entry in waiting if entry.result] == [2000] * 12
    with sqlite3.connect(tmp_path / "state" / "journal.db") as connection:
        assert connection.execute("SELECT COUNT(*) FROM commands WHERE data != 'null'").fetchone() == (22,)
        assert connection.execute("SELECT COUNT(*) FROM days").fetchone() == (journal_module.KEPT_DAYS,)
    connection.close()
    freed = journal.compact()
    assert freed["bytes"] > 100_000
    assert journal.size() < 250_000
    journal.close()


# -- disks -------------------------------------------------------------------------------------------------------------


def test_nothing_is_acknowledged_on_a_full_disk_and_all_is_well_when_it_is_not(tmp_path: Path) -> None:
    assert scenarios.disk_full(ROOT, tmp_path) == []


FAULTY_DISKS = {
    "EIO at the sync": ("fdatasync:error=EIO",),
    "EDQUOT at the write": ("pwrite64:error=EDQUOT",),
    "EROFS at everything": ("pwrite64:error=EROFS", "ftruncate:error=EROFS", "fdatasync:error=EROFS"),
}


@pytest.mark.parametrize("injections", FAULTY_DISKS.values(), ids=FAULTY_DISKS.keys())
def test_a_disk_that_fails_shows_everywhere_and_costs_no_command(
    injections: tuple[str, ...], launcher: Launcher, tmp_path: Path
) -> None:
    with Trial(launcher, tmp_path) as trial:
        child = trial.start(host="127.0.0.1", port=0)
        address = str(child.wait_logged("neuron started")["message"]).rpartition("endpoints ")[2]
        trial.issue_task("effect")
        trial.until(trial.idle)
        with afflicted(child, *injections):
            second = trial.issue_task("effect")
            child.wait_logged("the journal cannot be written")
            beats = len(trial.federation.of("heartbeat"))
            trial.until(lambda: len(trial.federation.of("heartbeat")) > beats + 1, what="heartbeats meanwhile")
            told = trial.federation.of("heartbeat")[-1].body
            health = requests.get(f"{address}/health", timeout=5)
            acknowledged = len(trial.federation.of("acknowledge", second))
        cured = time.monotonic()
        trial.until(trial.idle, what="the command that waited")

        assert acknowledged == 0
        assert "journal cannot be written" in json.dumps(told["performanceMetrics"]["healthReasons"])
        assert told["healthScore"] <= 70
        assert "journal cannot be written" in health.text
        assert time.monotonic() - cured < 3
        wait_for(lambda: requests.get(f"{address}/health", timeout=5).json()["healthScore"] > 70, what="good health")
        assert child.logged("the journal can be written again")
        assert trial.violations() == {}


def test_a_journal_at_its_page_limit_recovers_by_itself(tmp_path: Path) -> None:
    journal = opened(tmp_path / "state")
    received(journal, "before")
    journal._run(lambda connection: connection.execute("PRAGMA max_page_count = 1"))  # SQLite takes the present count
    with pytest.raises(JournalUnavailable, match="full"):
        received(journal, "big", {"padding": "x" * 50_000})
    assert "full" in str(journal.failure)

    received(journal, "after")

    assert not journal.failure
    assert {entry.command_id for entry in journal.unfinished()} == {"before", "after"}
    journal.close()


@pytest.mark.parametrize(
    ("limit", "value"), [(resource.RLIMIT_FSIZE, 4096), (resource.RLIMIT_NOFILE, 3)], ids=["file size", "descriptors"]
)
def test_a_limit_of_the_process_holds_up_commands_and_nothing_else(
    limit: int, value: int, oracle: RecordingFederation, run_neuron: Callable[..., NeuronProcess]
) -> None:
    process = run_neuron(federation_url=oracle.url, host="")
    neuron_id = str(process.wait_logged("registered as")["message"]).rpartition(" ")[2]
    first = oracle.issue(neuron_id, "health_check")
    oracle.wait_until(lambda: oracle.command(first)["status"] == "completed")
    before = resource.prlimit(process.pid, limit)
    resource.prlimit(process.pid, limit, (value, before[1]))
    second = oracle.issue(neuron_id, "health_check")
    beats = len(oracle.of("heartbeat"))
    oracle.wait_until(lambda: len(oracle.of("heartbeat")) > beats + 2, what="heartbeats meanwhile")
    if limit == resource.RLIMIT_FSIZE:
        assert oracle.of("acknowledge", second) == []
    resource.prlimit(process.pid, limit, before)

    oracle.wait_until(lambda: oracle.command(second)["status"] == "completed", what="the command that waited")
    assert oracle.flips() == []
    assert oracle.conflicting_outcomes() == []


def test_a_small_disk_that_is_really_full(tmp_path: Path) -> None:
    """A tmpfs of 128 kB in a user namespace of its own, filled to the last page and emptied again."""
    script = tmp_path / "fill.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.faults.test_journal import opened, received, JournalUnavailable\n"
        "disk = Path(sys.argv[1]); journal = opened(disk / 'state'); received(journal, 'before')\n"
        "ballast = open(disk / 'ballast', 'wb', buffering=0)\n"
        "try:\n"
        "    while True: ballast.write(b'x' * 512)\n"
        "except OSError as error: print('full:', error.strerror)\n"
        "refused = 0\n"
        "for number in range(20):\n"
        "    try: received(journal, f'during-{number}', {'padding': 'x' * 3000})\n"
        "    except JournalUnavailable: refused += 1\n"
        "print('refused', refused > 0, journal.failure is not None)\n"
        "ballast.truncate(0)\n"
        "received(journal, 'after')\n"
        "ids = {entry.command_id for entry in journal.unfinished()}\n"
        "print('kept', {'before', 'after'} <= ids, len(ids) == 22 - refused, journal.set_aside_files)\n"
    )
    disk = tmp_path / "disk"
    disk.mkdir()
    shell = f"mount -t tmpfs -o size=192k none {disk} && exec {sys.executable} {script} {disk}"
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    done = subprocess.run([*alone, "sh", "-c", shell], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["full: No space left on device", "refused True True", "kept True True []"]


def test_a_directory_that_is_not_ours_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(JournalError, match="is a file"):
        opened(tmp_path / "file")


def test_a_closed_journal_takes_nothing_and_leaves_the_directory_to_the_next(tmp_path: Path) -> None:
    """A task that outlives the stop finishes into the void, not into a journal that another process has."""
    journal = opened(tmp_path / "state")
    entry = received(journal, "slow")
    journal.close()
    with pytest.raises(JournalUnavailable, match="closed"):
        journal.finish(entry, "succeeded", {"success": True, "response": {}})
    opened(tmp_path / "state").close()
