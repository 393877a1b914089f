"""A neuron whose tasks run on a Dask cluster. Three terminals, each in the project's directory:

    dask scheduler --host 127.0.0.1
    dask worker tcp://127.0.0.1:8786
    python -m examples.dask_neuron --local

    run_task {"task": "count_primes", "params": {"start": 0, "stop": 100000}}
"""

from __future__ import annotations

from dataclasses import replace

from neuron.program import run
from neuron_client import APINeuron, NeuronConfig, Rejected, TaskContext


def is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


# Idempotent: if its worker dies, it runs once more on another.
def count_primes(start: int, stop: int, context: TaskContext) -> dict[str, int]:
    if not 0 <= start <= stop:
        raise Rejected("0 <= start <= stop is wanted")
    primes = 0
    for number in range(start, stop):
        if number % 1000 == 0:
            context.check_cancelled()
            context.progress((number - start) / (stop - start), f"at {number}")
        primes += is_prime(number)
    return {"primes": primes}


def build(config: NeuronConfig) -> APINeuron:
    if config.executor == "threads":
        config = replace(config, executor="dask://127.0.0.1:8786")
    neuron = APINeuron(config)
    neuron.task("count_primes", idempotent=True, timeout=3600)(count_primes)
    return neuron


if __name__ == "__main__":
    raise SystemExit(run(build))
