"""What a check found, with the verdict on top, as lines for a terminal and as JSON."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from lorabooth.check import faces, limits
from lorabooth.check.findings import KINDS, Finding
from lorabooth.check.photo_rules import Checked

Verdict = Literal["ready", "usable", "not yet"]
NAMED = 5
"""Photos of one kind of finding that are listed in the terminal."""
WORST = 3
"""Findings that `lorabooth train` says."""


@dataclass(frozen=True, eq=False)
class Report:
    """The photos of a set, all findings and the notes of taking them in."""

    photos: tuple[Checked, ...]
    findings: tuple[Finding, ...]
    """In the order of the table of kinds."""
    notes: tuple[str, ...]

    @cached_property
    def judgement(self) -> tuple[Verdict, str]:
        """The verdict and its reason. A photo is good if no warning is about it alone; hints do not count.

        not yet: fewer than 4 good photos, or fewer good than others. ready: at least 10 good photos, four fifths of all,
        and no warning about the set. usable: what is between.
        """
        total, good = len(self.photos), len(self.photos) - len(self.flawed)
        counted = f"{good} of {total} photos {'is' if good == 1 else 'are'} good"
        about_set = [finding.kind.title for finding in self.findings if finding.kind.weight == "warning" and len(finding.files) != 1]
        if good < limits.NEEDED:
            return "not yet", f"{counted}; at least {limits.NEEDED} are needed, {limits.ENOUGH} or more work well"
        if good < total - good:
            return "not yet", f"{counted}; leave the others out or replace them"
        if good < limits.ENOUGH:
            return "usable", f"{counted}; {limits.ENOUGH} or more work well"
        if good < limits.GOOD_SHARE * total:
            return "usable", f"{counted}; without the others it is ready"
        return ("usable", f"{counted}, but: {', '.join(about_set)}") if about_set else ("ready", counted)

    @cached_property
    def flawed(self) -> frozenset[str]:
        """Files of the photos that a warning is about."""
        return frozenset(finding.files[0] for finding in self.findings if finding.kind.weight == "warning" and len(finding.files) == 1)

    def of(self, checked: Checked) -> list[Finding]:
        """The findings about this photo alone."""
        return [finding for finding in self.findings if finding.files == (checked.photo.file,)]

    def counts(self) -> dict[str, int]:
        """How many photos there are of which sort."""
        return {
            "photos": len(self.photos),
            "good": len(self.photos) - len(self.flawed),
            "left_out": sum(finding.code in ("left_out", "duplicate") for finding in self.findings),
            "with_caption": sum(bool(checked.caption) for checked in self.photos),
            "with_mask": sum(checked.photo.mask_sha256 is not None for checked in self.photos),
            "with_face": sum(bool(checked.measures.faces) for checked in self.photos),
        }

    def summary(self) -> str:
        """The counts in a sentence."""
        counts = self.counts()
        parts = [_count(counts["photos"], "photo"), f"{counts['left_out']} left out", f"{counts['with_caption']} with a caption"]
        parts += [f"{counts['with_mask']} with a mask"] if counts["with_mask"] else []
        return ", ".join([*parts, f"{counts['with_face']} with a face" if self.faces_counted else "faces not counted"])

    @property
    def faces_counted(self) -> bool:
        """Whether there is a face detector."""
        return self.photos[0].measures.faces is not None

    def to_json(self) -> dict[str, Any]:
        """All of it in plain JSON types; figures with the units of docs/photos.md."""
        verdict, reason = self.judgement
        return {
            "verdict": verdict,
            "reason": reason,
            "counts": self.counts(),
            "faces_counted": self.faces_counted,
            "findings": [asdict(finding) | asdict(finding.kind) for finding in self.findings],
            "photos": [
                {name: asdict(checked.photo)[name] for name in ("file", "original", "width_px", "height_px")}
                | {"caption": checked.caption, "good": checked.photo.file not in self.flawed}
                | checked.measures.figures()
                for checked in self.photos
            ],
            "notes": self.notes,
        }

    def lines(self) -> Iterator[str]:
        """The report for a person: the verdict, then each kind of finding with its photos and the advice."""
        yield "{}: {}".format(*self.judgement)
        yield self.summary()
        for weight in ("warning", "hint"):
            for code, kind in KINDS.items():
                found = [finding for finding in self.findings if finding.code == code]
                if found and kind.weight == weight:
                    yield f"\n{weight}: {kind.title}"
                    yield from (f"  {line(finding)}" for finding in found[:NAMED])
                    if len(found) > NAMED:
                        yield f"  and {len(found) - NAMED} more"
                    yield f"  -> {kind.advice}"
        notes = [*self.notes, *([] if self.faces_counted else [faces.MISSING])]
        yield from ([""] if notes else [])
        yield from (f"note: {note}" for note in notes)

    def worst(self) -> list[str]:
        """A line for each of the few kinds of warning that most photos have; hints where there is no warning."""
        for weight in ("warning", "hint"):
            found = {code: [finding for finding in self.findings if finding.code == code] for code, kind in KINDS.items() if kind.weight == weight}
            kinds = sorted((findings for findings in found.values() if findings), key=len, reverse=True)
            if kinds:
                return [f"{findings[0].kind.title}: {line(findings[0])}" + _more(len(findings) - 1) for findings in kinds[:WORST]]
        return []


def line(finding: Finding) -> str:
    """A finding in one line: the photos, if it is not about the whole set, and the reason."""
    names = ", ".join(finding.names[:NAMED]) + _more(len(finding.names) - NAMED)
    return f"{names}: {finding.reason}" if names else finding.reason


def _more(number: int) -> str:
    return f", and {number} more" if number > 0 else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")
