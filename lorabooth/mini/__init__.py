"""The mini model: a real FLUX pipeline of a few million parameters, and the drawn world it was trained on."""

from pathlib import Path

FOLDER = Path(__file__).parent / "model"
MAX_SEQUENCE_LENGTH = 48
"""T5 tokens the mini model was trained with. FLUX has no text mask, so the padding is part of the prompt."""
