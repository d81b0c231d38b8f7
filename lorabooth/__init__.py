"""lorabooth: train a FLUX LoRA of a person on your own GPU, and make portraits with it."""

__version__ = "0.1.0"
