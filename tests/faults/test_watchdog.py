"""F8, F37: loops that die or hang are seen and started again; nothing grows with the number of connections."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import requests

from neuron.errors import BadAnswer, Unreachable
from neuron_client import APINeuron
from tests.rig.fault_proxy import FaultProxy, TcpFault
from tests.rig.process import wait_for
from tests.rig.recording import RecordingFederation


class Fragile(APINeuron):
    """Its loops do what `break_in` says, once each: a callable that raises or blocks."""

    break_in: Callable[[], None] | None = None

    def fetch_commands(self) -> list[Any]:
        broken, self.break_in = self.break_in, None
        if broken is not None:
            broken()
        return super().fetch_commands()


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "error", [RecursionError("deep"), MemoryError(), KeyError("x"), SystemExit(3), KeyboardInterrupt()]
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_a_loop_meets_commands_are_obeyed_again(
    error: BaseException, oracle: RecordingFederation, make_neuron: Callable[..., APINeuron]
) -> None:
    neuron = make_neuron(neuron_class=Fragile, federation_url=oracle.url, host="")
    assert neuron.start()
    wait_for(neuron.registered.is_set)
    assert isinstance(neuron, Fragile)
    neuron.break_in = raising(error)
    wait_for(lambda: neuron.break_in is None, what="the error")
    command = oracle.issue(neuron.neuron_id, "health_check")

    wait_for(lambda: oracle.command(command)["status"] == "completed", what="a command after the error")
    assert neuron.live() == (True, [])


def test_a_stalled_loop_turns_live_red_and_shows_in_the_heartbeat(
    oracle: RecordingFederation, make_neuron: Callable[..., APINeuron]
) -> None:
    neuron = make_neuron(neuron_class=Fragile, federation_url=oracle.url)
    assert neuron.start()
    wait_for(neuron.registered.is_set)
    assert isinstance(neuron, Fragile)
    release = threading.Event()
    hung = threading.Event()

    def hang() -> None:
        hung.set()
        release.wait(30)

    neuron.break_in = hang
    try:
        assert hung.wait(5)
        assert requests.get(f"{neuron.address()}/health/live", timeout=5).status_code == 200
        # The minute that a tick may take is over.
        neuron.loops["commands"]._busy_until = 0.0
        live = requests.get(f"{neuron.address()}/health/live", timeout=5)
        assert (live.status_code, live.json()["reasons"]) == (503, ["the commands loop is stalled"])
        assert requests.get(f"{neuron.address()}/health", timeout=5).status_code == 503
        wait_for(
            lambda: oracle.of("heartbeat")[-1].body["performanceMetrics"]["stalledLoops"] == ["commands"],
            what="the stalled loop in a heartbeat",
        )
        beat = oracle.of("heartbeat")[-1].body
        assert beat["status"] == "error"
        assert "stalled" in str(beat["performanceMetrics"]["healthReasons"])
    finally:
        release.set()
    wait_for(lambda: requests.get(f"{neuron.address()}/health/live", timeout=5).status_code == 200, what="green again")


@pytest.mark.slow
def test_threads_descriptors_and_sockets_do_not_grow_with_broken_connections(
    oracle: RecordingFederation, make_neuron: Callable[..., APINeuron]
) -> None:
    """F37, scaled: each call breaks its connection, hundreds of times."""
    with FaultProxy(oracle.port) as proxy:
        proxy.randomly(5, {TcpFault("drop_reply"): 1, TcpFault("rst_mid_response"): 1, None: 1})
        neuron = make_neuron(federation_url=proxy.url, host="", neuron_id="n", token=oracle.token("n"))
        assert neuron.start()
        transport, token = neuron.transport, neuron.credentials.token

        def call(times: int) -> None:
            for _ in range(times):
                with contextlib.suppress(Unreachable, BadAnswer):
                    transport.call("commands", "GET", "/commands/pending", token=token, timeout=3)

        call(50)
        this = psutil.Process()
        before = (this.num_threads(), this.num_fds(), this.memory_info().rss)
        call(600)
        wait_for(lambda: this.num_fds() <= before[1] + 4 and this.num_threads() <= before[0] + 2, what="no growth")
        grown = this.memory_info().rss - before[2]
        transport.close()
        neuron.stop()

    print(f"600 connections, {sum(proxy.counts.values())} broken; {grown / 1e6:.1f} MB grown")
    # The recording federation in this process keeps every request, about 3 kB each.
    assert grown < 20_000_000
