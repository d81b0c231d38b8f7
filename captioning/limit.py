"""How long a caption may be: what the T5 of the run's base sees of it."""

from functools import cached_property
from typing import TYPE_CHECKING

from lorabooth import hub
from lorabooth.captions import surely_short
from lorabooth.errors import UserError

if TYPE_CHECKING:
    from lorabooth.families.flux1 import Flux1

T5_TOKENS = 512
"""FLUX's limit, for a base whose tokenizer cannot be had now."""


class Limit:
    """Says whether a text fits. It is counted by the base's own tokenizer; where that cannot be had, by a bound that is never too low."""

    def __init__(self, model: str):
        self.model = model

    def __call__(self, text: str) -> bool:
        """Whether T5 sees all of the text."""
        return surely_short(text, self.tokens) or (self._family is not None and self._family.sees_all_of(text))

    @cached_property
    def tokens(self) -> int:
        """The length to which T5 pads a prompt, its end mark included."""
        try:
            return min(int(hub.component_config(self.model, "tokenizer_2", "tokenizer_config.json")["model_max_length"]), T5_TOKENS)
        except UserError:
            return T5_TOKENS

    @cached_property
    def _family(self) -> "Flux1 | None":
        from lorabooth.families import load_family  # imports torch, which most captions are too short to need

        try:
            family = load_family(self.model)
            family.sees_all_of("")
            return family
        except UserError:
            return None
