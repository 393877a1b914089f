"""The smallest neuron, with one task of its own: python -m examples.minimal --local"""
from neuron.program import run
from neuron_client import APINeuron, NeuronConfig


def build(config: NeuronConfig) -> APINeuron:
    neuron = APINeuron(config)
    @neuron.task("greet")
    def greet(name: str) -> str:
        return f"Hello, {name}!"
    return neuron


if __name__ == "__main__":
    raise SystemExit(run(build))
