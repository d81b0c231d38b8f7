"""Files that people have published, by the names and shapes of their tensors: each is read whole, or refused in one sentence.

data/published_loras.json has the names and shapes of ten files, `{}` for the numbers of blocks, as InvokeAI (Apache-2.0) lists them
in its tests, where the sources are named.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorabooth.conversion import written
from lorabooth.errors import UserError
from lorabooth.families.flux1_dev import Flux1Dev
from lorabooth.layout import ClipLayout, Layout, sizes_of
from lorabooth.lora_file import LoraFile
from lorabooth.lowrank import Additions, additions

PUBLISHED = json.loads((Path(__file__).parent / "data" / "published_loras.json").read_text(encoding="utf-8"))
DEV = Flux1Dev()
LAYOUT, CLIP = Layout(sizes_of(DEV.empty_transformer())), ClipLayout(sizes_of(DEV.empty_clip()))


def names(of: str) -> dict[str, list[int]]:
    """Name -> shape of each tensor of a published file."""
    found = {}
    for name, shape, ranges in PUBLISHED[of]["keys"]:
        numbers = [number for first, last in ranges for number in range(first, last + 1)]
        found |= {name.replace("{}", str(number)): shape for number in numbers} if numbers else {name: shape}
    return found


def read(of: str, folder: Path) -> Additions:
    """A file with those tensors, of rank 1: the ranks are theirs, and only take time."""
    tensors: dict[str, Tensor] = {}
    for name, shape in names(of).items():
        side = 0 if re.search(r"lora_A|(lora_)?down\.", name) else 1 if re.search(r"lora_B\.weight|(lora_)?up\.", name) else None
        tensors[name] = torch.ones([1 if i == side else n for i, n in enumerate(shape)], dtype=torch.bfloat16)
    save_file(tensors, folder / "published.safetensors")
    return additions(LoraFile.read(folder / "published.safetensors"), LAYOUT, CLIP, "FLUX.1-dev")


@pytest.mark.parametrize(
    ("of", "layers", "of_clip"),
    [
        ("kohya", 494, 0), ("kohya with CLIP", 494, 72), ("diffusers", 494, 0), ("diffusers without proj_mlp", 342, 0), ("PEFT's save_pretrained", 381, 0),
        ("ai-toolkit with BFL's names", 418, 0), ("XLabs", 24, 0),
    ],
)  # fmt: skip
def test_every_tensor_of_it_is_used(of: str, layers: int, of_clip: int, tmp_path: Path):
    found = read(of, tmp_path)
    assert (len(found.transformer), len(found.clip), found.left_out) == (layers, of_clip, ())
    for part, sizes in ((found.transformer, LAYOUT.sizes), (found.clip, CLIP.sizes)):
        assert all((len(one.up), one.down.shape[1]) == tuple(sizes[module]) for module, one in part.items())


@pytest.mark.parametrize(
    ("of", "words"),
    [("OneTrainer DoRA", "scales lie along the inputs"), ("BFL LoKr", "is a LoKr, not a LoRA"), ("FLUX.1-Depth-dev-lora", "does not fit FLUX.1-dev")],
)
def test_what_is_not_for_this_base_is_refused_in_one_sentence(of: str, words: str, tmp_path: Path):
    with pytest.raises(UserError, match=words) as caught:
        read(of, tmp_path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(("form", "of"), [("kohya", "kohya"), ("comfyui", "ai-toolkit with BFL's names"), ("diffusers", "diffusers")])
def test_what_is_written_has_their_names_and_shapes(form: str, of: str, tmp_path: Path):
    theirs = names(of)
    ours = written(read("kohya" if of == "diffusers" else of, tmp_path), LAYOUT, form, torch.bfloat16)
    alpha = {name for name in (ours.keys() ^ theirs.keys()) if name.endswith(".alpha")}
    assert ours.keys() - alpha == theirs.keys() - alpha, "another program would not find these layers"
    for name, shape in theirs.items():
        if name not in alpha and shape:
            side = 1 if "lora_A" in name or "down" in name else 0  # the other one is the rank
            assert ours[name].shape[side] == shape[side]
