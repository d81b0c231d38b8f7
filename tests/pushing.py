"""`lorabooth push` as a process, against the stand-in hub, and a run with secrets in it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from hub_server import GOOD_TOKEN
from PIL import Image
from push_server import PushServer

from lorabooth.runs import RunDir

FILES = [".gitattributes", "README.md", "config.yaml", "lora.safetensors", "samples/0.png"]
SECRET = "quokka-on-a-bicycle"


def copy_with_secrets(tiny_run: Path, tmp_path: Path) -> RunDir:
    """A run, in whose captions, photos and path stands what must not leave this machine."""
    folder = RunDir(shutil.copytree(tiny_run, tmp_path / SECRET / "run"))
    next(folder.captions.iterdir()).write_text(f"a portrait of TOK, {SECRET}")
    photo = next(folder.photos.glob("*.png"))
    with Image.open(photo) as image:
        exif = Image.Exif()
        exif[0x010E] = SECRET
        image.save(photo, exif=exif)
    return folder


def started(hub: PushServer, *arguments: str, token: str = GOOD_TOKEN, **environment: str) -> subprocess.Popen[str]:
    """lorabooth, with the stand-in for the hub; large files go by plain HTTP unless HF_HUB_DISABLE_XET is given."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING")) and not name.lower().endswith("_proxy")}
    home = str(hub.folder.parent / "hf")
    ours = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"} | ({"HF_TOKEN": token} if token else {})
    command = [sys.executable, "-m", "lorabooth", *arguments]
    # A shell that started us in the background may have told us to ignore SIGINT, and a child inherits that.
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=kept | ours | environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def pushed(hub: PushServer, *arguments: str, token: str = GOOD_TOKEN, **environment: str) -> subprocess.CompletedProcess[str]:
    """A push that has ended, in whatever way but a traceback."""
    process = started(hub, "push", *arguments, token=token, **environment)
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def record(run: RunDir) -> dict[str, object]:
    """What the run keeps of its push."""
    return dict(json.loads((run.path / "pushed.json").read_text()))
