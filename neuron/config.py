"""Settings: one frozen dataclass, and where each value came from.

Precedence: defaults < file (`--config`) < environment < command line (`--set`) < `config_update`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from neuron.errors import ConfigError
from neuron.executors import ENGINES
from neuron.health import check_thresholds, parse_dependency

MASK = "********"
DAY = 86_400.0


def _setting(
    default: Any,
    help: str,
    *,
    remote: bool = False,
    secret: bool = False,
    least: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A field with its documentation. `remote`: `config_update` may change it."""
    metadata = {
        "help": help, "remote": remote, "secret": secret, "least": least, "most": most, "choices": choices,
    }
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata, repr=not secret)
    return field(default=default, metadata=metadata, repr=not secret)


@dataclass(frozen=True)
class NeuronConfig:
    """A neuron's settings. Durations are seconds.

    Raises ConfigError naming every fault when a value cannot be used.
    """

    neuron_id: str = _setting("", "identity at the federation, ≤ 100; empty: `<slug of name>-<unix seconds>`")
    name: str = _setting("api-neuron", "name shown to people, ≤ 255")
    type: str = _setting("api-based", "kind of neuron, ≤ 100")
    version: str = _setting("1.0.0", "version of your neuron, ≤ 50")
    language: str = _setting("python", "implementation language, ≤ 50")
    federation_url: str = _setting("http://localhost:5000", "where the federation is")
    heartbeat_interval: float = _setting(60.0, "between heartbeats", remote=True, least=0.05, most=DAY)
    command_interval: float = _setting(
        5.0, "between looks for commands (every second for a minute after one)", remote=True, least=0.05, most=DAY
    )
    analytics_interval: float = _setting(
        300.0, "between reports of the day's totals", remote=True, least=0.05, most=DAY
    )
    host: str = _setting("127.0.0.1", "address of the neuron's own endpoints; empty: no endpoints")
    port: int = _setting(8080, "port of the neuron's own endpoints; 0: any free one", least=0, most=65535)
    state_dir: str = _setting("neuron-state", "directory of identity, token and journal")
    log_level: str = _setting(
        "INFO", "DEBUG, INFO, WARNING, ERROR or CRITICAL", remote=True,
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    )
    log_format: str = _setting("json", "json or text", remote=True, choices=("json", "text"))
    request_timeout: float = _setting(
        10.0, "total deadline of one federation call", remote=True, least=0.1, most=120
    )
    shutdown_grace: float = _setting(
        7.0, "from a stop to the end of the process, everything included", remote=True, least=0, most=3600
    )
    max_concurrent_tasks: int = _setting(4, "commands that run beside each other", remote=True, least=1, most=1000)
    task_timeout: float = _setting(
        300.0, "a task's time limit unless it has its own", remote=True, least=0.05, most=30 * DAY
    )
    max_body_bytes: int = _setting(
        1_000_000, "largest request body the endpoints take", remote=True, least=1, most=1 << 30
    )
    executor: str = _setting("threads", "where tasks run: threads, processes or dask://host:8786")
    data_dir: str = _setting("", "directory whose files `data_processing` may read; empty: none")
    capabilities: tuple[str, ...] = _setting((), "capabilities told at registration, besides the tasks")
    dependencies: tuple[Any, ...] = _setting((), "what this neuron needs: names, or tcp/http checks")
    api_endpoints: tuple[Any, ...] = _setting((), "endpoints told at registration, besides the neuron's own")
    metadata: dict[str, Any] = _setting({}, "any JSON, told at registration")
    alert_thresholds: dict[str, Any] = _setting({}, "warning and critical thresholds of health", remote=True)
    on_identity_conflict: str = _setting(
        "wait", "wait, or new-id: go on under a fresh id when the federation will not re-issue the token",
        choices=("wait", "new-id"),
    )
    token: str = _setting("", "a token to start with, for a container without a volume", secret=True)
    api_secret: str = _setting("", "HS256 secret of callers of the endpoints, ≥ 32 bytes", secret=True)
    tls_ca: str = _setting("", "CA file for the federation's certificate; empty: the usual ones")
    tls_cert: str = _setting("", "client certificate file")
    tls_key: str = _setting("", "key file of the client certificate")

    def __post_init__(self) -> None:
        faults: list[str] = []
        for item in fields(self):
            try:
                value = _coerced(item, getattr(self, item.name))
            except ValueError as fault:
                faults.append(f"{item.name}: {fault}")
            else:
                object.__setattr__(self, item.name, value)
        if not faults:
            faults = _cross_faults(self)
        if faults:
            raise ConfigError(faults)

    def digest(self) -> str:
        """Twelve hex digits that change with any setting but a secret; told as `configVersion`."""
        public = {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata["secret"]}
        text = json.dumps(public, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def public(self) -> dict[str, Any]:
        """Every setting with secrets masked, JSON-able: for `/status` and `--print-config`."""
        shown: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.metadata["secret"]:
                value = MASK if value else ""
            elif item.name.endswith("_url"):
                value = _without_userinfo(value)
            shown[item.name] = list(value) if isinstance(value, tuple) else value
        return shown


FIELDS: dict[str, dataclasses.Field[Any]] = {item.name: item for item in fields(NeuronConfig)}
REMOTE = tuple(name for name, item in FIELDS.items() if item.metadata["remote"])
SECRET_VARIABLES = tuple(f"NEURON_{name.upper()}" for name, item in FIELDS.items() if item.metadata["secret"])
_TYPES = typing.get_type_hints(NeuronConfig)
_ALIASES = {
    "FEDERATION_URL": "federation_url",
    "LOG_LEVEL": "log_level",
    "HEARTBEAT_INTERVAL": "heartbeat_interval",
    "COMMAND_CHECK_INTERVAL": "command_interval",
    "ANALYTICS_INTERVAL": "analytics_interval",
}
_LENGTHS = {"neuron_id": 100, "name": 255, "type": 100, "language": 50, "version": 50}
# What Kubernetes sets in every pod of a namespace that has a service called `neuron`.
_KUBERNETES = re.compile(r"NEURON_(SERVICE_(HOST|PORT)(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)$")


@dataclass(frozen=True)
class Settings:
    """What `load` found: the config, `{field: source}` and warnings for the log."""

    config: NeuronConfig
    sources: Mapping[str, str]
    warnings: Sequence[str]


def load(
    *,
    file: str | None = None,
    environ: Mapping[str, str] | None = None,
    assignments: Sequence[str] = (),
) -> Settings:
    """Read the settings. `assignments`: `field=value` strings of the command line.

    Raises ConfigError with every fault of every source at once.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    sources = dict.fromkeys(FIELDS, "default")
    faults: list[str] = []
    warnings: list[str] = []

    def take(name: str, value: Any, source: str, *, text: bool) -> None:
        item = FIELDS[name]
        try:
            parsed = _coerced(item, _from_text(item, value) if text else value)
        except ValueError as fault:
            faults.append(f"{source}: {name}: {fault}")
        else:
            values[name] = parsed
            sources[name] = source

    for name, value in _read_file(file, faults).items():
        if name in FIELDS:
            take(name, value, f"file {file}", text=False)
        else:
            faults.append(f"file {file}: unknown setting {name!r}{_nearest(name, FIELDS)}")

    for variable, name in _environment(environ, warnings):
        if variable.endswith("_FILE") and FIELDS[name].metadata["secret"]:
            try:
                secret = Path(environ[variable]).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                faults.append(f"environment {variable}: {environ[variable]}: cannot be read: {error}")
            else:
                take(name, secret, f"environment {variable}", text=True)
        else:
            take(name, environ[variable], f"environment {variable}", text=True)

    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        name = name.strip()
        if not equals:
            faults.append(f"--set {assignment}: write it as field=value")
        elif name not in FIELDS:
            faults.append(f"--set {name}: unknown setting{_nearest(name, FIELDS)}")
        elif FIELDS[name].metadata["secret"]:
            faults.append(
                f"--set {name}: everybody on the machine can read a command line; use NEURON_{name.upper()}_FILE, "
                f"NEURON_{name.upper()} or the file"
            )
        else:
            take(name, value, "--set", text=True)

    if faults:
        raise ConfigError(faults)
    try:
        config = NeuronConfig(**values)
    except ConfigError as error:
        raise ConfigError([_with_source(fault, sources) for fault in error.faults]) from None
    return Settings(config, sources, warnings)


def updated(config: NeuronConfig, changes: Mapping[str, Any]) -> NeuronConfig:
    """`config` with the changes of a `config_update`: all of them, or none.

    Raises ConfigError naming every key that is unknown, not for remote hands, or of a wrong value.
    """
    faults: list[str] = []
    for name, value in changes.items():
        if name not in FIELDS:
            faults.append(f"{name}: unknown setting{_nearest(name, REMOTE)}")
        elif name not in REMOTE:
            faults.append(f"{name}: is not changed from remote; set it where the neuron runs")
        else:
            try:
                _coerced(FIELDS[name], value)
            except ValueError as fault:
                faults.append(f"{name}: {fault}")
            else:
                # A remote value is held to a floor that a test on one machine may go below.
                if name.endswith("_interval") and value < 1:
                    faults.append(f"{name}: {value!r} is below 1 s, the least that is taken from remote")
    if faults:
        raise ConfigError(faults)
    return dataclasses.replace(config, **changes)


def explained(settings: Settings) -> str:
    """The effective settings as lines `field = value   # source`, secrets masked."""
    shown = settings.config.public()
    width = max(len(name) for name in shown)
    rows = [(name, json.dumps(value, ensure_ascii=False)) for name, value in shown.items()]
    return "\n".join(f"{name:<{width}} = {value}   # {settings.sources[name]}" for name, value in rows)


def _coerced(item: dataclasses.Field[Any], value: Any) -> Any:
    """`value` as the field's type, within its bounds. Raises ValueError with a sentence."""
    kind = _TYPES[item.name]
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(f"{MASK if item.metadata['secret'] else repr(value)} is not text")
        return _checked_text(item, value)
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{value!r} is not a number")
        if not math.isfinite(value) or (kind is int and value != int(value)):
            raise ValueError(f"{value!r} is not a {'whole ' if kind is int else 'finite '}number")
        least, most = item.metadata["least"], item.metadata["most"]
        if not least <= value <= most:
            raise ValueError(f"{value!r} is not between {least:g} and {most:g}")
        return kind(value)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{value!r} is not a list")
        if typing.get_args(kind)[0] is str and not all(isinstance(entry, str) for entry in value):
            raise ValueError(f"{value!r} is not a list of texts")
        if item.name == "dependencies":
            for entry in value:
                parse_dependency(entry)
        return tuple(value)
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not an object")
    if item.name == "alert_thresholds" and (wrong := check_thresholds(value)):
        raise ValueError("; ".join(wrong))
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"is not JSON: {error}") from None
    # Frozen to the top level: a caller's later change to its dict must not change a running neuron.
    return dict(value)


