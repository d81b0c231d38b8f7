"""Likeness and prompt-following on the mini model, against the truth: the drawing program knows the right picture."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from lorabooth.mini import world

Scores = dict[str, float]
"""Share of pictures with an attribute right, by attribute; 'all' is the share with every visible attribute right."""


def score(pictures: Sequence[Image.Image], truths: Sequence[world.Person]) -> Scores:
    """Read each picture off (`world.read_off`) and compare with its truth; what a drawing cannot show is left out."""
    # One process: a pool needs shared semaphores, which a user without rights lacks in some containers (no writable /dev/shm).
    shown = [world.read_off(picture, truth) for picture, truth in zip(pictures, truths, strict=True)]
    right = {a: [s[a] == t[a] for s, t in zip(shown, truths, strict=True) if a in s] for a in world.ATTRIBUTES}
    whole = [all(s[a] == t[a] for a in s) for s, t in zip(shown, truths, strict=True)]
    return {a: round(float(np.mean(r)), 4) for a, r in right.items() if r} | {"all": round(float(np.mean(whole)), 4)}


def mean(scores: Scores, attributes: Sequence[str]) -> float:
    """Mean share over those of the attributes that were measured."""
    return float(np.mean([scores[a] for a in attributes if a in scores]))
