"""A run goes to a Hugging Face repository: one commit with the LoRA, its card, its recipe and sample pictures; never photos or captions.

What came of it is kept in RUN/pushed.json, so that a push that failed is not forgotten and can go on. The token is kept nowhere.
"""

import io
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lorabooth import __version__, card, hub, xmp
from lorabooth.errors import UserError
from lorabooth.hub_write import PAUSE_SECONDS, Broken, Offline, writing
from lorabooth.lora_file import LoraFile
from lorabooth.notes import note
from lorabooth.runs import RunDir

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

Result = TypeVar("Result")
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
    """Whether it was to be private."""
    problem: str = ""
    begun: bool = False
    """Whether this run has written there, or has begun to: what is in the repository is its own."""
    earlier: tuple[str, ...] = ()
    """Other repositories of which that is true."""
    commit: str = ""
    """The last that was made there; a later push that failed leaves it."""
    url: str = ""
    at: str = ""

    @classmethod
    def of(cls, run_dir: RunDir) -> "Push | None":
        """What is recorded; None where the run was never pushed."""
        try:
            record = run_dir.read_json(RECORD)
            if record and not isinstance(record.get("repository"), str):
                raise TypeError
            return cls(**record | {"earlier": tuple(record.get("earlier", ()))}) if record else None
        except (UserError, TypeError, AttributeError):
            raise UserError(f"{run_dir.path / RECORD} is damaged", hint="remove it, and name the repository: lorabooth push RUN OWNER/NAME --force") from None

    @classmethod
    def started(cls, before: "Push | None", repository: str, private: bool) -> "Push":
        """The mark of a push that has not ended yet; what an earlier one has written stays known."""
        interrupted = "it was interrupted"
        if before is None:
            return cls(repository, private, interrupted)
        if before.repository == repository:
            return replace(before, private=private, problem=interrupted)
        written = (*before.earlier, before.repository) if before.begun else before.earlier
        return cls(repository, private, interrupted, repository in written, tuple(name for name in written if name != repository))

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
    LoraFile.read(run_dir.lora)
    before = Push.of(run_dir)
    mark = Push.started(before, repository, private)
    mark.record(run_dir)
    try:
        api = _tried(lambda: check(repository))
        _tried(lambda: _prepare(api, repository, private, own=force or mark.begun))
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
    if not hub.HUB_NAME.fullmatch(repository) or len(repository) > 96:
        raise UserError(f"{repository!r} is not a name that a repository can have", hint="names look like owner/name")


def check(repository: str) -> "HfApi":
    """A client that may write to a repository of that name; a UserError where the name or the token is not right, a note of whose it is. Creates nothing."""
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
    note(f"the LoRA goes to {repository} by the token of {owner['name']}")
    return api


def files(run_dir: RunDir, repository: str) -> dict[str, Any]:
    """What is pushed: path in the repository -> a file here, or its content. Nothing else ever is."""
    config = run_dir.config
    pictures = [run_dir.samples / f"step-{config.steps:06d}-{i}.png" for i in range(min(len(config.preview_prompts), SAMPLES))]
    samples = {}
    for i, picture in enumerate(pictures):
        if not picture.exists():
            continue
        try:
            samples[f"samples/{i}.png"] = _sample(picture.read_bytes(), card.prompt_of(config, i), config.model)
        except (OSError, SyntaxError):  # Pillow's, for what is no whole picture
            note(f"{picture.name} is damaged, and not pushed")
    recipe = {name: value for name, value in hub.public_recipe(config).items() if value is not None}
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


def _prepare(api: "HfApi", repository: str, private: bool, own: bool) -> None:
    """Make the repository where there is none; refuse one with files of others unless it is our `own`, and a public one where a private one is wanted."""
    with writing(repository):
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(repository, revision="main").private:
            raise UserError(
                f"{repository} exists and is public, and a private one was asked for",
                hint=f"make it private at https://huggingface.co/{repository}/settings, choose another name, or add --public",
            )
        if not own:
            _refuse_others(api, repository)


def _refuse_others(api: "HfApi", repository: str) -> None:
    """Refuse a repository that has files: they are not this run's."""
    there = [name for name in api.list_repo_files(repository) if name not in OF_THE_HUB]
    if there:
        shown = ", ".join(there[:3]) + (f" and {len(there) - 3} more" if len(there) > 3 else "")
        raise UserError(f"{repository} exists and has files that are not of this run: {shown}", hint="choose another name, or add --force to write over them")


def _commit(api: "HfApi", run_dir: RunDir, repository: str) -> "CommitInfo":
    """One commit; what has arrived is not sent again, and a commit whose answer was lost is not made twice."""
    content = files(run_dir, repository)
    message = f"{run_dir.config.trigger_word}: LoRA by lorabooth {__version__}"

    def commit() -> "CommitInfo":
        operations = _operations(content)
        with writing(repository):
            return api.create_commit(repository, operations, commit_message=message)

    return _tried(commit)


def _tried(call: Callable[[], Result]) -> Result:
    """The call's result; where the hub did not answer it is made again, after pauses that double."""
    for attempt in range(1, ATTEMPTS):
        try:
            return call()
        except Offline:
            raise
        except Broken as error:
            note(f"{error.message}; trying again")
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
    return call()


def _operations(content: dict[str, Any]) -> "list[CommitOperationAdd]":
    from huggingface_hub import CommitOperationAdd

    return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=what) for name, what in content.items()]
