"""The program around a neuron: command line, signals, exit codes, `--local`, and the restart of the process."""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from neuron.config import SECRET_VARIABLES, NeuronConfig, Settings, explained, load
from neuron.errors import ConfigError, DefinitionError, JournalError, JournalLocked
from neuron.logs import configure, logger
from neuron.periodic import signal_queue

# sysexits.h where it has a word for it.
EXIT_CONFIG = 2
EXIT_UNAVAILABLE = 69
EXIT_SOFTWARE = 70
EXIT_TEMPORARY = 75
EXIT_PERMISSION = 77

LOCAL_PORT = 5000
OPEN_FILES = 8192  # 2,000 connections to the endpoints and the rest
WATCH_SECONDS = 30.0


class Program(Protocol):
    """The part of APINeuron that the program drives."""

    restart_process: Callable[[], None] | None
    request_stop: Callable[[], None]
    give_up: Callable[[], None]

    names: dict[str, str]

    @property
    def neuron_id(self) -> str: ...

    def begin(self) -> None: ...
    def stop(self) -> None: ...
    def watch(self) -> None: ...
    def address(self) -> str: ...


def run(build: Callable[[NeuronConfig], Program], arguments: Sequence[str] | None = None) -> int:
    """Read the settings, run the neuron until it is told to end, and return the exit code.

    0: stopped as told. 2: settings. 69: the endpoints' address cannot be had. 70: a loop keeps dying.
    75: another process has the state directory. 77: no permission to use it. 130: a second signal.
    """
    options = _parser().parse_args(arguments)
    assignments = list(options.set)
    local: _LocalFederation | None = None
    if options.local:
        local = _LocalFederation(_port_of_choice())
        assignments.append(f"federation_url={local.url}")
    try:
        settings = load(file=options.config, assignments=assignments)
    except ConfigError as error:
        print("neuron: these settings cannot be used:", *error.faults, sep="\n  - ", file=sys.stderr)
        return EXIT_CONFIG
    if options.print_config:
        print(explained(settings))
        for warning in settings.warnings:
            print(f"neuron: {warning}", file=sys.stderr)
        return 0
    # What we start has no business with our secrets; only the next of ourselves gets them back.
    environment = dict(os.environ)
    for name in SECRET_VARIABLES:
        os.environ.pop(name, None)
    configure(settings.config.log_level, settings.config.log_format)
    _allow_open_files()
    for warning in settings.warnings:
        logger.warning(warning)
    try:
        if local is not None:
            local.start(settings)
        return _run(build, settings.config, local, environment)
    finally:
        if local is not None:
            local.stop()
        _flush()


def _run(
    build: Callable[[NeuronConfig], Program],
    config: NeuronConfig,
    local: _LocalFederation | None,
    environment: dict[str, str],
) -> int:
    wishes: queue.SimpleQueue[Any] = signal_queue(signal.SIGTERM, signal.SIGINT)
    try:
        neuron = build(config)
        configure(config.log_level, config.log_format, neuron.names)
        neuron.restart_process = lambda: wishes.put("restart")
        neuron.request_stop = lambda: wishes.put("stop")
        neuron.give_up = lambda: wishes.put("give up")
        neuron.begin()
    except (ConfigError, DefinitionError) as error:
        return _refuse(error, EXIT_CONFIG)
    except JournalLocked as error:
        return _refuse(error, EXIT_TEMPORARY)
    except JournalError as error:
        return _refuse(error, EXIT_PERMISSION)
    except OSError as error:
        return _refuse(f"the endpoints cannot listen on {config.host}:{config.port}: {error}", EXIT_UNAVAILABLE)
    if local is not None:
        local.explain(neuron.neuron_id, neuron.address())
    while True:
        try:
            wish = wishes.get(timeout=WATCH_SECONDS)
        except queue.Empty:
            neuron.watch()
            continue
        break
    told_to_end = _end_at_second_signal(wishes, first=wish)
    neuron.stop()
    if wish == "give up":
        logger.critical("loops keep dying; the process ends so that its supervisor starts a new one")
        return EXIT_SOFTWARE
    if wish == "restart" and not told_to_end.is_set():
        if local is not None:
            local.stop()
        _flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    return 0


def _end_at_second_signal(wishes: queue.SimpleQueue[Any], *, first: Any) -> threading.Event:
    """The event returned is set by the first signal, which turns a restart under way into an end."""
    told_to_end = threading.Event()

    def wait() -> None:
        wish = first
        while True:
            if not isinstance(wish, str):
                if told_to_end.is_set():
                    os._exit(130)
                told_to_end.set()
            wish = wishes.get()

    threading.Thread(target=wait, name="neuron-second-signal", daemon=True).start()
    return told_to_end


def _refuse(reason: object, code: int) -> int:
    logger.critical(str(reason))
    print(f"neuron: {reason}", file=sys.stderr)
    return code


def _flush() -> None:
    """A stdout that is gone must not turn the exit code into Python's 120."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _allow_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="neuron_client.py",
        description="An API-only neuron of the Findawise Empire Federation.",
        epilog="Every setting can also be given as NEURON_<SETTING> in the environment; --print-config lists them.",
    )
    parser.add_argument("--config", metavar="FILE", help="JSON file of settings, see config.example.json")
    parser.add_argument(
        "--set", metavar="FIELD=VALUE", action="append", default=[], help="one setting; may be given again"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="show the effective settings and where each came from, and end"
    )
    parser.add_argument(
        "--local", action="store_true", help="start a federation on this machine, join it, and end it again on exit"
    )
    return parser


def _port_of_choice() -> int:
    """5000 or the first free port after it: the same again after a restart, so that its database is found."""
    for port in range(LOCAL_PORT, LOCAL_PORT + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise SystemExit(f"neuron: no free port from {LOCAL_PORT} to {LOCAL_PORT + 99} for a local federation")


class _LocalFederation:
    """`python -m local_federation` as a child that ends with us, whatever ends us."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, settings: Settings) -> None:
        state = Path(settings.config.state_dir).absolute()
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        command = [
            sys.executable, "-m", "local_federation", "--port", str(self.port), "--exit-with-stdin",
            "--db", str(state / f"local-federation-{self.port}.db"),
        ]
        self._process = subprocess.Popen(
            command, cwd=Path(__file__).resolve().parent.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            # Ctrl-C is for the neuron, which still has a last heartbeat to send.
            start_new_session=True,
        )
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise SystemExit(f"neuron: the local federation did not start on port {self.port}; see above")

    def explain(self, neuron_id: str, neuron_address: str) -> None:
        commands = f"{self.url}/api/api-neurons/{neuron_id}/commands"
        print(
            f"\nA local federation runs at {self.url} (admin key: admin-secret-key).\n"
            f"The neuron answers at {neuron_address}/status\n"
            "A first command, from another terminal:\n\n"
            f"  curl -s -X POST {commands} -H 'X-Admin-Key: admin-secret-key' \\\n"
            "       -H 'Content-Type: application/json' \\\n"
            "       -d '{\"commandType\": \"run_task\", \"commandData\": {\"task\": \"word_count\", "
            "\"params\": {\"text\": \"to be or not to be\"}}}'\n\n"
            "and how it ended:\n\n"
            f"  curl -s {commands} -H 'X-Admin-Key: admin-secret-key'\n",
            file=sys.stderr, flush=True,
        )

    def stop(self) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process = None
