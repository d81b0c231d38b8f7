"""LoRA files for other programs, read again and compared before they are called done."""

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save

from infer.loras import LoraChoice, resolve
from infer.same_picture import LEVELS, picture_difference
from lorabooth import checkpoints
from lorabooth.comparison import difference
from lorabooth.conversion import DTYPES, TOLERANCE, merged, reduced, written
from lorabooth.entry import printable
from lorabooth.errors import UserError
from lorabooth.families import load_family
from lorabooth.families.flux1_dev import Flux1Dev
from lorabooth.layout import ClipLayout, Layout, sizes_of
from lorabooth.lora import sorted_header
from lorabooth.lora_file import AND, LoraFile
from lorabooth.lowrank import Additions, additions
from lorabooth.notes import note
from lorabooth.runs import RunDir, check_same, write_new

STORED = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
"""Precisions by safetensors' names."""
NOT_TRUE_ANY_MORE = ("lora_adapter_metadata", "sshs_legacy_hash")


def export_run(run: Path, raw: bool, form: str, dtype: str | None, rank: int | None, out: Path | None) -> None:
    """Write the LoRA of a run, averaged or raw, as `write` does."""
    run_dir = RunDir.open(run)
    if not raw:
        write((resolve(str(run)),), form, dtype, rank, out)
        return
    averaged = resolve(str(run)).file  # its metadata, and the sentence where the run has not ended
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{run.resolve().name}-raw.safetensors"
        if not any(checkpoints.save_as_lora(run_dir, step, file, raw=True) for step in reversed(checkpoints.folders(run_dir))):
            raise UserError(f"{run} has no whole checkpoint, in which the raw weights would be")
        write((LoraChoice(replace(LoraFile.read(file), metadata=averaged.metadata), 1.0),), form, dtype, rank, out)


def write(choices: Sequence[LoraChoice], form: str, dtype: str | None, rank: int | None, out: Path | None) -> None:
    """Read, merge, reduce, write, and read again; a UserError where the new file is not what it should be, and then there is none."""
    first = choices[0].file
    layout, clip, model = layouts(first)
    parts = [(additions(choice.file, layout, clip, model), choice.weight) for choice in choices]
    for (found, _), choice in zip(parts, choices, strict=True):
        if found.left_out:
            note(f"{choice.file.path.name}: left out: {', '.join(map(printable, found.left_out[:5]))}{' ...' * (len(found.left_out) > 5)}")
    wanted, lost = merged(parts), 0.0
    if rank:
        wanted, lost = reduced(wanted, rank)
    precision = DTYPES[dtype or STORED.get(Counter(first.dtypes.values()).most_common(1)[0][0], "fp32")]
    shown = str(precision).removeprefix("torch.")
    file = out or Path(f"{'-'.join(_plain(choice.file.name) for choice in choices)}-{form}.safetensors")
    if file.suffix != ".safetensors":
        raise UserError(f"--out {file} must end in .safetensors")
    tensors = written(wanted, layout, form, precision)
    if form == "comfyui" and any(one.magnitude is not None for part in (wanted.transformer, wanted.clip) for one in part.values()):
        note("ComfyUI divides a DoRA's scales by the lengths of the base's rows, not of the sum's: it will draw another picture with this file")
    if not all(torch.isfinite(t.float()).all() for t in tensors.values()):
        raise UserError(f"the LoRA holds numbers that are too large for {shown}", hint="use --dtype fp32")
    data = sorted_header(save(tensors, metadata=_metadata(choices, wanted)))
    if not tensors:
        raise UserError("nothing is left to write: no layer of these files changes anything")
    check_same(file, data)  # before the comparison, which takes seconds
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder) / file.name
        again.write_bytes(data)
        far = difference(wanted, additions(LoraFile.read(again), layout, clip, model))
        if far > TOLERANCE[precision]:
            raise UserError(
                f"the new file would not be the same LoRA: a layer differs by {far:.1%} (numbers too large or too small for {shown})",
                hint="use --dtype fp32",
            )
        apart = picture_difference(choices, again, model)
    if isinstance(apart, str):
        note(apart)
    elif apart > LEVELS and not rank:
        raise UserError(f"the new file would not make the same picture: it differs by {apart:.1f} of 255 on average", hint="use --dtype fp32")
    else:
        note(f"a picture with it differs by {apart:.2f} of 255 on average from one with {'the LoRA' if len(choices) == 1 else 'those LoRAs'}")
    write_new(file, data)
    reduction = f"; rank {rank} loses {lost:.2%} of the change" if rank else ""
    click.echo(f"{len(wanted.transformer) + len(wanted.clip)} layers, read again: they differ by at most {far:.1e}{reduction}", err=True)
    click.echo(str(file))


def layouts(file: LoraFile) -> tuple[Layout, ClipLayout, str]:
    """The layers of the base that a file was made for; FLUX.1-dev's where it does not name a base that is on this machine."""
    family = load_family("mini") if file.metadata.get("lorabooth.base") == "mini" else Flux1Dev()
    return Layout(sizes_of(family.empty_transformer())), ClipLayout(sizes_of(family.empty_clip())), family.model


def _plain(name: str) -> str:
    return name.replace("/", "-")


def _metadata(choices: Sequence[LoraChoice], wanted: Additions) -> dict[str, str]:
    """The first file's, without what is no longer true; and of what it was made."""
    kept = {name: text for name, text in choices[0].file.metadata.items() if name not in NOT_TRUE_ANY_MORE}
    ranks = {len(one.down) for part in (wanted.transformer, wanted.clip) for one in part.values()}
    rank = str(max(ranks, default=0))
    made_of: list[dict[str, Any]] = [{"name": choice.file.name, "sha256": choice.file.sha256, "weight": choice.weight} for choice in choices]
    words = list(dict.fromkeys(word for choice in choices for word in choice.file.trigger_words if word))
    phrase = {"modelspec.trigger_phrase": AND.join(words)} if words else {}
    if len(words) > 1:
        made_of[0]["trigger_words"] = words
    if len(choices) > 1:
        phrase["modelspec.title"] = " and ".join(choice.file.name for choice in choices)
    return kept | phrase | {"format": "pt", "ss_network_dim": rank, "ss_network_alpha": rank, "lorabooth.made_of": json.dumps(made_of)}
