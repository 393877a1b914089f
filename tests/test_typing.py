"""Adopters who type strictly get no complaints about the neuron, and complaints about their own mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.rig.process import ROOT

ADOPTER = """
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from neuron.config import load
from neuron.program import run
from neuron_client import APINeuron, NeuronConfig, Rejected, TaskContext, degraded, logger


class Orders(APINeuron):
    def process_data(self, data: Any) -> Any:
        return len(list(data))


def build(config: NeuronConfig) -> APINeuron:
    neuron = Orders(config, executor=ThreadPoolExecutor())

    @neuron.task("reprice", timeout=60, idempotent=True, retries=2)
    def reprice(prices: dict[str, float], context: TaskContext, percent: float = 1.0) -> dict[str, float]:
        context.progress(0.5, "half")
        context.check_cancelled()
        context.logger.info("priced")
        if context.cancelled.is_set() or context.remaining() < 1:
            raise Rejected("no prices", given=len(prices))
        return {name: price * percent for name, price in prices.items()}

    @neuron.command("deploy", idempotent=True)
    def deploy(data: dict[str, Any]) -> str:
        neuron.event("deployed", version=data["version"])
        neuron.metric("deployments").add(1)
        return str(data["version"])

    @neuron.dependency("price_list", critical=True, timeout=2, every=30)
    def price_list() -> object:
        return degraded("old")

    @neuron.endpoint("POST", "/score")
    def score(order: dict[str, float]) -> float:
        with neuron.track_request():
            neuron.simple_request(True, 1.5)
        return order["price"]

    # The decorators leave a function as it is.
    priced: dict[str, float] = reprice({"tea": 1.0}, context=None)  # WRONG: a context is wanted
    shipped: str = deploy({"version": 1})
    logger.info("%s %s %s", priced, shipped, score({"price": 1.0}))
    return neuron


def by_hand() -> str:
    with APINeuron(load(assignments=["port=0"]).config) as neuron:
        return neuron.address() + neuron.neuron_id


if __name__ == "__main__":
    raise SystemExit(run(build))
"""


@pytest.mark.slow
def test_an_adopters_module_passes_mypy_strict_but_for_its_one_mistake(tmp_path: Path) -> None:
    module = tmp_path / "orders.py"
    module.write_text(ADOPTER, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml"), str(module)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )
    complaints = [line for line in done.stdout.splitlines() if ": error:" in line]
    wrong = next(number for number, line in enumerate(ADOPTER.splitlines(), start=1) if "WRONG" in line)
    assert len(complaints) == 1, done.stdout
    assert f"orders.py:{wrong}: error: Argument \"context\"" in complaints[0]
