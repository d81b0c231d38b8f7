"""A caption without a model: the same sentence for every photo."""

from pathlib import Path


class TemplateCaptioner:
    """Says what is in the picture by one word. Enough where all photos show one subject; backgrounds are then learned with it."""

    name = "template"

    def __init__(self, class_word: str = "person"):
        self.class_word = class_word

    def caption(self, images: list[Path]) -> list[str]:
        """One caption for each image file; the files are not opened."""
        return [f"a photo of [trigger], a {self.class_word}"] * len(images)
