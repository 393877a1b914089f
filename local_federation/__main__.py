"""``python -m local_federation``: a federation on this machine until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import errno
import os
import queue
import signal
import sqlite3
import sys
import threading

from local_federation.server import DEFAULT_ADMIN_KEY, DEFAULT_TOKEN_TTL, LocalFederation


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 when told to end, 1 where it cannot listen or open its database, 2 for wrong arguments."""
    options = _options(argv)
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: ended.put(number))
    try:
        federation = LocalFederation(
            options.db,
            host=options.host,
            port=options.port,
            admin_key=options.admin_key,
            like_real=options.like_real,
            token_ttl=options.token_ttl,
        )
    except sqlite3.Error as error:
        return _fail(f"cannot open the database {options.db}: {error}")
    try:
        federation.start()
    except (OSError, OverflowError) as error:
        federation.close()
        place = f"port {options.port} on {options.host}"
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            return _fail(f"{place} is taken: choose another, or --port 0 for any free one")
        return _fail(f"cannot listen on {place}: {error}")
    mode = "errs like the real one" if options.like_real else "correct mode"
    print(f"Local federation listens on {federation.url} ({mode}, state in {options.db})", flush=True)
    loopback = options.host.startswith("127.") or options.host in ("::1", "localhost")
    if not loopback and options.admin_key == DEFAULT_ADMIN_KEY:
        print("warning: beyond loopback with the well-known admin key; set --admin-key", file=sys.stderr)
    if options.exit_with_stdin:
        threading.Thread(target=_drain_stdin, args=(ended,), name="stdin", daemon=True).start()
    ended.get()
    federation.close()
    return 0


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m local_federation", description="A federation on this machine, to try neurons against."
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=5000, help="0 takes any free one (default: %(default)s)")
    parser.add_argument("--db", metavar="FILE", default=":memory:", help="SQLite file to keep the state in")
    parser.add_argument(
        "--admin-key",
        default=os.environ.get("FEDERATION_ADMIN_KEY") or DEFAULT_ADMIN_KEY,
        help="what X-Admin-Key must carry (default: FEDERATION_ADMIN_KEY, else the well-known one)",
    )
    parser.add_argument("--like-real", action="store_true", help="err where the real federation errs")
    parser.add_argument(
        "--token-ttl", type=float, metavar="SECONDS", default=DEFAULT_TOKEN_TTL, help="default: a year"
    )
    parser.add_argument(
        "--exit-with-stdin",
        action="store_true",
        help="end when standard input does, as a parent's death makes it",
    )
    return parser.parse_args(argv)


def _drain_stdin(ended: queue.SimpleQueue[int]) -> None:
    # os.read, not sys.stdin: a daemon thread inside the buffered reader aborts the interpreter's exit.
    try:
        while os.read(0, 4096):
            pass
    except OSError:
        pass  # no standard input at all counts as its end
    ended.put(0)


def _fail(message: str) -> int:
    print(f"local_federation: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