def _checked_text(item: dataclasses.Field[Any], value: str) -> str:
    shown = MASK if item.metadata["secret"] else repr(value)
    if any(ord(character) < 32 for character in value):
        raise ValueError(f"{shown} has control characters")
    limit = _LENGTHS.get(item.name)
    if limit and len(value) > limit:
        raise ValueError(f"{len(value)} characters are over the federation's {limit}")
    if limit and item.name != "neuron_id" and not value.strip():
        raise ValueError("is empty; the federation wants a text")
    if item.name == "log_level":
        value = value.upper()
    choices = item.metadata["choices"]
    if choices and value not in choices:
        raise ValueError(f"{shown} is none of {', '.join(choices)}{_nearest(value, choices)}")
    if item.name == "neuron_id" and not re.fullmatch(r"[A-Za-z0-9._:-]*", value):
        raise ValueError(f"{shown} has characters other than letters, digits and . _ : -")
    if item.name == "federation_url":
        return _checked_url(value)
    if item.name == "state_dir" and not value:
        raise ValueError("is empty; name a directory")
    if item.name == "api_secret" and value and len(value.encode()) < 32:
        raise ValueError("is shorter than 32 bytes, too weak for HS256")
    return value


def _checked_url(value: str) -> str:
    try:
        parts = urlsplit(value)
        parts.port  # noqa: B018 - reading it is the check
    except ValueError as error:
        raise ValueError(f"{value!r} is not a URL: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{value!r} is not an http:// or https:// address")
    if parts.username or parts.password:
        raise ValueError("has a user name or password in it; the token is the only credential")
    if parts.query or parts.fragment:
        raise ValueError(f"{value!r} has a query or fragment; give the address alone")
    return value.rstrip("/")


