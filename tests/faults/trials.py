"""One neuron, its state directory and a federation that records it, through any number of lives."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.faults import subject
from tests.faults.launcher import Child, Launcher
from tests.rig.invariants import ENDED, double_effects
from tests.rig.process import wait_for
from tests.rig.recording import RecordingFederation

_numbers = itertools.count(1)
PATIENCE = 10.0


class Stuck(AssertionError):
    """What was waited for did not come about."""


class Trial:
    """A neuron's lives against a federation of its own. What must hold afterwards is in `violations`."""

    def __init__(
        self, launcher: Launcher, directory: Path, *, registered: bool = True, **federation: Any
    ) -> None:
        """`registered`: the neuron has its token. `federation`: settings of the RecordingFederation."""
        self.launcher = launcher
        self.neuron_id = f"neuron-{next(_numbers)}" if registered else ""
        self.state = directory / f"state-{next(_numbers)}"
        self.federation = RecordingFederation(**federation)
        self._environ: dict[str, str] = {}
        self.child: Child | None = None
        self.lives = 0

    def __enter__(self) -> Self:
        self.federation.start()
        if self.neuron_id:
            self._environ["NEURON_TOKEN"] = self.federation.token(self.neuron_id)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.child is not None:
            self.child.kill()
        self.federation.stop()
        self.federation.store.close()

    def start(self, **options: Any) -> Child:
        """The next life. Options: what `Launcher.start` takes."""
        self.lives += 1
        options = {"federation_url": self.federation.url, "neuron_id": self.neuron_id, **options}
        environ = {**self._environ, **options.pop("environ", {})}
        self.child = self.launcher.start(self.state, environ=environ, **options)
        return self.child

    # -- commands ------------------------------------------------------------------------------------------------

    def issue(self, kind: str, data: Any = None, priority: int = 5, **extra: Any) -> str:
        return self.federation.issue(self.neuron_id, kind, data, priority, **extra)

    def issue_task(self, task: str, priority: int = 5, **params: Any) -> str:
        return self.issue("run_task", {"task": task, "params": {"n": len(self.federation.issued), **params}}, priority)

    def one_of_each_kind(self) -> None:
        self.issue("config_update", {"log_level": "DEBUG"}, 9)
        self.issue("no_such_command", {}, 8)
        self.issue_task("effect", 4)
        self.issue_task("again", 3)

    def list_again(self, command_id: str, data: Any = None) -> None:
        """The federation shows an ended command as pending once more, as after a restored backup. `data`: another
        payload under the same id."""
        with self.federation.store._transaction() as rows:
            rows.execute("UPDATE command SET status = 'pending' WHERE commandId = ?", (command_id,))
            if data is not None:
                rows.execute(
                    "UPDATE command SET commandData = ? WHERE commandId = ?", (json.dumps(data), command_id)
                )

    def status(self, command_id: str) -> str:
        return str(self.federation.command(command_id)["status"])

    def outcome(self, command_id: str) -> str:
        return str(self.federation.command(command_id)["response"]["outcome"])

    def ended(self, command_id: str) -> bool:
        return self.status(command_id) in ENDED

    def all_ended(self) -> bool:
        return all(map(self.ended, self.federation.issued))

    def idle(self) -> bool:
        """All commands have ended, and the neuron has written that down and looked for more."""
        completes = self.federation.of("complete")
        looks = self.federation.of("pending")
        return self.all_ended() and bool(completes and looks) and looks[-1].number > completes[-1].number

    def until_settled(self, what: str = "the end of all commands") -> None:
        """Until idle, or until the neuron has looked for commands so often that nothing more will come of them."""
        looks = len(self.federation.of("pending"))
        self.until(lambda: self.idle() or len(self.federation.of("pending")) > looks + 40, what=what)

    def until(self, predicate: Callable[[], Any], timeout: float = PATIENCE, what: str = "the state") -> None:
        """Until `predicate` holds. Raises Stuck with the neuron's log where it does not."""
        try:
            wait_for(predicate, timeout, what)
        except AssertionError as error:
            log = self.child.text() if self.child else ""
            raise Stuck(f"{error}; {self.violations()}\n{log[-6000:]}") from None

    # -- what must hold ------------------------------------------------------------------------------------------

    def effects(self) -> list[str]:
        path = Path(f"{self.state}.effects")
        return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []

    def violations(self) -> dict[str, list[str]]:
        """By invariant, empty where all hold: I1 to I5, and I13."""
        found = {
            "I1 lost": self.federation.lost_commands(),
            "I2 double effect": double_effects(Path(f"{self.state}.effects")),
            "I3 flipped": self.federation.flips(),
            "I4 two outcomes": self.federation.conflicting_outcomes(),
            "I5 spurious": self.federation.spurious(subject.correct),
            "I13 own 4xx": self.federation.own_4xx(),
        }
        return {name: faults for name, faults in found.items() if faults}
