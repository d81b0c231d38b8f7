"""Where a base model's files are: the shipped mini model, a local folder, or the Hugging Face hub.

Only the files a component needs are fetched, never code; each failure of the hub becomes one sentence.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorabooth import mini
from lorabooth.config import TrainConfig
from lorabooth.errors import UserError
from lorabooth.home import expanded

NOT_THE_HUB = "see whether this network wants a login first, and what HF_ENDPOINT and the proxy are set to"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
ACCOUNTS = ("wandb_project", "wandb_run", "wandb_entity")
"""Settings of a recipe that name the user's accounts elsewhere, and are nobody else's business."""
ALLOWED = ("*.json", "*.safetensors", "*.txt", "*.model")
"""Weights as safetensors, configs and tokenizer files. Pickles and Python files stay on the hub: they could run code."""


def model_folder(model: str) -> Path | None:
    """The local folder of a model reference, or None where it names a hub repository."""
    if model == "mini":
        if not (mini.FOLDER / "model_index.json").exists():
            raise UserError("the mini model's files are missing from this installation", hint="make them with: python -m scripts.mini")
        return mini.FOLDER
    folder = expanded(model)
    if model and folder.is_dir():
        if not (folder / "model_index.json").exists():
            raise UserError(f"{model} is a folder but not a diffusers pipeline: it has no model_index.json")
        return folder
    if not HUB_NAME.fullmatch(model) or model.startswith((".", "/", "~")):
        raise UserError(f"unknown model {model!r}", hint="give 'mini', a hub repository such as black-forest-labs/FLUX.1-dev, or a local diffusers folder")
    return None


def display_name(model: str) -> str:
    """What files say of their base: a hub name as it is, of a local folder only the last part, so that no path travels."""
    if (folder := expanded(model)).is_dir():
        return folder.resolve().name
    return model if HUB_NAME.fullmatch(model) and model[0] not in ".~" else Path(model).name  # a folder on a disk that is not there now


def public_recipe(config: TrainConfig) -> dict[str, Any]:
    """A recipe as it may travel in files: without paths of this machine and the user's accounts."""
    recipe = {name: value for name, value in config.recipe().items() if name not in ACCOUNTS}
    return recipe | {name: display_name(recipe[name]) for name in ("model", "caption_model")}


def fetch(model: str, *patterns: str) -> Path:
    """A local folder that holds the files of `model` that match `patterns` (such as 'vae/*'), downloaded once if need be."""
    folder = model_folder(model)
    return folder if folder is not None else download(model, patterns)


def is_here(model: str) -> bool:
    """Whether the weights of a model's transformer are on this machine, without asking the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = model_folder(model) or Path(snapshot_download(model, local_files_only=True, allow_patterns=[]))
    except (LocalEntryNotFoundError, UserError):
        return False
    return any(file.exists() for file in (folder / "transformer").glob("*.safetensors"))


def component_folder(model: str, component: str) -> Path:
    """The folder of one component, such as 'vae'; a UserError where the model has none."""
    folder = fetch(model, *(f"{component}/{pattern}" for pattern in ALLOWED)) / component
    if not folder.is_dir():
        raise UserError(f"{model} has no {component!r}: it is not a FLUX.1 pipeline")
    return folder


def component_config(model: str, component: str, name: str = "config.json") -> dict[str, Any]:
    """The configuration of a component, without its weights."""
    file = fetch(model, f"{component}/{name}", "model_index.json") / component / name
    if not file.exists():
        raise UserError(f"{model} has no {component}/{name}: it is not a FLUX.1 pipeline")
    return json.loads(file.read_text(encoding="utf-8"))


def download(repository: str, patterns: tuple[str, ...], ignored: tuple[str, ...] = ()) -> Path:
    """Files of a hub repository that match `patterns` and not `ignored`, in the local hub cache; a UserError for each way this can fail."""
    from huggingface_hub import snapshot_download

    with explained(repository):
        return Path(snapshot_download(repository, allow_patterns=list(patterns), ignore_patterns=list(ignored)))


def no_token() -> UserError:
    """Of a token that is none."""
    return UserError("the token has characters that no token has", hint="copy it again from https://huggingface.co/settings/tokens")


class Unreachable(UserError):
    """The hub cannot be asked now: what was downloaded before is the best there is."""


@contextmanager
def explained(
    repository: str, without_network: str = "connect to the internet once, or give a local folder with --model; --model mini needs no download"
) -> Iterator[None]:
    """The one place where a failure of the hub becomes a sentence; `without_network` is the way on when it cannot be reached."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"{repository} is gated: its licence must be accepted and you must be logged in",
            hint=f"open https://huggingface.co/{repository}, accept the licence, then run: hf auth login (or set HF_TOKEN)",
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"the hub has no repository {repository}, or your token may not see it",
            hint="check the name; for a private one run: hf auth login (or set HF_TOKEN)",
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{repository} has no such revision", hint="give a branch, a tag or a whole commit id that its page lists") from None
    except HFValidationError:
        raise UserError(f"{repository!r} is not a name that a hub repository can have", hint="names look like owner/name") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        # With nothing cached, the client turns an answer such as HTTP 500 into "not found here"; its cause tells.
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _refused(repository, error.__cause__.response.status_code) from None
        raise Unreachable(f"{repository} is not on this machine and the hub cannot be reached", hint=without_network) from None
    except HfHubHTTPError as error:
        raise _refused(repository, error.response.status_code) from None
    except (HTTPError, ConnectionError, TimeoutError) as error:
        if type(error).__name__ in ("ConnectError", "ConnectTimeout"):  # by name: the client changed its HTTP library between versions
            raise Unreachable(f"{repository} is not on this machine and the hub cannot be reached", hint=without_network) from None
        raise Unreachable(
            f"the download of {repository} broke off: {type(error).__name__}", hint="run the same command again; files that arrived whole are kept"
        ) from None
    except UnicodeEncodeError:  # in the header that carries it
        raise no_token() from None
    except (ValueError, LookupError, TypeError, AttributeError):  # a page in place of the hub's JSON
        raise Unreachable(f"what answers for {repository} is not the hub", hint=NOT_THE_HUB) from None


def _refused(repository: str, status: int) -> UserError:
    hints = {401: "the token is not valid; run: hf auth login", 403: "your token may not read it: give it that right, or run: hf auth login"}
    kind = Unreachable if status >= 500 or status == 429 else UserError
    return kind(f"the hub refused {repository} (HTTP {status})", hint=hints.get(status, "try again later"))
