"""What the federation remembers, in one SQLite file (or in memory).

Columns carry the names of the wire, so that a row is an answer once its JSON columns are read.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from local_federation.bodies import iso
from local_federation.wire import dumps

Row = dict[str, Any]

ONLINE_FOR = 120.0  # seconds since its last heartbeat that a neuron counts as online
INACTIVE_AFTER = 300.0  # seconds of silence after which its status reads `inactive`
KEPT_HEARTBEATS = 1_000  # per neuron
PENDING_COMMANDS = 100  # most commands in one answer of /commands/pending …
PENDING_BYTES = 1_048_576  # … and about how many bytes of them
DAY = 86_400.0


class Conflict(Exception):
    """The state of a command or neuron forbids what was asked; nothing was changed."""


class Store:
    """The federation's state behind one connection and one lock; every method is one transaction."""

    def __init__(self, path: str = ":memory:", *, clock: Callable[[], float] = time.time) -> None:
        """Opens or makes the database. ``clock`` gives epoch seconds. Raises sqlite3.Error."""
        self.path = path
        self.clock = clock
        self.lock = threading.RLock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.executescript(Path(__file__).with_name("schema.sql").read_text())
            self.secret = self._token_secret()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        with self.lock:
            self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self.lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _token_secret(self) -> str:
        """Tokens outlive the process because what signs them does."""
        with self._transaction() as db:
            fresh = secrets.token_hex(32)
            db.execute("INSERT OR IGNORE INTO setting VALUES ('tokenSecret', ?)", (fresh,))
            row = db.execute("SELECT value FROM setting WHERE name = 'tokenSecret'").fetchone()
            return str(row["value"])

    def now(self) -> str:
        return iso(self.clock())

    def today(self) -> str:
        return self.now()[:10]

    # --- neurons

    def register(self, registration: Mapping[str, Any]) -> bool:
        """Adds a neuron; False, and nothing changed, where its neuronId exists."""
        now = self.now()
        row = (registration["neuronId"], dumps(registration), "active", 1, now, now, self.clock(), "{}")
        with self._transaction() as db:
            added = db.execute("INSERT OR IGNORE INTO neuron VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
            return added.rowcount == 1

    def update_neuron(self, neuron_id: str, changes: Mapping[str, Any]) -> Row | None:
        """Lays ``changes`` over the registration (``isActive`` over the row); None for an unknown id."""
        changes = dict(changes)
        active = changes.pop("isActive", None)
        with self._transaction() as db:
            row = db.execute("SELECT * FROM neuron WHERE neuronId = ?", (neuron_id,)).fetchone()
            if row is None:
                return None
            registration = json.loads(row["registration"]) | changes
            active = row["isActive"] if active is None else int(active)
            db.execute(
                "UPDATE neuron SET registration = ?, isActive = ?, updatedAt = ? WHERE neuronId = ?",
                (dumps(registration), active, self.now(), neuron_id),
            )
        return self.neuron(neuron_id)

    def neuron(self, neuron_id: str) -> Row | None:
        with self.lock:
            row = self._db.execute("SELECT * FROM neuron WHERE neuronId = ?", (neuron_id,)).fetchone()
            return None if row is None else self._neuron_row(row)

    def neurons(self) -> list[Row]:
        with self.lock:
            rows = self._db.execute("SELECT * FROM neuron ORDER BY registeredAt, neuronId").fetchall()
            return [self._neuron_row(row) for row in rows]

    def _neuron_row(self, row: sqlite3.Row) -> Row:
        latest = self.heartbeats(row["neuronId"], limit=1)
        silent_for = self.clock() - row["heardAt"]
        gone = silent_for > INACTIVE_AFTER or not row["isActive"]
        return dict(json.loads(row["registration"])) | {
            "neuronId": row["neuronId"],
            "status": "inactive" if gone else row["status"],
            "isActive": bool(row["isActive"]),
            "isOnline": bool(latest) and silent_for <= ONLINE_FOR,
            "lastHeartbeat": latest[0] if latest else None,
            "registeredAt": row["registeredAt"],
            "updatedAt": row["updatedAt"],
        }

    def sla_targets(self, neuron_id: str) -> Row:
        with self.lock:
            rows = self._db.execute(
                "SELECT slaTargets FROM neuron WHERE neuronId = ?", (neuron_id,)
            ).fetchall()
            return dict(json.loads(rows[0]["slaTargets"])) if rows else {}

    def set_sla_targets(self, neuron_id: str, targets: Mapping[str, Any]) -> None:
        with self._transaction() as db:
            db.execute("UPDATE neuron SET slaTargets = ? WHERE neuronId = ?", (dumps(targets), neuron_id))

    # --- heartbeats

    def record_heartbeat(self, neuron_id: str, beat: Mapping[str, Any]) -> Row | None:
        """Stores a heartbeat; the answer's ``data``, or None for an unknown id."""
        now = self.clock()
        with self._transaction() as db:
            known = db.execute(
                "UPDATE neuron SET heardAt = ?, status = ? WHERE neuronId = ?",
                (now, beat["status"], neuron_id),
            )
            if known.rowcount == 0:
                return None
            added = db.execute(
                "INSERT INTO heartbeat (neuronId, receivedAt, body) VALUES (?, ?, ?)",
                (neuron_id, now, dumps(beat)),
            )
            db.execute(
                "DELETE FROM heartbeat WHERE neuronId = ? AND id <="
                " (SELECT id FROM heartbeat WHERE neuronId = ? ORDER BY id DESC LIMIT 1 OFFSET ?)",
                (neuron_id, neuron_id, KEPT_HEARTBEATS),
            )
            (waiting,) = db.execute(
                "SELECT count(*) FROM command WHERE neuronId = ? AND status = 'pending'", (neuron_id,)
            ).fetchone()
            return {"heartbeatId": added.lastrowid, "pendingCommands": waiting, "timestamp": iso(now)}

    def heartbeats(self, neuron_id: str, *, limit: int = KEPT_HEARTBEATS) -> list[Row]:
        """The last ``limit`` heartbeats, oldest first, each with ``heartbeatId`` and ``timestamp``."""
        with self.lock:
            rows = self._db.execute(
                "SELECT * FROM heartbeat WHERE neuronId = ? ORDER BY id DESC LIMIT ?", (neuron_id, limit)
            ).fetchall()
        return [
            json.loads(row["body"]) | {"heartbeatId": row["id"], "timestamp": iso(row["receivedAt"])}
            for row in reversed(rows)
        ]

    # --- commands

    def issue(self, neuron_id: str, command: Mapping[str, Any], *, issued_by: str = "admin") -> Row:
        """Adds a pending command. Raises Conflict where its ``commandId`` exists."""
        command_id = command.get("commandId") or str(uuid.uuid4())
        metadata = command.get("metadata")
        try:
            with self._transaction() as db:
                db.execute(
                    "INSERT INTO command (commandId, neuronId, commandType, commandData, priority, status,"
                    " issuedBy, issuedAt, timeoutAt, retryCount, maxRetries, metadata)"
                    " VALUES (?, ?, ?, ?, ?, 'pending', ?, ?, ?, 0, ?, ?)",
                    (
                        command_id,
                        neuron_id,
                        command["commandType"],
                        dumps(command["commandData"]),
                        command.get("priority", 5),
                        issued_by,
                        self.now(),
                        command.get("timeoutAt"),
                        command.get("maxRetries", 3),
                        None if metadata is None else dumps(metadata),
                    ),
                )
        except sqlite3.IntegrityError:
            raise Conflict(f"commandId {command_id} is already used") from None
        return self._existing_command(command_id)

    def pending(self, neuron_id: str) -> list[Row]:
        """Pending commands, highest priority first, then oldest first; as many as one answer may carry."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT * FROM command WHERE neuronId = ? AND status = 'pending'"
                " ORDER BY priority DESC, id LIMIT ?",
                (neuron_id, PENDING_COMMANDS),
            ).fetchall()
            commands: list[Row] = []
            size = 0
            for row in rows:
                size += len(row["commandData"].encode()) + len((row["metadata"] or "").encode()) + 600
                if commands and size > PENDING_BYTES:
                    break
                command = _command_row(row)
                if command["sentAt"] is None:
                    command["sentAt"] = self.now()
                    db.execute("UPDATE command SET sentAt = ? WHERE id = ?", (command["sentAt"], row["id"]))
                commands.append(command)
            return commands

    def command(self, command_id: str) -> Row | None:
        with self.lock:
            row = self._db.execute("SELECT * FROM command WHERE commandId = ?", (command_id,)).fetchone()
            return None if row is None else _command_row(row)

    def _existing_command(self, command_id: str) -> Row:
        command = self.command(command_id)
        assert command is not None
        return command

    def commands(self, neuron_id: str, *, limit: int = 100) -> list[Row]:
        """The last ``limit`` commands of a neuron, newest first."""
        with self.lock:
            rows = self._db.execute(
                "SELECT * FROM command WHERE neuronId = ? ORDER BY id DESC LIMIT ?", (neuron_id, limit)
            ).fetchall()
        return [_command_row(row) for row in rows]

    def acknowledge(self, command_id: str, *, in_any_state: bool) -> Row:
        """Marks a command acknowledged. Raises Conflict once it has ended, unless ``in_any_state``.

        A repeat changes nothing. ``in_any_state`` moves ``acknowledgedAt`` and forgets the end, as the real
        one does.
        """
        with self._transaction() as db:
            command = self._existing_command(command_id)
            if not in_any_state:
                if command["status"] == "acknowledged":
                    return command
                if command["status"] != "pending":
                    raise Conflict(f"command {command_id} is already {command['status']}")
            db.execute(
                "UPDATE command SET status = 'acknowledged', acknowledgedAt = ? WHERE commandId = ?",
                (self.now(), command_id),
            )
        return self._existing_command(command_id)

    def complete(self, command_id: str, completion: Mapping[str, Any], *, in_any_state: bool) -> Row:
        """Ends a command. The first completion stands: an equal repeat is answered with it, another raises
        Conflict. With ``in_any_state`` the last one stands, as at the real one."""
        status, column = ("completed", "completedAt") if completion["success"] else ("failed", "failedAt")
        response, message = completion.get("response"), completion.get("errorMessage")
        with self._transaction() as db:
            command = self._existing_command(command_id)
            if command["status"] in ("completed", "failed") and not in_any_state:
                told = dumps([command["status"], command["response"], command["errorMessage"]])
                if told == dumps([status, response, message]):
                    return command
                raise Conflict(f"command {command_id} is already {command['status']} with another result")
            db.execute(
                f"UPDATE command SET status = ?, response = ?, errorMessage = ?, {column} = ?"
                " WHERE commandId = ?",
                (status, None if response is None else dumps(response), message, self.now(), command_id),
            )
        return self._existing_command(command_id)

    # --- analytics

    def report_analytics(self, neuron_id: str, day: str, report: Mapping[str, Any]) -> Row:
        """Replaces the neuron's row of that day (``YYYY-MM-DD``, UTC)."""
        now = self.now()
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO analytics VALUES (?, ?, ?, ?)", (neuron_id, day, now, dumps(report))
            )
        return dict(report) | {"neuronId": neuron_id, "date": day, "reportedAt": now}

    def analytics(self, neuron_id: str, *, days: int = 7) -> list[Row]:
        """The rows of the last ``days`` UTC days, today included, oldest first."""
        first = iso(max(0.0, self.clock() - (days - 1) * DAY))[:10]
        with self.lock:
            rows = self._db.execute(
                "SELECT * FROM analytics WHERE neuronId = ? AND date >= ? ORDER BY date", (neuron_id, first)
            ).fetchall()
        return [
            json.loads(row["report"])
            | {"neuronId": row["neuronId"], "date": row["date"], "reportedAt": row["reportedAt"]}
            for row in rows
        ]


def _command_row(row: sqlite3.Row) -> Row:
    command = dict(row)
    for name in ("commandData", "response", "metadata"):
        if command[name] is not None:
            command[name] = json.loads(command[name])
    return command
