"""What base models ask of those who use them."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Licence:
    """What a base asks of those who use it."""

    name: str
    hub_name: str
    """What the hub calls it."""
    url: str
    commercial: bool
    duties: tuple[str, ...] = ()


LICENCES = {
    "dev": Licence(
        "FLUX.1 [dev] Non-Commercial License v1.1.1",
        "flux-1-dev-non-commercial-license",
        "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
        commercial=False,
        duties=(
            "filter or review pictures before you distribute them",
            "say that pictures are AI-generated where the law asks for it",
            "pass the licence on with every LoRA",
        ),
    ),
    "schnell": Licence("Apache-2.0", "apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0", commercial=True),
    "mini": Licence("Apache-2.0 (drawings: python-avatars, MIT)", "apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0", commercial=True),
}


def licence_of(model: str) -> Licence:
    """The licence by a model's name; an unknown fine-tune is taken to carry the stricter one."""
    if model == "mini":
        return LICENCES["mini"]
    return LICENCES["schnell" if "schnell" in Path(model).name.lower() else "dev"]
