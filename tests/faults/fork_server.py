"""Starts neurons in milliseconds: imported once, forked for each.

Reads one JSON object a line and answers in kind:
`{"arguments", "environ", "log", "held"}` forks a neuron, `{"pid"}`; held ones stop until SIGCONT.
`{"reap": pid}` waits for it to end, `{"status"}` as waitpid gives it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from tests.faults import subject

PR_SET_PTRACER = 0x59616D61
ANYBODY = ctypes.c_ulong(-1)


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "reap" in request:
            answer = {"status": os.waitpid(request["reap"], 0)[1]}
        else:
            answer = {"pid": os.fork()}
            if answer["pid"] == 0:
                _become_neuron(request)
        print(json.dumps(answer), flush=True)


def _become_neuron(request: dict[str, Any]) -> None:
    code = 1
    try:
        os.setsid()
        log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
            os.dup2(descriptor, target)
        os.environ.update(request["environ"])
        # What a restart by exec runs.
        sys.orig_argv = [sys.executable, str(Path(subject.__file__)), *request["arguments"]]
        if request["held"]:
            # strace is nobody's child here; where ptrace is restricted it must be allowed in.
            ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANYBODY, 0, 0, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
        code = subject.main(request["arguments"])
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