def _without_userinfo(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//", url)


def _cross_faults(config: NeuronConfig) -> list[str]:
    faults = []
    if bool(config.tls_cert) != bool(config.tls_key):
        faults.append("tls_cert, tls_key: give both or neither")
    for name in ("tls_ca", "tls_cert", "tls_key"):
        path = getattr(config, name)
        if path and not Path(path).is_file():
            faults.append(f"{name}: there is no file {path}")
        elif path and not config.federation_url.startswith("https://"):
            faults.append(f"{name}: federation_url is not https://, so it would not be used")
    if config.data_dir and not Path(config.data_dir).is_dir():
        faults.append(f"data_dir: there is no directory {config.data_dir}")
    scheme = config.executor.partition("://")[0]
    if scheme not in ENGINES:
        faults.append(f"executor: {config.executor!r} is none of {', '.join(ENGINES)}{_nearest(scheme, ENGINES)}")
    return faults


def _from_text(item: dataclasses.Field[Any], text: str) -> Any:
    """A value written as text in the environment or on the command line."""
    kind = _TYPES[item.name]
    if kind is str:
        return text
    if kind in (int, float):
        try:
            return kind(text.strip())
        except ValueError:
            raise ValueError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None
    if typing.get_origin(kind) is tuple and not text.lstrip().startswith("["):
        return [entry.strip() for entry in text.split(",") if entry.strip()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{text!r} is not JSON: {error}") from None


def _read_file(file: str | None, faults: list[str]) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        faults.append(f"file {file}: cannot be read: {error.strerror or error}")
        return {}
    except (ValueError, RecursionError) as error:
        faults.append(f"file {file}: is not JSON: {error}")
        return {}
    if not isinstance(content, dict):
        faults.append(f"file {file}: holds {_json_kind(content)}, not an object of settings")
        return {}
    return content


def _json_kind(value: Any) -> str:
    kinds: dict[type, str] = {list: "a list", str: "a text", bool: "a boolean", types.NoneType: "null"}
    return kinds.get(type(value), "a number")


def _environment(environ: Mapping[str, str], warnings: list[str]) -> list[tuple[str, str]]:
    """`(variable, field)` pairs, aliases first so that NEURON_<FIELD> wins over them."""
    pairs = [(alias, name) for alias, name in _ALIASES.items() if alias in environ]
    direct = {f"NEURON_{name.upper()}": name for name in FIELDS}
    from_file = {f"NEURON_{name.upper()}_FILE": name for name in FIELDS if FIELDS[name].metadata["secret"]}
    injected = []
    for variable in sorted(environ):
        if not variable.startswith("NEURON_"):
            continue
        if _KUBERNETES.match(variable) and (
            variable != "NEURON_PORT" or "://" in environ[variable]
        ):
            injected.append(variable)
        elif variable in direct:
            pairs.append((variable, direct[variable]))
        elif variable in from_file:
            pairs.append((variable, from_file[variable]))
        else:
            warnings.append(
                f"environment {variable}: unknown, not used{_nearest(variable, [*direct, *from_file])}"
            )
    if injected:
        warnings.append(
            f"environment {', '.join(injected)}: not used; Kubernetes sets these for a service called 'neuron'. "
            "Set enableServiceLinks: false in the pod, or rename the service; the port of the endpoints "
            "can be given with --set port=…"
        )
    return pairs


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _with_source(fault: str, sources: Mapping[str, str]) -> str:
    name = fault.partition(":")[0].split(",")[0]
    return f"{sources[name]}: {fault}" if name in sources else fault
