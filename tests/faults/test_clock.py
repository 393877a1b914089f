"""F21: the wall clock leaps; intervals, deliveries and the day do not."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import time_machine

from neuron import commands
from neuron_client import APINeuron
from tests.rig.process import wait_for
from tests.rig.recording import Fault, RecordingFederation

DAY = 86_400.0


def started(oracle: RecordingFederation, make_neuron: Callable[..., APINeuron]) -> APINeuron:
    neuron = make_neuron(federation_url=oracle.url, host="", heartbeat_interval=0.2)
    assert neuron.start()
    wait_for(neuron.registered.is_set)
    return neuron


@pytest.mark.parametrize(
    "leap", [400 * DAY, -400 * DAY, 7200.0, -7200.0], ids=["400 days on", "400 days back", "2 h on", "2 h back"]
)
def test_a_leap_of_the_clock_changes_neither_pace_nor_credentials(
    leap: float, oracle: RecordingFederation, make_neuron: Callable[..., APINeuron]
) -> None:
    neuron = started(oracle, make_neuron)
    wait_for(lambda: len(oracle.of("heartbeat")) >= 3)
    with time_machine.travel(time.time() + leap, tick=True):
        # The federation's own clock is right, and ours is not.
        oracle.clock_offset = -leap
        registrations, beats, began = len(oracle.of("register")), len(oracle.of("heartbeat")), time.monotonic()
        wait_for(lambda: len(oracle.of("heartbeat")) >= beats + 8)
        seconds = time.monotonic() - began
        command = oracle.issue(neuron.neuron_id, "health_check")
        wait_for(lambda: oracle.command(command)["status"] == "completed")
        neuron.stop()

    assert 8 * 0.2 * 0.8 < seconds < 8 * 0.2 * 2
    assert len(oracle.of("register")) == registrations
    assert oracle.analytics_regressions() == []


def test_a_stored_token_is_tried_though_our_clock_says_it_has_expired(
    oracle: RecordingFederation, make_neuron: Callable[..., APINeuron]
) -> None:
    """A machine without a battery for its clock, at its first start of the day."""
    first = started(oracle, make_neuron)
    first.stop()
    with time_machine.travel(time.time() + 400 * DAY, tick=True):
        oracle.clock_offset = -400 * DAY
        second = started(oracle, make_neuron)
        beats = len(oracle.of("heartbeat"))
        wait_for(lambda: len(oracle.of("heartbeat")) > beats + 2)
        second.stop()

    assert len(oracle.of("register")) == 1
    assert second.neuron_id == first.neuron_id


def test_a_clock_set_back_delays_no_delivery_that_was_put_off(
    oracle: RecordingFederation, make_neuron: Callable[..., APINeuron], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "jittered", lambda attempt, floor: 30.0)
    neuron = started(oracle, make_neuron)
    oracle.script("complete", [Fault(500)])
    command = oracle.issue(neuron.neuron_id, "health_check")
    wait_for(
        lambda: [entry.deliveries for entry in neuron.journal.undelivered(10)] == [1], what="a delivery that is put off"
    )
    with time_machine.travel(time.time() - 7200, tick=True):
        wait_for(lambda: oracle.command(command)["status"] == "completed", what="its delivery")
        neuron.stop()


def test_over_midnight_the_day_ends_with_all_it_had_and_the_next_begins_at_zero(
    make_neuron: Callable[..., APINeuron],
) -> None:
    midnight = (int(time.time()) // 86_400 + 1) * DAY
    with time_machine.travel(midnight - 30, tick=True) as traveller, RecordingFederation(analytics="accept") as oracle:
        neuron = make_neuron(federation_url=oracle.url, host="", analytics_interval=0.2)
        assert neuron.start()
        wait_for(neuron.registered.is_set)
        for _ in range(7):
            neuron.simple_request(True, 10)
        days = (oracle.store.today(), time.strftime("%Y-%m-%d", time.gmtime(midnight)))
        wait_for(lambda: any(one.body["requestCount"] == 7 for one in oracle.of("analytics")), what="a report of seven")
        traveller.shift(timedelta(seconds=31))
        # An answer on its way during the leap carries the old time; the next one corrects it.
        wait_for(lambda: any(one.body["date"] == days[1] for one in oracle.of("analytics")), what="the new day")
        # An answer that was under way during the leap tells the old time once more.
        wait_for(lambda: neuron.statistics.snapshot().day == days[1], what="midnight")
        for _ in range(3):
            neuron.simple_request(True, 10)
        wait_for(
            lambda: {one.body["date"]: one.body["requestCount"] for one in oracle.of("analytics")}.get(days[1]) == 3,
            what="the new day's report",
        )
        neuron.stop()
        last = {one.body["date"]: one.body["requestCount"] for one in oracle.of("analytics")}

        assert last == {days[0]: 7, days[1]: 3}
        assert oracle.analytics_regressions() == []
