"""Why a training ended that a launcher had started: the launcher's exit code does not tell it, and what the launcher prints would bury it.

`lorabooth train` names a file of the run to the processes it has started, in their environment. Who knows why the training ends leaves it there instead of
printing it, and `lorabooth train` says it last. Where nobody left a word, a process was killed, or the launcher itself failed.
"""

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from lorabooth.errors import UserError

FILE = "ended.json"
VARIABLE = "LORABOOTH_LAST_WORDS"


@dataclass(frozen=True)
class LastWords:
    """A sentence, the way out and the exit code. Without a sentence: a fault of the program, which has printed where."""

    message: str
    hint: str
    code: int


def environment(run_folder: Path) -> dict[str, str]:
    """What asks the processes of a training for their last words."""
    return {VARIABLE: str((run_folder / FILE).resolve())}


def asked_for() -> bool:
    """Whether the command that started this process wants to say it itself."""
    return VARIABLE in os.environ


def left() -> bool:
    """Whether there are last words for that command; a full disk takes none."""
    return asked_for() and Path(os.environ[VARIABLE]).exists()


def leave(message: str, hint: str, code: int) -> bool:
    """Leave the last words of this process, unless another's are there, where the command that started it asks for them; else False."""
    place = Path(os.environ.get(VARIABLE, ""))
    if not asked_for() or not place.parent.is_dir():  # another machine's own disk
        return False
    try:
        before = _read(place)
        if before is None or (message and not before.message):
            from lorabooth.runs import write_durable  # here, for `lorabooth --help` reads this module

            words = LastWords(message.removeprefix("lorabooth: "), hint, code)
            write_durable(place, json.dumps(asdict(words)).encode(), new=not message)
    except FileExistsError:
        return True
    except OSError:  # a full disk
        return False
    return True


def forget(run_folder: Path) -> None:
    """Remove what an earlier session left."""
    (run_folder / FILE).unlink(missing_ok=True)


def take(run_folder: Path) -> LastWords | None:
    """What was left in a run; it is gone afterwards."""
    found = _read(run_folder / FILE)
    forget(run_folder)
    return found


def raise_them(words: LastWords) -> None:
    """Raise here what ended the processes; nothing where that was a fault of the program."""
    if words.message and words.code == 130:
        raise KeyboardInterrupt(words.message)
    if words.message:
        raise UserError(words.message, words.hint)


def _read(place: Path) -> LastWords | None:
    with suppress(OSError, ValueError, TypeError):
        return LastWords(**json.loads(place.read_bytes()))
    return None
