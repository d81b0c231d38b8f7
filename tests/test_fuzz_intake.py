"""A slice of the fuzz of the intake, and that the fuzz would see what it is there to see."""

from pathlib import Path

import pytest

from lorabooth.decoder import MEMORY_BYTES_LIMIT
from lorabooth.decoding import decode
from lorabooth.errors import UserError
from lorabooth.photos import ingest
from scripts import fuzz_intake
from scripts.fuzz_intake import Outcome, fuzz, peaks_bytes
from scripts.fuzz_mutants import archives, mutants, pictures

COUNT, SEED = 400, 1


def test_mutated_archives_and_pictures_are_taken_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    outcome = fuzz(COUNT, SEED, tmp_path / "work")
    with capsys.disabled():
        print(f"\nfuzz: {COUNT} mutated archives and pictures, seed {SEED}, {len(outcome.faults)} faults")
    assert outcome.faults == []
    assert sum(outcome.counts.values()) == COUNT
    # Neither all whole nor all broken: both ways through the intake are walked.
    assert outcome.counts["archive taken"] > COUNT // 20 and outcome.counts["picture taken"] > COUNT // 20
    assert outcome.counts["archive refused: damaged or cut off"] > COUNT // 20
    assert peaks_bytes()[1] < MEMORY_BYTES_LIMIT


def test_what_is_mutated_is_whole_before(tmp_path: Path):
    for name, data in pictures().items():
        assert decode(name, data).image.mode == "RGB", name
    for name, data in archives().items():
        (tmp_path / name).write_bytes(data)
        manifest = ingest(tmp_path / name, tmp_path / f"{name}.run")
        assert [photo.original[:9] for photo in manifest.photos] == ["../b.jpg", "c.gif", "me/ä.png", "…nnnnnnnn"], name
        assert [photo.caption for photo in manifest.photos if photo.caption] == ["[trigger] smiles"], name


def test_a_case_is_the_same_whatever_the_count():
    few, many = (mutants("archive", archives(), range(number), 5) for number in (3, 10))
    assert few.items() <= many.items()
    assert few != mutants("archive", archives(), range(3), 6)


def fuzzed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad_ingest: object) -> Outcome:
    monkeypatch.setattr(fuzz_intake, "ingest", bad_ingest)
    return fuzz(2, SEED, tmp_path / "work")


def test_the_fuzz_sees_what_goes_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def writes_outside(source: Path, folder: Path, **options: object) -> object:
        (folder.parent / "beside" / source.name).write_text("x")
        return ingest(source, folder, **options)

    def leaves_something(source: Path, folder: Path, **options: object) -> object:
        (folder / "photos").mkdir(parents=True)
        raise UserError("no", hint="none")

    def no_hint(source: Path, folder: Path, **options: object) -> object:
        raise UserError("no")

    def traceback(source: Path, folder: Path, **options: object) -> object:
        raise KeyError(source)

    for number, (bad, words) in enumerate([(writes_outside, "written outside the run"), (leaves_something, "behind"), (no_hint, "not one sentence")]):
        assert any(words in fault for fault in fuzzed(tmp_path / str(number), monkeypatch, bad).faults)
    with pytest.raises(KeyError):
        fuzzed(tmp_path / "last", monkeypatch, traceback)
