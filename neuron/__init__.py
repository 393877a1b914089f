"""What a neuron stands on. Adopters copy this package unchanged and edit `neuron_client.py`."""

__version__ = "1.0.0"
