"""Base model families: all that is particular to a base model, one file each."""

from lorabooth.errors import UserError
from lorabooth.families import flux1_dev
from lorabooth.families.flux1 import Flux1


def load_family(model: str) -> Flux1:
    """The family of a model reference; nothing heavy is loaded. A UserError for a model of no known family."""
    from lorabooth import hub

    kind = hub.component_config(model, "transformer").get("_class_name")
    if kind != "FluxTransformer2DModel":
        raise UserError(f"{model} is a {kind}, not a FLUX.1 model", hint="FLUX.1-dev, FLUX.1-Krea-dev, FLUX.1-schnell and mini are known")
    return Flux1(model)


def family_to_plan(model: str) -> Flux1:
    """The same, for what needs no weights: FLUX.1-dev's configs are here, for those who have no access to it yet."""
    return flux1_dev.Flux1Dev(model) if model in flux1_dev.NAMES else load_family(model)
