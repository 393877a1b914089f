"""What must not be forgotten: commands and their outcomes, the day's totals, remote settings. SQLite, one writer.

A command goes `received -> acknowledged -> running -> finished -> reported`; each step is durable (WAL, fsync at
commit) before the next begins. `aside` holds what the federation will never take.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from neuron.errors import JournalError, JournalLocked, JournalUnavailable
from neuron.logs import NeuronLogger
from neuron.telemetry import iso_utc

T = TypeVar("T")

FILE = "journal.db"
KEPT_SECONDS = 30 * 86_400.0  # how long a reported id is remembered
KEPT_ROWS = 200_000
KEPT_RESULTS = 1_000  # whole results of reported commands; of older ones the outcome
KEPT_DAYS = 40
MAX_UNDELIVERED = 1_000

# Index n brings a journal from version n to n + 1.
MIGRATIONS = [
    """
    CREATE TABLE commands (
        command_id TEXT NOT NULL,
        digest TEXT NOT NULL,
        type TEXT NOT NULL,
        data TEXT NOT NULL,
        priority INTEGER NOT NULL,
        timeout_at REAL,
        state TEXT NOT NULL,
        runs INTEGER NOT NULL DEFAULT 0,
        outcome TEXT,
        result TEXT,
        sequence INTEGER,
        deliveries INTEGER NOT NULL DEFAULT 0,
        next_delivery REAL NOT NULL DEFAULT 0,
        received_at REAL NOT NULL,
        changed_at REAL NOT NULL,
        PRIMARY KEY (command_id, digest)
    );
    CREATE INDEX commands_by_state ON commands (state, sequence);
    CREATE INDEX commands_by_sequence ON commands (sequence);
    CREATE INDEX commands_by_change ON commands (changed_at);
    CREATE TABLE days (
        day TEXT PRIMARY KEY, totals TEXT NOT NULL, report TEXT, closed INTEGER NOT NULL DEFAULT 0
    );
    CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL);
    """,
]

_left_to_parents: list[sqlite3.Connection | None] = []
_locked_here: set[str] = set()
_locked_here_guard = threading.Lock()


@dataclass(frozen=True)
class Entry:
    """A command as the journal knows it. `result` is the body of its completion, once finished."""

    command_id: str
    digest: str
    type: str
    data: Any
    priority: int
    timeout_at: float | None
    state: str
    runs: int
    outcome: str | None
    result: dict[str, Any] | None
    deliveries: int
    next_delivery: float
    received_at: float


_COLUMNS = (
    "command_id, digest, type, data, priority, timeout_at, state, runs, outcome, result, deliveries, "
    "next_delivery, received_at"
)


_NONE = type(None)
_TYPES: tuple[tuple[type, ...], ...] = (
    (str,), (str,), (str,), (str,), (int,), (float, _NONE), (str,), (int,), (str, _NONE), (str, _NONE), (int,),
    (float,), (float,),
)
LATEST = 1e11  # epoch seconds that a calendar still knows
STATES = ("received", "acknowledged", "running", "finished", "reported", "aside")


class _Damaged(sqlite3.DatabaseError):
    """A value that nobody here has written: the file was changed by something else."""


def _entry(row: tuple[Any, ...]) -> Entry:
    values = list(row)
    if any(not isinstance(value, types) for value, types in zip(values, _TYPES, strict=True)):
        raise _Damaged(f"malformed command {values[0]!r:.50}")
    values[3] = _parsed(values[3])
    values[9] = _parsed(values[9] or "null")
    entry = Entry(*values)
    if entry.state == "finished" and not isinstance(entry.result, dict):
        raise _Damaged(f"malformed result of command {entry.command_id}")
    if entry.outcome is None and entry.state != "aside" and entry.digest != digest_of(entry.type, entry.data):
        raise _Damaged(f"malformed data of command {entry.command_id}")
    return entry


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise _Damaged(f"malformed JSON: {error}") from None


def digest_of(command_type: str, data: Any) -> str:
    """What tells two commands of the same id apart."""
    return hashlib.sha256(json.dumps([command_type, data], sort_keys=True).encode()).hexdigest()[:32]


class Journal:
    """The journal of one state directory. All methods may be called from any thread.

    Every method that touches the disk raises JournalUnavailable when it cannot; the next call tries anew, so the
    journal recovers by itself when the disk does. `failure` says what is wrong at present, or is None.
    """

    def __init__(self, state_dir: str, logger: NeuronLogger, now: Callable[[], float] = time.time) -> None:
        """`now`: epoch seconds to remember by; the federation's, so that a wrong clock here forgets nothing early."""
        self.directory = Path(state_dir)
        self.path = self.directory / FILE
        self.failure: str | None = None
        self.set_aside_files: list[str] = []
        self._logger = logger
        self._now = now
        self._guard = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._lock_file: int | None = None
        self._durable = True
        self._closed = False

    def open(self) -> None:
        """Take the state directory. Raises JournalLocked if another neuron has it, JournalError if it is not ours
        to use; a disk that is full or read-only for now is remembered in `failure` and tried again later."""
        self._closed = False
        with contextlib.suppress(JournalUnavailable):
            self._run(lambda _: None)

    def close(self) -> None:
        with self._guard:
            # A task that outlives the stop must not take the directory again.
            self._closed = True
            self._disconnect()
            if self._lock_file is not None:
                os.close(self._lock_file)
                self._lock_file = None
                with _locked_here_guard:
                    _locked_here.discard(str(self.directory.resolve()))

    def after_fork_in_child(self) -> None:
        """Leave the parent's connection and lock to the parent; `open` takes the directory anew."""
        # Closing it here would fold the parent's journal under its feet, so it is kept open and unused.
        _left_to_parents.append(self._connection)
        self._connection = None
        self._guard = threading.RLock()
        if self._lock_file is not None:
            self._lock_file = None
            _locked_here.discard(str(self.directory.resolve()))

    # -- the connection ------------------------------------------------------------------------------------------

    def _run(self, work: Callable[[sqlite3.Connection], T], *, durable: bool = True) -> T:
        """Do `work` in one transaction. Not durable: it survives the process, but perhaps not a power cut."""
        with self._guard:
            if self._closed:
                raise JournalUnavailable(f"{self.path} is closed")
            try:
                for attempt in (1, 2):
                    try:
                        return self._transaction(work, durable)
                    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                        # SQLite quotes what it stumbled over, and Python then over the quotation.
                        self._disconnect()
                        if not _is_damage(error) or attempt == 2:
                            raise
                        self._set_damaged_aside(str(error))
            except JournalLocked:
                raise
            except (sqlite3.Error, UnicodeDecodeError, OSError) as error:
                self._disconnect()
                if self.failure is None:
                    self._logger.error(
                        "the journal cannot be written (%s); no command is acknowledged until it can", error,
                        extra={"path": str(self.path)},
                    )
                self.failure = str(error)
                raise JournalUnavailable(f"{self.path}: {error}") from None
        raise AssertionError("unreachable")

    def _transaction(self, work: Callable[[sqlite3.Connection], T], durable: bool) -> T:
        connection = self._connection or self._connect()
        if durable != self._durable:
            connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._durable = durable
        connection.execute("BEGIN IMMEDIATE")
        try:
            result = work(connection)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
            raise
        if self.failure is not None:
            self._logger.warning("the journal can be written again", extra={"path": str(self.path)})
            self.failure = None
        return result

    def _connect(self) -> sqlite3.Connection:
        self._prepare_directory()
        fresh = self.path.with_name(f"{FILE}.fresh")
        if fresh.exists() and not self.path.exists():
            # The former process died between the two halves of `_set_damaged_aside`.
            self._move_aside(self.path.name + ".damaged-unnamed")
            fresh.replace(self.path)
        self._connection, self._durable = _database(self.path), True
        return self._connection

    def _prepare_directory(self) -> None:
        if self._lock_file is not None:
            return
        try:
            self.directory.mkdir(mode=0o700, parents=True)
        except FileExistsError:
            if not self.directory.is_dir():
                raise JournalError(f"state_dir {self.directory} is a file; name a directory") from None
            self._tighten_directory()
        except PermissionError as error:
            raise JournalError(f"state_dir {self.directory}: {error.strerror}; give this user the directory") from None
        key = str(self.directory.resolve())
        with _locked_here_guard:
            if key in _locked_here:
                raise JournalLocked(f"state_dir {self.directory} is used by another neuron of this process")
            try:
                descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except PermissionError as error:
                raise JournalError(
                    f"state_dir {self.directory}: {error.strerror}; give this user the directory"
                ) from None
            try:
                # A record lock, not flock: a child that the host forks must not hold it past our end.
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if isinstance(error, (BlockingIOError, PermissionError)):
                    raise JournalLocked(
                        f"state_dir {self.directory} is used by another process; give each neuron its own"
                    ) from None
                raise
            self._lock_file = descriptor
            _locked_here.add(key)

    def _tighten_directory(self) -> None:
        status = self.directory.stat()
        if not status.st_mode & 0o077:
            return
        # A directory that others share for other things (/tmp, a mount point) is not ours to close.
        if status.st_uid == os.getuid() and all(_is_ours(entry.name) for entry in self.directory.iterdir()):
            self.directory.chmod(0o700)
        else:
            self._logger.warning(
                "state_dir %s is open to other users (mode %o); its files are not, but a directory of its own "
                "with mode 0700 is safer", self.directory, status.st_mode & 0o777,
            )

    def _disconnect(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _set_damaged_aside(self, reason: str) -> None:
        """Keep the damaged files under a dated name and start anew with what can still be read of them."""
        fresh = self.path.with_name(f"{FILE}.fresh")
        for path in self.directory.glob(f"{fresh.name}*"):
            path.unlink()
        # The new one is complete before the old one goes, so that a crash or a full disk in between costs nothing.
        connection = _database(fresh)
        saved = 0
        try:
            connection.execute("BEGIN IMMEDIATE")
            for table, columns, row in _salvage(self.path):
                marks = ",".join("?" * len(row))
                saved += connection.execute(f"INSERT OR IGNORE INTO {table} ({columns}) VALUES ({marks})", row).rowcount
            connection.execute("COMMIT")
            # What close() fails to fold in would stay behind in a file of the other name.
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            connection.close()
        name = f"{FILE}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
        aside, number = name, 1
        while (self.directory / aside).exists():
            number += 1
            aside = f"{name}-{number}"
        self._move_aside(aside)
        fresh.replace(self.path)
        self.set_aside_files.append(aside)
        self._logger.error(
            "the journal was damaged (%s); kept as %s, going on with a new one and %d rows that could be read",
            reason, aside, saved,
        )

    def _move_aside(self, name: str) -> None:
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                self.path.with_name(FILE + suffix).replace(self.path.with_name(name + suffix))

    # -- commands ------------------------------------------------------------------------------------------------

    def receive(
        self, command_id: str, command_type: str, data: Any, *, priority: int, timeout_at: float | None
    ) -> tuple[Entry, bool]:
        """Write a command down before it is acknowledged. Returns its entry and whether it is new.

        An id that was used with another payload is answered by that entry; compare its digest.
        """
        digest = digest_of(command_type, data)
        now = self._now()

        def work(connection: sqlite3.Connection) -> tuple[Entry, bool]:
            known = [
                _entry(row)
                for row in connection.execute(f"SELECT {_COLUMNS} FROM commands WHERE command_id = ?", (command_id,))
            ]
            for entry in sorted(known, key=lambda entry: entry.digest != digest):
                return entry, False
            connection.execute(
                "INSERT INTO commands (command_id, digest, type, data, priority, timeout_at, state, received_at, "
                "changed_at) VALUES (?, ?, ?, ?, ?, ?, 'received', ?, ?)",
                (command_id, digest, command_type, json.dumps(data), priority, timeout_at, now, now),
            )
            return Entry(
                command_id, digest, command_type, data, priority, timeout_at, "received", 0, None, None, 0, 0.0, now
            ), True

        return self._run(work)

    def refuse_reused_id(self, command_id: str, command_type: str, data: Any, result: dict[str, Any]) -> None:
        """A second payload under an id that is over: written down as finished, rejected, to be delivered once."""
        now = self._now()
        self._run(
            lambda connection: connection.execute(
                "INSERT OR IGNORE INTO commands (command_id, digest, type, data, priority, state, outcome, result, "
                "sequence, received_at, changed_at) "
                "VALUES (?, ?, ?, 'null', 5, 'finished', 'rejected', ?, "
                "(SELECT COALESCE(MAX(sequence), 0) + 1 FROM commands), ?, ?)",
                (command_id, digest_of(command_type, data), command_type, json.dumps(result), now, now),
            )
        )

    def advance(self, entry: Entry, state: str) -> None:
        """The command is now `acknowledged` or `running`."""
        self._run(
            lambda connection: connection.execute(
                "UPDATE commands SET state = ?, runs = runs + ?, changed_at = ? WHERE command_id = ? AND digest = ?",
                (state, state == "running", self._now(), entry.command_id, entry.digest),
            )
        )

    def finish(self, entry: Entry, outcome: str, result: dict[str, Any]) -> bool:
        """Store the one outcome. False: it had one already, which stays."""
        return self._run(
            lambda connection: connection.execute(
                "UPDATE commands SET state = 'finished', outcome = ?, result = ?, changed_at = ?, next_delivery = 0, "
                "sequence = (SELECT COALESCE(MAX(sequence), 0) + 1 FROM commands) "
                "WHERE command_id = ? AND digest = ? AND outcome IS NULL",
                (outcome, json.dumps(result), self._now(), entry.command_id, entry.digest),
            ).rowcount == 1
        )

    def undelivered(self, in_order: int, limit: int = 50) -> list[Entry]:
        """Finished commands whose result the federation has not taken, in the order they finished.

        Those that failed `in_order` deliveries or more come last, the one due first before the others.
        """
        return self._entries(
            "state = 'finished' ORDER BY deliveries >= ?, IIF(deliveries >= ?, next_delivery, sequence) LIMIT ?",
            in_order, in_order, limit,
        )

    def unfinished(self) -> list[Entry]:
        """Commands that a former process left, in the order they came."""
        return self._entries("state IN ('received', 'acknowledged', 'running') ORDER BY received_at")

    def find(self, command_id: str) -> Entry | None:
        found = self._entries("command_id = ? ORDER BY received_at", command_id)
        return found[0] if found else None

    def _entries(self, condition: str, *values: Any) -> list[Entry]:
        def work(connection: sqlite3.Connection) -> list[Entry]:
            rows = connection.execute(f"SELECT {_COLUMNS} FROM commands WHERE {condition}", values)
            return [_entry(row) for row in rows]

        return self._run(work)

    def delivered(self, entry: Entry) -> None:
        self._set_state(entry, "reported")

    def set_aside(self, entry: Entry) -> None:
        """The federation will never take this command's result; it is kept and counted."""
        self._set_state(entry, "aside")

    def deliver_again(self, entry: Entry) -> None:
        """The federation lists a reported command as pending: the stored result is due once more."""
        self._set_state(entry, "finished")

    def _set_state(self, entry: Entry, state: str) -> None:
        self._run(
            lambda connection: connection.execute(
                "UPDATE commands SET state = ?, changed_at = ?, next_delivery = 0 "
                "WHERE command_id = ? AND digest = ?",
                (state, self._now(), entry.command_id, entry.digest),
            )
        )

    def delivery_failed(self, entry: Entry, wait: float) -> None:
        """The federation answered, but did not take it: not before `wait` seconds from now."""
        self._run(
            lambda connection: connection.execute(
                "UPDATE commands SET deliveries = deliveries + 1, next_delivery = ? "
                "WHERE command_id = ? AND digest = ?",
                (time.time() + wait, entry.command_id, entry.digest),
            )
        )

    def counts(self) -> dict[str, int]:
        """`{state: number of commands}`."""
        return self._run(
            lambda connection: dict(connection.execute("SELECT state, COUNT(*) FROM commands GROUP BY state"))
        )

    def recent(self, limit: int = 20) -> list[dict[str, Any]]:
        """The latest commands for `/status`, without their data."""
        return self._run(
            lambda connection: [
                {"commandId": row[0], "type": row[1], "state": row[2], "outcome": row[3], "changedAt": iso_utc(row[4])}
                for row in connection.execute(
                    "SELECT command_id, type, state, outcome, changed_at FROM commands "
                    "ORDER BY changed_at DESC LIMIT ?", (limit,),
                )
            ]
        )

    # -- days and settings ---------------------------------------------------------------------------------------

    def save_day(self, day: str, totals: dict[str, Any], *, durable: bool = False) -> None:
        """The totals of a day so far."""
        self._run(
            lambda connection: connection.execute(
                "INSERT INTO days (day, totals) VALUES (?, ?) ON CONFLICT (day) DO UPDATE SET totals = excluded.totals",
                (day, json.dumps(totals)),
            ),
            durable=durable,
        )

    def day_totals(self, day: str) -> dict[str, Any] | None:
        rows = self._run(
            lambda connection: [
                _parsed(totals) for totals, in connection.execute("SELECT totals FROM days WHERE day = ?", (day,))
            ]
        )
        return rows[0] if rows else None

    def open_days(self, before: str) -> list[tuple[str, dict[str, Any]]]:
        """`(day, totals)` of days before `before` that no process has closed yet, oldest first."""
        return self._run(
            lambda connection: [
                (day, _parsed(totals))
                for day, totals in connection.execute(
                    "SELECT day, totals FROM days WHERE day < ? AND NOT closed ORDER BY day", (before,)
                )
            ]
        )

    def queue_report(self, day: str, totals: dict[str, Any], report: dict[str, Any]) -> None:
        """A closed day and its last report, which waits here until the federation has taken it. The newest wins."""
        self._run(
            lambda connection: connection.execute(
                "INSERT INTO days (day, totals, report, closed) VALUES (?, ?, ?, 1) ON CONFLICT (day) DO UPDATE "
                "SET totals = excluded.totals, report = excluded.report, closed = 1",
                (day, json.dumps(totals), json.dumps(report)),
            )
        )

    def queued_reports(self) -> list[tuple[str, dict[str, Any]]]:
        """`(day, report)` of closed days, oldest first."""
        return self._run(
            lambda connection: [
                (day, _parsed(report))
                for day, report in connection.execute(
                    "SELECT day, report FROM days WHERE report IS NOT NULL ORDER BY day"
                )
            ]
        )

    def report_settled(self, day: str) -> None:
        self._run(lambda connection: connection.execute("UPDATE days SET report = NULL WHERE day = ?", (day,)))

    def setting(self, key: str) -> Any:
        """A stored JSON value, or None."""
        rows = self._run(
            lambda connection: [
                _parsed(value) for value, in connection.execute("SELECT value FROM settings WHERE key = ?", (key,))
            ]
        )
        return rows[0] if rows else None

    def set_setting(self, key: str, value: Any) -> None:
        self._run(
            lambda connection: connection.execute(
                "INSERT INTO settings VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                (key, json.dumps(value)),
            )
        )

    # -- bounds --------------------------------------------------------------------------------------------------

    def prune(self) -> int:
        """Forget what is past its keeping. Returns the number of rows removed."""
        now = self._now()

        def work(connection: sqlite3.Connection) -> int:
            over = ("reported", "aside")
            removed = connection.execute(
                "DELETE FROM commands WHERE state IN (?, ?) AND changed_at < ?", (*over, now - KEPT_SECONDS)
            ).rowcount
            removed += connection.execute(
                "DELETE FROM commands WHERE rowid IN (SELECT rowid FROM commands WHERE state IN (?, ?) "
                "ORDER BY changed_at DESC LIMIT -1 OFFSET ?)", (*over, KEPT_ROWS),
            ).rowcount
            for rowid, outcome in connection.execute(
                "SELECT rowid, outcome FROM commands WHERE state IN (?, ?) AND data != 'null' "
                "ORDER BY changed_at DESC LIMIT -1 OFFSET ?", (*over, KEPT_RESULTS),
            ).fetchall():
                brief = {"success": outcome == "succeeded", "response": {"outcome": outcome, "truncated": True}}
                connection.execute(
                    "UPDATE commands SET data = 'null', result = ? WHERE rowid = ?", (json.dumps(brief), rowid)
                )
            removed += connection.execute(
                "DELETE FROM days WHERE day NOT IN (SELECT day FROM days ORDER BY day DESC LIMIT ?)", (KEPT_DAYS,)
            ).rowcount
            return removed

        return self._run(work)

    def compact(self) -> dict[str, int]:
        """Prune, delete files set aside, give the space back. Returns `{rows, files, bytes}` freed."""
        before = self.size()
        rows = self.prune()
        files = 0
        with self._guard:
            for path in self.directory.glob(f"{FILE}.damaged-*"):
                path.unlink(missing_ok=True)
                files += 1
            if self._connection is not None:
                try:
                    self._connection.execute("VACUUM")
                    self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                except sqlite3.Error as error:
                    raise JournalUnavailable(f"{self.path}: {error}") from None
        return {"rows": rows, "files": files, "bytes": max(0, before - self.size())}

    def size(self) -> int:
        """Bytes of the journal's files, those set aside included."""
        total = 0
        for path in self.directory.glob(f"{FILE}*"):
            with contextlib.suppress(OSError):
                total += path.stat().st_size
        return total


def _database(path: Path) -> sqlite3.Connection:
    """Open or make the database, of the present version and undamaged. Raises sqlite3.Error or OSError."""
    # SQLite gives its -wal and -shm files the mode of the database; so it must never be created by SQLite.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    path.chmod(0o600)
    connection = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA journal_size_limit = 1048576")
        # Not quick_check: an id that a damaged index hides would run a second time.
        damage = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if damage != "ok":
            raise _Damaged(f"malformed: {damage}")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if not 0 <= version <= len(MIGRATIONS):
            raise _Damaged(f"version {version} is unknown to this neuron, which writes {len(MIGRATIONS)}")
        for number in range(version, len(MIGRATIONS)):
            connection.executescript(
                f"BEGIN IMMEDIATE; {MIGRATIONS[number]} PRAGMA user_version = {number + 1}; COMMIT;"
            )
        strange = connection.execute(
            f"SELECT command_id FROM commands WHERE state NOT IN {STATES} OR NOT changed_at BETWEEN 0 AND {LATEST}"
        ).fetchone()
        if strange:
            raise _Damaged(f"malformed command {strange[0]!r:.50}")
    except BaseException:
        connection.close()
        raise
    return connection


# What the surroundings do to SQLite: a full disk, an unreadable sector. Of all else the file itself is the cause.
_SURROUNDINGS = {
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PERM, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_INTERRUPT,
}


def _is_damage(error: sqlite3.DatabaseError | UnicodeDecodeError) -> bool:
    if isinstance(error, sqlite3.ProgrammingError):
        return False
    # Without a code it is Python's own: a text that is no UTF-8, or `_Damaged`.
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    if code & 0xFF == sqlite3.SQLITE_READONLY:
        # Its variants tell of the surroundings; without one it is the file's own header that says so.
        return bool(code == sqlite3.SQLITE_READONLY)
    return code & 0xFF not in _SURROUNDINGS


def _is_ours(name: str) -> bool:
    return name.startswith((FILE, "identity.json", ".identity.json", "lock", "local-federation"))


def _salvage(path: Path) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """`(table, columns, row)` of what in a damaged journal can still be read and makes sense."""
    # For reading alone, or SQLite would fold the damaged log into the damaged file.
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    try:
        for table, columns, check in (
            ("commands", f"{_COLUMNS}, sequence, changed_at", _check_command),
            ("days", "day, totals, report, closed", lambda row: (_parsed(row[1]), _parsed(row[2] or "null"))),
            ("settings", "key, value", lambda row: _parsed(row[1])),
        ):
            query = f"SELECT {columns} FROM {table} NOT INDEXED WHERE rowid = ?"
            for rowid in _rowids(connection, table):
                with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):
                    row = connection.execute(query, (rowid,)).fetchone()
                    if row is not None:
                        check(row)
                        yield table, columns, row
    finally:
        connection.close()


def _check_command(row: tuple[Any, ...]) -> None:
    if _entry(row[:-2]).state not in STATES or not isinstance(row[-1], float) or not 0 <= row[-1] <= LATEST:
        raise _Damaged(f"malformed command {row[0]!r:.50}")


def _rowids(connection: sqlite3.Connection, table: str) -> list[int]:
    """From both ends up to what is torn, and whatever may lie between: one page costs its own rows alone."""
    found: set[int] = set()
    for direction in ("ASC", "DESC"):
        with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):
            query = f"SELECT rowid FROM {table} NOT INDEXED ORDER BY rowid {direction} LIMIT {2 * KEPT_ROWS}"
            found.update(rowid for rowid, in connection.execute(query))
    if found:
        found.update(range(max(min(found), max(found) - KEPT_ROWS), max(found)))
    return sorted(found)
