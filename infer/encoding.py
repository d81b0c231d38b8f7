"""Prompts -> conditioning, remembered; the text encoders are on the GPU, in host memory or on the disk, as the plan says."""

import gc
import math
from collections import OrderedDict

import torch

from infer.live import LiveWeights, Weighted
from lorabooth.families.flux1 import Conditioning, Flux1, TextEncoders

REMEMBERED = 256
"""Prompts; 4 MB each for FLUX.1-dev."""
FREE = {"gpu": math.inf, "host": 0.0, "disk": None}
"""What is free for T5, for the choice of whether its blocks come from host memory one by one; None: what the GPU says."""


class PromptEncoder:
    """Both text encoders of a base and the prompts that they have read. place: `ServingPlan.encoders`."""

    def __init__(self, family: Flux1, device: torch.device, dtype: torch.dtype, place: str):
        self.family, self.device, self.dtype, self.place = family, device, dtype, place
        self._encoders: TextEncoders | None = None
        self._clip: LiveWeights | None = None
        self._known: OrderedDict[tuple[str, tuple[Weighted, ...]], Conditioning] = OrderedDict()

    def encode(self, prompt: str, loras: tuple[Weighted, ...] = ()) -> Conditioning:
        """A prompt as the encoders read it, with LoRAs on CLIP."""
        key = prompt, loras
        if key not in self._known:
            encoders, clip = self._loaded()
            clip.apply(loras)
            try:
                found = self.family.encode_prompts(encoders, [prompt])
            finally:
                clip.apply(())
            self._known[key] = Conditioning(found.embeds.cpu(), found.pooled.cpu())
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def release(self) -> None:
        """Let go of encoders that do not stay between prompts; after all prompts of a request were read."""
        if self.place != "disk" or self._encoders is None:
            return
        self._encoders = self._clip = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _loaded(self) -> tuple[TextEncoders, LiveWeights]:
        if self._encoders is None:
            self._encoders = self.family.text_encoders(self.device, self.dtype, FREE[self.place])
            self._clip = LiveWeights(self._encoders.text_encoder, self.device)
        assert self._clip is not None
        return self._encoders, self._clip
