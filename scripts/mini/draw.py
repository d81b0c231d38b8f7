"""Stage 1: draw the people the mini model learns from. One chunk a file, so that an interrupted run goes on."""

import json
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lorabooth.mini import world

CHUNK = 1000
CHUNKS = {(128, 128): 24, (112, 144): 4, (144, 112): 4, (96, 160): 2, (160, 96): 2}
"""Chunks of drawings a size (width, height) in px: mostly square, the other formats seldom."""


def chunk_files(folder: Path, size: tuple[int, int], index: int) -> tuple[Path, Path]:
    """Paths of a chunk: pictures (.npy, uint8 [CHUNK, height, width, 3]) and people (.json)."""
    stem = f"{size[0]}x{size[1]}-{index:03d}"
    return folder / f"{stem}.npy", folder / f"{stem}.json"


def draw_chunk(folder: Path, size: tuple[int, int], index: int, seed: int) -> None:
    """Draw one chunk; the file appears whole or not at all."""
    pictures_file, people_file = chunk_files(folder, size, index)
    rng = random.Random(f"{seed}/{size}/{index}")
    people = [world.sample_person(rng) for _ in range(CHUNK)]
    people_file.write_text(json.dumps(people))
    pictures = np.stack([np.asarray(world.draw(person, *size)) for person in people])
    part = pictures_file.with_suffix(".part")
    with part.open("wb") as file:
        np.save(file, pictures)
    part.replace(pictures_file)


def draw_all(folder: Path, seed: int, chunks: dict[tuple[int, int], int] = CHUNKS) -> None:
    """Draw every missing chunk on all cores."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [(size, i) for size, n in chunks.items() for i in range(n) if not chunk_files(folder, size, i)[0].exists()]
    with ProcessPoolExecutor() as pool:
        futures = [pool.submit(draw_chunk, folder, size, i, seed) for size, i in missing]
        for future in tqdm(futures, desc="draw", unit="k pictures"):
            future.result()


def load(folder: Path, size: tuple[int, int], most: int | None = None) -> tuple[np.ndarray, list[world.Person]]:
    """All drawings of a size (uint8 [N, height, width, 3]) and their people, the first `most` chunks."""
    files = sorted(folder.glob(f"{size[0]}x{size[1]}-*.npy"))[:most]
    people = [person for file in files for person in json.loads(file.with_suffix(".json").read_text())]
    return np.concatenate([np.load(file) for file in files]), people


def importance(size: tuple[int, int], people: int = 40) -> np.ndarray:
    """Weight of each pixel in a loss: float32 [height, width], mean 1.

    Half of it is even; the other half is shared out equally among the attributes, each on the pixels that change with
    it. Eyes and mouth decide as much of a likeness as the background, on a hundredth of its area.
    """
    rng = random.Random("importance")
    maps = {attribute: np.zeros((size[1], size[0])) for attribute in world.ATTRIBUTES}
    for _ in range(people):
        person = world.sample_person(rng)
        drawing = np.asarray(world.draw(person, *size), dtype=float)
        for attribute in maps:
            other = person | {attribute: rng.choice(world.values(attribute, held_out=False))}
            maps[attribute] += np.abs(np.asarray(world.draw(other, *size), dtype=float) - drawing).mean(2)
    return (0.5 + 0.5 * np.mean([m / m.mean() for m in maps.values()], axis=0)).astype(np.float32)
