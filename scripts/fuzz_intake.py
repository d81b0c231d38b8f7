"""`python -m scripts.fuzz_intake --count 10000 --seed 1`: mutated archives and pictures through the intake.

Each is taken, or refused in a sentence: no traceback, no file outside the run, memory within bounds. Half are archives
(zip, tar, packed tars), half pictures of every format. Case 17 of a seed is the same whatever the count.
"""

import argparse
import re
import resource
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from lorabooth.decoder import MEMORY_BYTES_LIMIT, Decoder
from lorabooth.decoding import LONG_SIDE_PX
from lorabooth.errors import UserError
from lorabooth.photos import Manifest, ingest
from scripts.fuzz_mutants import archives, mutants, pictures

BATCH = 25
"""Mutated pictures in one folder."""
PARENT_BYTES_LIMIT = 1 << 30

# What a refusal of an archive says, to count by.
REFUSALS = (
    "damaged or cut off",
    "not a zip or a tar",
    "is encrypted",
    "other than deflate",
    "no photo that can be used",
    "is empty",
    "times its size",
    "the limit",
)


@dataclass
class Outcome:
    """What became of the mutants, and what should not have happened."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For a person to read."""
        return [f"{number:7,}  {what}" for what, number in sorted(self.counts.items())] + [f"FAULT: {fault}" for fault in self.faults]


def fuzz(count: int, seed: int, work: Path) -> Outcome:
    """Put `count` mutants through the intake, in the empty folder `work`."""
    outcome, place = Outcome(), work / "runs" / "run"
    (work / "runs" / "beside").mkdir(parents=True)
    with Decoder() as decoder, tqdm(total=count, unit="file", desc=f"fuzz, seed {seed}") as bar:
        for number in range(0, count // 2, BATCH):
            batch = mutants("picture", pictures(), range(number, min(number + BATCH, count // 2)), seed)
            _feed_folder(batch, work, place, decoder, outcome)
            bar.update(len(batch))
        for name, data in mutants("archive", archives(), range(count - count // 2), seed).items():
            _feed_archive(name, data, work, place, decoder, outcome)
            bar.update()
    return outcome


def _feed_folder(batch: dict[str, bytes], work: Path, place: Path, decoder: Decoder, outcome: Outcome) -> None:
    """A folder of mutated pictures and a good one: each is among the photos, or named with a reason."""
    source = work / "photos"
    source.mkdir()
    for name, data in batch.items():
        (source / name).write_bytes(data)
    Image.new("RGB", (8, 8)).save(source / "good.png")
    manifest = _ingest(source, work, place, decoder, outcome)
    shutil.rmtree(source)
    if not isinstance(manifest, Manifest):
        outcome.faults.append(f"{source} of {next(iter(batch))} was refused: {manifest}")
        return
    taken = {photo.original for photo in manifest.photos}
    reasons = {note.split(" ", 1)[0]: note.split(" ", 1)[1] for note in manifest.notes if note.endswith(": left out")}
    for name in batch:
        if name not in taken and name not in reasons:
            outcome.faults.append(f"{name} was neither taken nor named")
        why = "taken" if name in taken else re.sub(r"same picture as .*:", "same picture as another:", reasons.get(name, "lost"))
        outcome.counts[f"picture {why}"] += 1
        if "its decoder failed" in why:
            outcome.faults.append(f"{name}: {why}")


def _feed_archive(name: str, data: bytes, work: Path, place: Path, decoder: Decoder, outcome: Outcome) -> None:
    source = work / name
    source.write_bytes(data)
    manifest = _ingest(source, work, place, decoder, outcome)
    source.unlink()
    if isinstance(manifest, Manifest):
        outcome.counts["archive taken"] += 1
        return
    known = next((words for words in REFUSALS if words in manifest), None)
    outcome.counts[f"archive refused: {known or manifest}"] += 1


def _ingest(source: Path, work: Path, place: Path, decoder: Decoder, outcome: Outcome) -> Manifest | str:
    """The manifest, or what the refusal says. Looks at what was written, and removes it. A traceback is let through: it ends the fuzz."""
    before = _listing(work)
    try:
        manifest: Manifest | str = ingest(source, place, decoder=decoder)
    except UserError as error:
        manifest = error.message
        if "\n" in manifest or not error.hint:
            outcome.faults.append(f"{source.name}: a refusal that is not one sentence with a hint: {error}")
    except BaseException:
        print(f"\n{source.name} of this seed is at fault", file=sys.stderr)
        raise
    if isinstance(manifest, Manifest):
        if Manifest.load(place) != manifest:
            outcome.faults.append(f"{source.name}: the manifest is read back differently")
        for photo in manifest.photos:
            with Image.open(place / "photos" / photo.file) as image:
                if image.mode != "RGB" or max(image.size) > LONG_SIDE_PX or image.size != (photo.width_px, photo.height_px):
                    outcome.faults.append(f"{source.name}: {photo.file} is {image.mode}, {image.size}")
    elif place.exists() and list(place.iterdir()):
        outcome.faults.append(f"{source.name}: a refusal left {list(place.iterdir())} behind")
    shutil.rmtree(place, ignore_errors=True)
    if _listing(work) != before:
        outcome.faults.append(f"{source.name}: written outside the run: {_listing(work) ^ before}")
    return manifest


def _listing(work: Path) -> set[tuple[str, int]]:
    """Names and times of all there is beside the run."""
    return {(str(path), path.stat().st_mtime_ns) for path in work.rglob("*") if path.name != "runs"}


def peaks_bytes() -> tuple[int, int]:
    """The most memory that this process had, and the largest of the decoders it has ended."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10


def main() -> int:
    """Fuzz, and print what became of it; exit code 1 where something went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=10_000, help="mutants [default: 10000]")
    parser.add_argument("--seed", type=int, default=1, help="seed of the mutations [default: 1]")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = fuzz(chosen.count, chosen.seed, Path(folder) / "work")
    here, there = peaks_bytes()
    if here > PARENT_BYTES_LIMIT or there > MEMORY_BYTES_LIMIT:
        outcome.faults.append("memory went over its bound")
    print("\n".join(outcome.lines()))
    print(f"count {chosen.count}, seed {chosen.seed}; peak memory {here >> 20} MiB, of the decoder {there >> 20} MiB; {len(outcome.faults)} faults")
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
