"""Every exception the neuron raises on purpose.

    NeuronError
    ├── ConfigError             bad settings; `faults` names each of them, its source and the remedy
    ├── DefinitionError         a task, command, dependency or endpoint was registered wrongly
    ├── JournalError            the state directory
    │   ├── JournalLocked       another process holds it
    │   └── JournalUnavailable  it cannot be written (disk full, read-only, I/O error)
    ├── Rejected                a command that this neuron will not run; handlers raise it
    ├── Cancelled               a task noticed its cancellation and ended
    ├── WorkerLost              the process or machine that ran a task is gone
    ├── EngineUnavailable       the executor cannot take a task now; it stays pending
    └── FederationError         a call to the federation failed
        ├── Retryable           the same call may succeed later
        │   ├── Unreachable     no whole answer: refused, reset, timed out, cut off; it may have acted
        │   ├── BadAnswer       an answer that is not the protocol's: HTML, wrong shape, too large
        │   ├── ServerFault     5xx
        │   ├── Throttled       429, or a 503 that says when to come back
        │   └── IdentityConflict  the federation knows this id and will not issue a token for it
        ├── Unauthorized        401: the token is not accepted
        └── Refused             any other 4xx, and redirects: final for this request
"""

from __future__ import annotations

import threading


class NeuronError(Exception):
    """The root of the tree above."""


class ConfigError(NeuronError):
    """Settings that cannot be used. `faults`: one sentence each, naming value, source and remedy."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults


class DefinitionError(NeuronError):
    """A registration (task, command, dependency, endpoint) that cannot work, found when it is made."""


class JournalError(NeuronError):
    """The state directory cannot be used."""


class JournalLocked(JournalError):
    """Another process runs on the same state directory."""


class JournalUnavailable(JournalError):
    """A write did not become durable; nothing that depends on it may happen."""


class Rejected(NeuronError):
    """This neuron will not run the command. `details` go into the command's response.

    Raise it from a task or a command handler when the request itself is at fault.
    """

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.details = details


class Cancelled(NeuronError):
    """Raised inside a task by `context.check_cancelled()`; the command ends `cancelled`."""


class WorkerLost(NeuronError):
    """The worker that ran a task ended before the task did."""


class EngineUnavailable(NeuronError):
    """The executor cannot be reached. Nothing was started; commands stay pending at the federation."""


class FederationError(NeuronError):
    """A federation call failed. `endpoint`: the protocol's name of the call; `status`: HTTP status or None."""

    def __init__(
        self, endpoint: str, reason: str, *, status: int | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(f"{endpoint}: {reason}")
        self.endpoint = endpoint
        self.reason = reason
        self.status = status
        self.retry_after = retry_after


class Retryable(FederationError):
    """The call may succeed later. `tries` and `stopping` steer the back-off of the caller that set them."""

    tries: int | None = 1
    stopping: threading.Event | None = None


class Unreachable(Retryable):
    """No whole answer arrived. Whether the federation acted is unknown."""


class BadAnswer(Retryable):
    """An answer arrived that the protocol does not know."""


class ServerFault(Retryable):
    """The federation answered 5xx."""


class Throttled(Retryable):
    """The federation asked to come back later; `retry_after` in seconds, at most an hour."""


class IdentityConflict(Retryable):
    """The id is registered and its token is not issued again."""


class Unauthorized(FederationError):
    """401: the token is missing, expired or not accepted."""


class Refused(FederationError):
    """The federation will not take this request, now or later."""
