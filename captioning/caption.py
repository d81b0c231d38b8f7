"""Stage: photos -> RUN/captions/00001.txt. Supplied captions are kept byte for byte; generated ones get trigger, prefix and suffix here, in code.

A model that writes captions forgets the trigger now and then, and a caption without it teaches nothing about the person.
"""

from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from captioning.choose import Captioner, captioners
from captioning.cleaning import clean
from captioning.limit import Limit
from captioning.memory import Memory
from captioning.styles import prompt_of
from captioning.template import TemplateCaptioner
from lorabooth.captions import enforce, has_trigger, joined
from lorabooth.config import TrainConfig
from lorabooth.errors import UserError
from lorabooth.photos import Manifest, Photo
from lorabooth.runs import RunDir, write_durable

BATCH_PHOTOS = 8
"""Photos captioned together; a kill loses at most these."""


def run(folder: Path, captioner: Captioner | None = None) -> list[str]:
    """Write the captions that the run in `folder` lacks, whole files only; returns notes for the user. Raises UserError.

    captioner: what writes them, in place of those that the recipe asks for.
    """
    run_dir = RunDir.open(folder)
    with run_dir.locked():
        missing = [photo for photo in Manifest.load(folder).photos if not _file(run_dir, photo).exists()]
        notes = _write_supplied(run_dir, [photo for photo in missing if photo.caption is not None])
        bare = [photo for photo in missing if photo.caption is None]
        if not run_dir.config.autocaption:
            for photo in bare:
                _write(run_dir, photo, run_dir.config.trigger_word)
        elif bare:
            notes += Writing(run_dir, captioner).write(bare)
        return notes


def _write_supplied(run_dir: RunDir, photos: list[Photo]) -> list[str]:
    """The files as they came. Encoding puts the trigger before those that lack it."""
    for photo in photos:
        _write(run_dir, photo, photo.caption or "")
    trigger = run_dir.config.trigger_word
    without = sum(not has_trigger(photo.caption or "", trigger) for photo in photos)
    return [f"{without} of {len(photos)} supplied captions lack {trigger}: training puts it before them, the files stay as they are"] if without else []


class Writing:
    """Writes generated captions, by the first captioner that can."""

    def __init__(self, run_dir: RunDir, captioner: Captioner | None):
        config = run_dir.config
        self.run_dir = run_dir
        self.chain: list[Captioner] = [captioner] if captioner else captioners(config)
        self.template = TemplateCaptioner(prompt_of(config).template)
        self.memory = Memory()
        self.enforce = rules(config)
        self.unusable: dict[str, int] = {}
        """Captioner -> photos of which it said nothing that a caption can be made of."""

    def write(self, photos: list[Photo]) -> list[str]:
        """Caption the photos; returns notes."""
        notes = []
        for i, captioner in enumerate(self.chain):
            left = [photo for photo in photos if not _file(self.run_dir, photo).exists()]
            try:
                self._write_all(left, captioner)
            except UserError as error:
                if captioner is self.chain[-1]:
                    raise
                notes.append(f"{captioner.name} cannot write captions: {error.message}; {self.chain[i + 1].name} does it instead")
                continue
            if isinstance(captioner, TemplateCaptioner):
                notes.append(self._about_template(len(left)))
            break
        return notes + [f"{name} found no words for {count} of {len(photos)} photos: the template stands in" for name, count in self.unusable.items()]

    def _about_template(self, count: int) -> str:
        says = self.enforce(self.template.text)
        what = f"{count} caption{'s are' if count > 1 else ' is'} the template, '{says}'"
        return f"{what}: it does not say what is in the photo; write your own, or give --caption-model"

    def _write_all(self, photos: list[Photo], captioner: Captioner) -> None:
        if isinstance(captioner, TemplateCaptioner):  # at once: no bar, and nothing to remember
            for photo in photos:
                self._write_one(photo, captioner, captioner.text)
            return
        key = captioner.key
        known = {photo.file: text for photo in photos if key and (text := self.memory.get(photo.sha256, key)) is not None}
        with tqdm(total=len(photos), desc="caption photos", unit="photo") as bar:
            for photo in photos:
                if photo.file in known:
                    self._write_one(photo, captioner, known[photo.file])
                    bar.update()
            new = [photo for photo in photos if photo.file not in known]
            for start in range(0, len(new), BATCH_PHOTOS):
                batch = new[start : start + BATCH_PHOTOS]
                texts = captioner.caption([self.run_dir.photos / photo.file for photo in batch])
                for photo, text in zip(batch, texts, strict=True):
                    if key:
                        self.memory.put(photo.sha256, key, text)
                    self._write_one(photo, captioner, text)
                bar.update(len(batch))

    def _write_one(self, photo: Photo, captioner: Captioner, text: str) -> None:
        words = clean(text)
        if not words:
            self.unusable[captioner.name] = self.unusable.get(captioner.name, 0) + 1
        whole = self.template.text if not words else sentence(captioner.opening, words)
        _write(self.run_dir, photo, self.enforce(whole))


def rules(config: TrainConfig) -> Callable[[str], str]:
    """What makes a caption of any text: trigger, prefix and suffix are in it, and T5 sees all of it. A UserError where prefix and suffix alone are too long."""
    fits = Limit(config.model)

    def enforced(text: str) -> str:
        return enforce(text, config.trigger_word, config.autocaption_prefix, config.autocaption_suffix, fits)

    if not fits(config.trigger_word):
        raise UserError(f"the trigger word is too long: the text encoder sees {fits.tokens} tokens", hint="take a short one, such as TOK")
    if not fits(enforced("")):
        raise UserError(
            f"autocaption_prefix and autocaption_suffix leave no room for a caption: the text encoder sees {fits.tokens} tokens",
            hint="shorten them; a hundred tokens are about 70 words",
        )
    return enforced


def sentence(opening: str, words: str) -> str:
    """The opening and how it goes on; a new sentence where it does not go on but starts anew."""
    anew = opening[-1:].isalnum() or opening.endswith("]")
    return joined(opening, f". {words}" if anew and words[0].isupper() else words)


def _file(run_dir: RunDir, photo: Photo) -> Path:
    return run_dir.captions / f"{Path(photo.file).stem}.txt"


def _write(run_dir: RunDir, photo: Photo, text: str) -> None:
    write_durable(_file(run_dir, photo), text.encode())
