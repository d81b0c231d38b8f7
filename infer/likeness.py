"""How like its training photos a picture is: by DINOv2 (Oquab and others 2023, arXiv 2304.07193), or by drawing on the mini model.

DINOv2 says how alike two pictures are in general. It was not trained to tell people apart and nothing here is: FLUX.1-dev's licence forbids
biometric processing. What is computed of the photos stays in memory and ends with the process.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch import Tensor
from transformers import Dinov2Model

from infer.album import Album
from infer.spots import SMALL_MODEL_PX, face_crop
from lorabooth import hub
from lorabooth.check.limits import PEOPLE_SHARE
from lorabooth.errors import UserError
from lorabooth.mini import resemblance

DINO = "facebook/dinov2-small"
"""22 million parameters, Apache-2.0; a picture takes a quarter of a second on one thread of a CPU, and no memory of the GPU, which the transformer needs."""
DINO_FILES = ("config.json", "model.safetensors")
INPUT_PX = 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, as the model was trained."""
NEAREST = 3
"""A picture is compared with the photos most like it: a laughing one need not be like the serious photos."""


class Likeness(Protocol):
    """Scores pictures against reference photos; 1 is as like them as they are among themselves."""

    name: str

    def picture(self, image: Image.Image) -> float:
        """The score of a whole picture."""

    def face(self, crop: Image.Image) -> float:
        """The score of a square around a face."""


class DrawnLikeness:
    """For the mini model: the share of a person's attributes (hair, skin, glasses ...) that a drawing shows right."""

    name = "drawing"

    def __init__(self, photos: Sequence[Image.Image]):
        self.who = resemblance.identity(photos)

    def picture(self, image: Image.Image) -> float:
        """The score of a portrait."""
        return self.face(resemblance.portrait(image))

    def face(self, crop: Image.Image) -> float:
        """The score of the square of a portrait in a picture."""
        return round(resemblance.share_right(crop, self.who), 4)


class DinoLikeness:
    """By cosine similarity of DINOv2's summary of two pictures: of faces, where most of the photos show one, else of whole pictures."""

    name = "dinov2"

    def __init__(self, photos: Sequence[Image.Image], folder: Path | None = None):
        self.model = load_dino(folder)
        crops = [face_crop(photo) for photo in photos]
        self.of_faces = sum(crop is not None for crop in crops) >= PEOPLE_SHARE * len(photos)
        shown = [crop for crop in crops if crop is not None] if self.of_faces else list(photos)
        self.photos = self._embed(shown)
        others = self.photos @ self.photos.T
        others.fill_diagonal_(-1)
        count = min(NEAREST, len(shown) - 1)
        self.own = float(others.topk(count).values.mean()) if count else 1.0

    def picture(self, image: Image.Image) -> float:
        """The score of a whole picture, by its largest face where it has one."""
        return self.face((face_crop(image) if self.of_faces else None) or image)

    def face(self, crop: Image.Image) -> float:
        """The score of a square around a face."""
        found = (self._embed([crop]) @ self.photos.T)[0]
        return round(float(found.topk(min(NEAREST, len(found))).values.mean()) / self.own, 4)

    @torch.no_grad()
    def _embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures -> vectors [B, D] of length 1."""
        pixels = torch.stack([_pixels(image) for image in images])
        return torch.nn.functional.normalize(self.model(pixels).last_hidden_state[:, 0], dim=-1)


def likeness_for(native_px: int, album: Album) -> Likeness:
    """The measure for a model of this native size; a UserError where it cannot be had."""
    return DrawnLikeness(album.photos()) if native_px < SMALL_MODEL_PX else DinoLikeness(album.photos())


def load_dino(folder: Path | None = None) -> Dinov2Model:
    """DINOv2 from a folder, or from the hub's cache or the hub; a UserError where it is in none of them."""
    if folder is None:
        try:
            folder = hub.download(DINO, DINO_FILES)
        except UserError as error:
            raise UserError(
                f"likeness is measured with {DINO} (88 MB), and {error.message}", hint=f"connect to the internet once, or fetch it with: hf download {DINO}"
            ) from error
    if not all((folder / file).exists() for file in DINO_FILES):
        raise UserError(f"{folder} does not hold {' and '.join(DINO_FILES)}; other formats are not read")
    try:
        return Dinov2Model.from_pretrained(folder, use_safetensors=True, dtype=torch.float32).eval().requires_grad_(False)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{DINO} cannot be loaded: {(str(error).splitlines() or ['damaged'])[0]}", hint=f"fetch it again with: hf download {DINO}") from error


def _pixels(image: Image.Image) -> Tensor:
    """A picture [3, 224, 224] as DINOv2 takes it."""
    fitted = ImageOps.fit(image.convert("RGB"), (INPUT_PX, INPUT_PX), Image.Resampling.BICUBIC)
    values = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).view(INPUT_PX, INPUT_PX, 3).permute(2, 0, 1).float() / 255
    return (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)
