"""Which base model a run stands on: a hash of each component it used, so that no run goes on with another one."""

import hashlib
import re
from pathlib import Path

from lorabooth import hub
from lorabooth.errors import UserError
from lorabooth.runs import RunDir, sha256_file

RECORD = "base.json"


def pinned(run_dir: RunDir, component: str) -> str:
    """The SHA-256 of a component of the run's base, such as 'transformer'; a UserError where it is not the one that the run began with.

    It is read once and kept in RUN/base.json with the files' sizes and times, for 24 GB take a while to read.
    """
    model = run_dir.config.model
    files = weight_files(model, component)
    state = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    record = run_dir.read_json(RECORD) or {}
    known = record.get(component)
    if known and known["state"] == state:
        return str(known["sha256"])
    sha256 = sha256_of(files)
    if known and known["sha256"] != sha256:
        raise UserError(
            f"the {component} of {hub.display_name(model)} has changed since the run {run_dir.path} began",
            hint="put the old model back, or start a new run with --out FOLDER",
        )
    run_dir.write_json(RECORD, record | {component: {"state": state, "sha256": sha256}})
    return sha256


def weight_files(model: str, component: str) -> list[Path]:
    """The files that hold a component's weights, by name."""
    return sorted(hub.component_folder(model, component).glob("*.safetensors"))


def sha256_of(files: list[Path]) -> str:
    """SHA-256 of a component's weights: for one file its own, for several over their names and hashes."""
    # The hub cache names a blob by its SHA-256, which saves reading 24 GB.
    digests = [f.resolve().name if re.fullmatch(r"[0-9a-f]{64}", f.resolve().name) else sha256_file(f) for f in files]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(f"{f.name} {d}" for f, d in zip(files, digests, strict=True)).encode()).hexdigest()
