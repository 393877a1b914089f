"""A Flask service that reports its requests to the federation, under gunicorn with any number of workers:

    gunicorn --workers 2 --config python:examples.flask_service examples.flask_service:app

Settings come from the environment (NEURON_FEDERATION_URL, NEURON_STATE_DIR, …).
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

from flask import Flask, Response, g, jsonify

from neuron.config import load
from neuron.errors import JournalLocked, NeuronError
from neuron_client import APINeuron

WORKERS = 64  # at most

app = Flask(__name__)
neuron: APINeuron | None = None


@app.before_request
def note_the_time() -> None:
    g.started = time.perf_counter()


@app.after_request
def report(response: Response) -> Response:
    if neuron is not None:
        neuron.simple_request(response.status_code < 500, (time.perf_counter() - g.started) * 1000)
    return response


@app.get("/price/<int:amount>")
def price(amount: int) -> Response:
    if neuron is not None:
        neuron.metric("prices_told").add(1)
    return jsonify(gross=amount * 119)


@app.get("/broken")
def broken() -> Response:
    raise RuntimeError("this page is broken")


def post_worker_init(_: Any) -> None:
    """gunicorn calls this in each worker, after the fork: threads do not survive one.

    A state directory is one neuron's. Each worker takes the first that is free, so that a worker that is replaced
    leaves its identity to the next.
    """
    global neuron
    try:
        config = replace(load().config, host="")  # the service has a port of its own
        for number in range(1, WORKERS + 1):
            own = replace(config, name=f"{config.name}-{number}", state_dir=f"{config.state_dir}/{number}")
            neuron = APINeuron(own)
            with suppress(JournalLocked):
                return neuron.begin()
    except NeuronError as error:
        app.logger.error("the service runs without its neuron: %s", error)


def worker_exit(_server: Any, _worker: Any) -> None:
    """gunicorn calls this at a worker's end: the last figures go out."""
    if neuron is not None:
        neuron.stop()
