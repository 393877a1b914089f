"""Identity and token: what must outlive the process, because the federation issues a token for an id only once.

They live in `identity.json` (0600, replaced atomically) and not in the journal, so that a damaged journal does not
cost the identity. One entry for each federation origin: a mistyped address must not overwrite a token that nobody
can issue again.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import stat
import threading
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt

from neuron.config import NeuronConfig
from neuron.errors import BadAnswer, JournalUnavailable
from neuron.logs import NeuronLogger, redactor
from neuron.transport import FederationClock, origin_of

FILE = "identity.json"
RENEWAL_PAUSE = 60.0
RENEWAL_PAUSE_AFTER_SIX = 3600.0
_KEPT_ORIGINS = 16


@dataclass(frozen=True)
class Identity:
    """Who the neuron is at one federation. `generated`: the id is our own choice, not the operator's.

    `confirmed`: a token was received for it, so the id is known to be ours.
    """

    neuron_id: str
    configured_id: str
    generated: bool
    confirmed: bool = False
    token: str = dataclasses.field(default="", repr=False)
    saved_at: float = 0.0


class Credentials:
    """The identity in use, its token, and the pace at which a new token is asked for.

    All methods may be called from any thread.
    """

    def __init__(self, config: NeuronConfig, clock: FederationClock, logger: NeuronLogger) -> None:
        self._path = Path(config.state_dir) / FILE
        self._config = config
        self._clock = clock
        self._logger = logger
        self._origin = origin_of(config.federation_url)
        self._lock = threading.RLock()
        self.renewing = threading.Lock()
        self._renewals_in_a_row = 0
        self._last_renewal: float | None = None
        self._unsaved = False
        self.identity = Identity("", config.neuron_id, True)

    @property
    def neuron_id(self) -> str:
        return self.identity.neuron_id

    @property
    def token(self) -> str:
        return self.identity.token

    def load(self) -> None:
        """Choose the identity: stored for this origin, else stored for another, else a new one. Nothing is written."""
        configured = self._config.neuron_id
        stored = self._read()
        entry = stored.get(f"{self._origin} {configured}")
        if entry is None:
            others = [kept for kept in stored.values() if kept.configured_id == configured]
            entry = max(others, key=lambda kept: kept.saved_at, default=None)
            if entry is not None:
                self._logger.warning(
                    "this federation is new to neuron %s; its token of another address is tried here first",
                    entry.neuron_id,
                    extra={"federation": self._origin},
                )
        if entry is None:
            neuron_id = configured or fresh_id(self._config.name, self._clock.now())
            entry = Identity(neuron_id, configured, generated=not configured)
        self.identity = self._with_supplied_token(entry)
        redactor.learn(self.identity.token)

    def _with_supplied_token(self, entry: Identity) -> Identity:
        """The token of the configuration, where it is newer than the stored one."""
        supplied = self._config.token
        if not supplied:
            return entry
        redactor.learn(supplied)
        try:
            claims = read_token(supplied)
            owner = claims.get("neuronId")
            if not isinstance(owner, str) or not 1 <= len(owner) <= 100:
                raise ValueError("it names no neuron")
        except ValueError as error:
            self._logger.error("the configured token cannot be used (%s); without it", error)
            return entry
        if self._config.neuron_id and owner != self._config.neuron_id:
            self._logger.error(
                "the configured token belongs to neuron %s, not to %s; without it", owner, self._config.neuron_id
            )
            return entry
        if entry.token and _issued(read_token(entry.token)) >= _issued(claims):
            return entry
        return dataclasses.replace(entry, neuron_id=owner, generated=False, confirmed=True, token=supplied)

    def _read(self) -> dict[str, Identity]:
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return {}
        except OSError as error:
            if error.errno == errno.ELOOP:
                self._set_aside("is a symbolic link")
                return {}
            # No permission, no descriptor left, a bad sector: what is in it is still ours.
            raise JournalUnavailable(f"{self._path} cannot be opened: {error.strerror}") from None
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            self._set_aside("is a directory")
            return {}
        with os.fdopen(descriptor, "rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                self._close_to_others(file.fileno())
            try:
                entries = json.loads(file.read())["identities"]
                found = {}
                for key, entry in entries.items():
                    identity = Identity(**entry)
                    if not isinstance(identity.neuron_id, str) or not 1 <= len(identity.neuron_id) <= 100:
                        raise ValueError("no neuron id")
                    if not isinstance(identity.saved_at, (int, float)):
                        raise ValueError("no time")
                    if identity.token:
                        claims = read_token(identity.token)
                        if claims.get("neuronId") != identity.neuron_id:
                            raise ValueError("the token belongs to another neuron")
                    found[key] = identity
            except OSError as error:
                raise JournalUnavailable(f"{self._path} cannot be read: {error.strerror}") from None
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                self._set_aside(f"is damaged ({error})")
                return {}
        return found

    def _close_to_others(self, descriptor: int) -> None:
        try:
            os.fchmod(descriptor, 0o600)
        except OSError as error:
            self._logger.warning("%s is open to other users and stays so: %s", self._path, error.strerror)
        else:
            self._logger.warning("%s was open to other users; now 0600", self._path)

    def _set_aside(self, reason: str) -> None:
        aside = self._path.with_name(f"{FILE}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
        try:
            self._path.replace(aside)
        except OSError as error:
            self._logger.error("%s %s and cannot be set aside: %s", self._path, reason, error)
        else:
            self._logger.error("%s %s; kept as %s, going on without it", self._path, reason, aside.name)

    def save(self, identity: Identity) -> None:
        """Make `identity` the one in use, durably. Raises JournalUnavailable, and then nothing has changed."""
        identity = dataclasses.replace(identity, saved_at=time.time())
        redactor.learn(identity.token)
        with self._lock:
            entries = self._read()
            entries[f"{self._origin} {identity.configured_id}"] = identity
            newest = sorted(entries.items(), key=lambda item: item[1].saved_at)[-_KEPT_ORIGINS:]
            content = {"identities": {key: dataclasses.asdict(entry) for key, entry in newest}}
            try:
                _replace_durably(self._path, json.dumps(content, indent=1).encode())
            except OSError as error:
                raise JournalUnavailable(f"{self._path} cannot be written: {error.strerror or error}") from None
            self.identity = identity
            self._unsaved = False

    def accept(self, token: Any) -> None:
        """Store a token that registration returned. Raises BadAnswer where it is none, or another neuron's."""
        try:
            if not isinstance(token, str) or not token:
                raise ValueError("it has no token")
            redactor.learn(token)
            claims = read_token(token)
            if claims.get("neuronId") != self.neuron_id:
                raise ValueError(f"its token is for neuron {claims.get('neuronId')!r}, not {self.neuron_id!r}")
            expires = _seconds(claims, "exp")
            if expires is not None and expires <= self._clock.now():
                raise ValueError("its token has expired already")
        except ValueError as error:
            raise BadAnswer("register", f"the answer cannot be used: {error}") from None
        identity = dataclasses.replace(self.identity, token=token, confirmed=True)
        try:
            self.save(identity)
        except JournalUnavailable as error:
            # The federation will not issue it again: use it, and write it down as soon as that is possible.
            self._logger.error("the token could not be stored (%s); it is kept in memory until it can", error)
            self.identity = identity
            self._unsaved = True

    def save_again(self) -> None:
        """Store a token that could not be stored when it came."""
        if self._unsaved:
            try:
                self.save(self.identity)
            except JournalUnavailable as error:
                self._logger.debug("the token is still in memory alone: %s", error)

    def take_fresh_id(self) -> str:
        """Go on under a new id, made from the present one's stem. Durable before it is used."""
        stem = self._config.neuron_id or self._config.name
        neuron_id = fresh_id(stem, self._clock.now())
        while neuron_id == self.neuron_id:
            neuron_id = f"{neuron_id}-2"
        self.save(Identity(neuron_id, self._config.neuron_id, generated=not self._config.neuron_id))
        return neuron_id

    def expires_in(self) -> float | None:
        """Seconds to the token's expiry by the federation's clock; None without a token or an expiry."""
        if not self.token:
            return None
        expires = _seconds(read_token(self.token), "exp")
        return None if expires is None else expires - self._clock.now()

    def expires_soon(self) -> bool:
        """A tenth of the token's life is left, at most a week of it."""
        left = self.expires_in()
        if left is None:
            return False
        life = left + self._clock.now() - _issued(read_token(self.token))
        return left < min(7 * 86_400.0, life / 10)

    def renewal_wait(self) -> float:
        """Seconds until the next renewal may be tried: one a minute, after six in a row one an hour."""
        if self._last_renewal is None:
            return 0.0
        pause = RENEWAL_PAUSE_AFTER_SIX if self._renewals_in_a_row >= 6 else RENEWAL_PAUSE
        return max(0.0, self._last_renewal + pause - time.monotonic())

    def renewal_tried(self) -> None:
        """Counts a renewal. The row ends when a call succeeds with what the renewal brought."""
        self._last_renewal = time.monotonic()
        self._renewals_in_a_row += 1

    def renewal_helped(self) -> None:
        self._renewals_in_a_row = 0


def read_token(token: str) -> dict[str, Any]:
    """The claims of a JWT. Its signature is the federation's to check. Raises ValueError where it is none."""
    try:
        claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False, "verify_exp": False})
    except (jwt.InvalidTokenError, RecursionError) as error:
        raise ValueError(f"not a JWT: {error}") from None
    return claims


def fresh_id(name: str, now: float) -> str:
    """`<slug of name>-<unix seconds>`, at most 100 characters."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:80].strip("-")
    return f"{slug or 'neuron'}-{int(now)}"


def _issued(claims: dict[str, Any]) -> float:
    return _seconds(claims, "iat") or 0.0


def _seconds(claims: dict[str, Any], name: str) -> float | None:
    """A moment among the claims, in epoch seconds; None where it is none that a calendar knows."""
    value = claims.get(name)
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e11 else None


def _replace_durably(path: Path, content: bytes) -> None:
    """Write beside, fsync, rename, fsync the directory: after a power cut the file is the old or the new one."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
