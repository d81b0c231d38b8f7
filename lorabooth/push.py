"""A run goes to a Hugging Face repository: one commit with the LoRA, its card, its recipe and sample pictures; never photos or captions.

What came of it is kept in RUN/pushed.json, so that a push that failed is not forgotten and can go on. The token is kept nowhere.
"""

import io
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lorabooth import __version__, card, hub, xmp
from lorabooth.errors import UserError
from lorabooth.hub_write import PAUSE_SECONDS, Broken, writing
from lorabooth.notes import note
from lorabooth.runs import RunDir

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

ATTEMPTS = 4
SAMPLES = 12
RECORD = "pushed.json"
OF_THE_HUB = (".gitattributes",)
"""Files that a new repository has already."""


@dataclass(frozen=True)
class Push:
    """The state of a run's push: to which repository, and the commit, or what has kept it from being made."""

    repository: str
    private: bool
    problem: str = ""
    begun: bool = False
    """Whether this run has written there, or has begun to: what is in the repository is its own."""
    commit: str = ""
    url: str = ""
    at: str = ""

    @classmethod
    def of(cls, run_dir: RunDir) -> "Push | None":
        """What is recorded; None where the run was never pushed."""
        record = run_dir.read_json(RECORD)
        return cls(**record) if record else None

    def record(self, run_dir: RunDir) -> None:
        """Write it into the run."""
        run_dir.write_json(RECORD, asdict(self))


def push(run_dir: RunDir, repository: str, private: bool = False, force: bool = False) -> Push:
    """Push a finished run; where the hub is busy or the connection breaks, several times. A UserError where it cannot be, and the run keeps the mark.

    force: also into a repository that has files which are not this run's.
    """
    if not run_dir.lora.exists():
        raise UserError(f"{run_dir.path} has no LoRA yet: its training has not ended", hint="run the same lorabooth train command again to go on")
    check_name(repository)
    before = Push.of(run_dir)
    mark = Push(repository, private, "it was interrupted", begun=before is not None and before.repository == repository and before.begun)
    try:
        api = check(repository)
        with writing(repository):
            api.create_repo(repository, private=private, exist_ok=True)
            if not mark.begun and not force:
                _refuse_others(api, repository)
        mark = replace(mark, begun=True)
        mark.record(run_dir)
        commit = _commit(api, run_dir, repository)
    except UserError as error:
        replace(mark, problem=error.message).record(run_dir)
        raise
    done = replace(mark, problem="", commit=commit.oid, url=commit.commit_url, at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
    done.record(run_dir)
    return done


def check_name(repository: str) -> None:
    """Refuse what no repository can be called."""
    if not card.HUB_NAME.fullmatch(repository) or len(repository) > 96:
        raise UserError(f"{repository!r} is not a name that a repository can have", hint="names look like owner/name")


def check(repository: str) -> "HfApi":
    """A client that may write to a repository of that name; a UserError where the name or the token is not right. Creates nothing."""
    from huggingface_hub import HfApi, get_token

    check_name(repository)
    if get_token() is None:
        raise UserError("pushing needs a token of the hub that may write", hint="run: hf auth login, or set HF_TOKEN, or give --hf-token")
    api = HfApi(library_name="lorabooth", library_version=__version__)
    with writing(repository):
        owner = api.whoami()
    names = [owner["name"], *(organisation["name"] for organisation in owner.get("orgs", []))]
    wanted = repository.split("/")[0]
    if wanted.lower() not in (name.lower() for name in names):
        raise UserError(f"the token is of {owner['name']}, who cannot write to what belongs to {wanted}", hint=f"push to {owner['name']}/NAME")
    if (owner.get("auth") or {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"the token of {owner['name']} may read only", hint="make one that may write at https://huggingface.co/settings/tokens")
    return api


def files(run_dir: RunDir, repository: str) -> dict[str, Any]:
    """What is pushed: path in the repository -> a file here, or its content. Nothing else ever is."""
    config = run_dir.config
    pictures = [run_dir.samples / f"step-{config.steps:06d}-{i}.png" for i in range(min(len(config.preview_prompts), SAMPLES))]
    samples = {}
    for i, picture in enumerate(pictures):
        if picture.exists():
            samples[f"samples/{i}.png"] = _sample(picture.read_bytes(), card.prompt_of(config, i), config.model)
    recipe = {name: value for name, value in config.recipe().items() if value is not None}
    recipe |= {name: hub.display_name(recipe[name]) for name in ("model", "caption_model")}
    return {
        "lora.safetensors": run_dir.lora,
        "README.md": card.model_card(run_dir, repository, list(samples)).encode(),
        "config.yaml": yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).encode(),
        **samples,
    }


def _sample(png: bytes, prompt: str, model: str) -> bytes:
    """A picture with the mark that it is AI-generated, and nothing else in it."""
    info, out = PngInfo(), io.BytesIO()
    info.add_itxt("XML:com.adobe.xmp", xmp.packet(prompt, "", hub.display_name(model), __version__, False))
    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").save(out, "PNG", pnginfo=info)
    return out.getvalue()


def _refuse_others(api: "HfApi", repository: str) -> None:
    """Refuse a repository that has files: they are not this run's."""
    there = [name for name in api.list_repo_files(repository) if name not in OF_THE_HUB]
    if there:
        shown = ", ".join(there[:3]) + (f" and {len(there) - 3} more" if len(there) > 3 else "")
        raise UserError(f"{repository} exists and has files that are not of this run: {shown}", hint="choose another name, or add --force to write over them")


def _commit(api: "HfApi", run_dir: RunDir, repository: str) -> "CommitInfo":
    """One commit, tried again where the hub did not answer; what has arrived is not sent again, and a commit that was made is not made twice."""
    content = files(run_dir, repository)
    for attempt in _attempts():
        try:
            with writing(repository):
                return api.create_commit(repository, _operations(content), commit_message=f"{run_dir.config.trigger_word}: LoRA by lorabooth {__version__}")
        except Broken as error:
            if attempt == ATTEMPTS:
                raise
            note(f"{error.message}; trying again")
    raise AssertionError("the last attempt returns or raises")


def _attempts() -> Iterator[int]:
    """1 to ATTEMPTS, with a pause between two that doubles."""
    for attempt in range(1, ATTEMPTS + 1):
        yield attempt
        time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))


def _operations(content: dict[str, Any]) -> "list[CommitOperationAdd]":
    from huggingface_hub import CommitOperationAdd

    return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=what) for name, what in content.items()]
