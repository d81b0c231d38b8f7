"""A caption without a model: the same sentence for every photo."""

from pathlib import Path


class TemplateCaptioner:
    """Says what is in the picture by one phrase. Enough where all photos show one subject; backgrounds are then learned with it."""

    name = "the template"
    key = ""
    opening = ""

    def __init__(self, text: str = "a photo of [trigger], a person"):
        self.text = text

    def caption(self, images: list[Path]) -> list[str]:
        """One caption for each image file; the files are not opened."""
        return [self.text] * len(images)
