"""Whether two LoRAs are the same function, whatever their formats, and if not, where they differ."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from infer.convert import layouts
from infer.loras import LoraChoice
from infer.table import cut, table
from lorabooth import keys
from lorabooth.comparison import LayerDifference, compared, cosine, overall
from lorabooth.conversion import DTYPES, TOLERANCE, merged
from lorabooth.layout import ClipLayout, Layout
from lorabooth.lora_file import LoraFile
from lorabooth.lowrank import Additions, additions

ROUNDING = {"F64": TOLERANCE[DTYPES["fp32"]], "F32": TOLERANCE[DTYPES["fp32"]], "F16": TOLERANCE[DTYPES["fp16"]], "BF16": TOLERANCE[DTYPES["bf16"]]}
COARSE_ROUNDING = 0.25
"""Of numbers of eight bits."""
METADATA_SHOWN, METADATA_CHARACTERS = 20, 48
NAMED = 5


@dataclass(frozen=True)
class Difference:
    """Two LoRAs side by side. tolerance: up to which difference of a layer they are the same, but for rounding."""

    layers: list[LayerDifference]
    tolerance: float
    metadata: dict[str, tuple[str | None, str | None]]
    left_out: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def same(self) -> bool:
        """Whether they do the same."""
        return all(layer.worst <= self.tolerance for layer in self.layers)

    @property
    def both(self) -> list[LayerDifference]:
        """The layers that both have, those that differ most first."""
        return sorted((layer for layer in self.layers if layer.in_first and layer.in_second), key=lambda layer: -layer.worst)

    def only(self, first: bool) -> list[str]:
        """The names of the layers that only one has."""
        return [layer.name for layer in self.layers if layer.in_first == first and layer.in_second != first]


def between(a: LoraChoice, b: LoraChoice) -> Difference:
    """Compare two files, each by its weight; a UserError where they are not of the same base."""
    layout, clip, model = layouts(a.file if a.file.metadata.get("lorabooth.base") else b.file)
    first, second = (_read(choice, layout, clip, model) for choice in (a, b))
    tolerance = max(_rounding(a.file), _rounding(b.file))
    names = sorted(a.file.metadata.keys() | b.file.metadata.keys())
    both = {name: (a.file.metadata.get(name), b.file.metadata.get(name)) for name in names}
    changed = {name: texts for name, texts in both.items() if texts[0] != texts[1]}
    return Difference(compared(first, second), tolerance, changed, (first.left_out, second.left_out))


def described(choices: tuple[LoraChoice, LoraChoice], found: Difference, top: int) -> str:
    """What was found, for people."""
    lines = [
        f"{side}  {cut(choice.file.name)}: {keys.format_of(choice.file.shapes)}, {_number_format(choice.file)}"
        for side, choice in zip("AB", choices, strict=True)
    ]
    both = found.both
    lines.append(f"{len(both)} layers in both")
    for side, names in (("A", found.only(True)), ("B", found.only(False))):
        if names:
            lines.append(f"{len(names)} only in {side}: {_listed(names)}")
    for side, left in zip("AB", found.left_out, strict=True):
        if left:
            lines.append(f"not compared, for they fit no layer of the base: {len(left)} tensors of {side}: {_listed(list(left))}")
    angle = cosine(found.layers)
    alike = "" if math.isnan(angle) else f", cosine similarity {angle:.6f}"
    lines.append(f"difference {overall(found.layers):.2e} of the larger change{alike}; in the layer that differs most {max_of(found.layers):.2e}")
    rows = [
        (layer.name, f"{layer.relative:.2e}", *([f"{layer.magnitude:.2e}"] if _dora(found) else []), f"{layer.first:.4g}", f"{layer.second:.4g}")
        for layer in both[:top]
        if layer.worst > 0
    ]
    if rows:
        head = ("LAYER", "DIFFERENCE", *(["DORA SCALES"] if _dora(found) else []), "CHANGE A", "CHANGE B")
        lines += ["", table(head, rows, right=head[1:])]
    if found.metadata:
        texts = [(name, *(_text(text) for text in both_texts)) for name, both_texts in list(found.metadata.items())[:METADATA_SHOWN]]
        lines += ["", table(("METADATA", "A", "B"), texts)]
        lines += [f"and {len(found.metadata) - METADATA_SHOWN} more"] * (len(found.metadata) > METADATA_SHOWN)
    rounding = f"no layer differs by more than rounding ({found.tolerance:g})" if max_of(found.layers) else "no layer differs at all"
    verdict = f"the same function: {rounding}" if found.same else "different"
    return "\n".join([*lines, "", verdict])


def max_of(layers: list[LayerDifference]) -> float:
    """The largest difference of a layer."""
    return max((layer.worst for layer in layers), default=0.0)


def _read(choice: LoraChoice, layout: Layout, clip: ClipLayout, model: str) -> Additions:
    found = additions(choice.file, layout, clip, model)
    weighted = merged([(found, choice.weight)])
    return Additions(weighted.transformer, weighted.clip, found.left_out)


def _rounding(file: LoraFile) -> float:
    return max(ROUNDING.get(name, COARSE_ROUNDING) for name in _dtypes(file))


def _dtypes(file: LoraFile) -> list[str]:
    """Those of the matrices: an alpha may be in any."""
    return sorted({file.dtypes[key] for parts in keys.layers(file.shapes).values() for kind, key in parts.items() if kind in ("down", "up")})


def _number_format(file: LoraFile) -> str:
    return cut(" and ".join(_dtypes(file)))


def _dora(found: Difference) -> bool:
    return any(layer.magnitude for layer in found.layers)


def _listed(names: list[str]) -> str:
    return ", ".join(cut(name) for name in names[:NAMED]) + f" and {len(names) - NAMED} more" * (len(names) > NAMED)


def _text(text: str | None) -> str:
    return "-" if text is None else cut(text, METADATA_CHARACTERS)


def as_json_value(choices: tuple[LoraChoice, LoraChoice], found: Difference) -> dict[str, Any]:
    """Everything about two LoRAs, fit for JSON."""
    files = [
        {"name": one.file.name, "sha256": one.file.sha256, "weight": one.weight, "format": keys.format_of(one.file.shapes), "dtypes": _dtypes(one.file)}
        for one in choices
    ]
    angle = cosine(found.layers)
    return {
        "same": found.same,
        "tolerance": found.tolerance,
        "difference": overall(found.layers),
        "largest": max_of(found.layers),
        "cosine": None if math.isnan(angle) else angle,
        "files": files,
        "only_in_a": found.only(True),
        "only_in_b": found.only(False),
        "layers": [asdict(layer) | {"relative": layer.relative} for layer in found.layers],
        "metadata": {name: {"a": first, "b": second} for name, (first, second) in found.metadata.items()},
        "left_out": {"a": list(found.left_out[0]), "b": list(found.left_out[1])},
    }
