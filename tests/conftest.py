"""Fixtures shared by the tests: the mini model through plain diffusers, and a person's photos."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from diffusers import FluxPipeline

from lorabooth import mini


@pytest.fixture(scope="session")
def mini_pipe() -> FluxPipeline:
    """The mini model as anybody would load it, with none of our code."""
    pipe = FluxPipeline.from_pretrained(mini.FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe
