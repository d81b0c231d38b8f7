"""The command `lorabooth`: a table of subcommands, and what a user sees when one of them fails.

Importing this module is cheap, and so is `lorabooth --help`: a subcommand's module is imported only when that subcommand is chosen.
This module knows the rooms by name only. It does no work of its own.
"""

import errno
import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

import click
from click.shell_completion import CompletionItem

from lorabooth import __version__, last_words
from lorabooth.errors import StageFailed, UserError, out_of_memory
from lorabooth.signals import ENDING
from lorabooth.streams import let_go, open_streams, set_up_bars

# name -> (module:attribute of a click command, its line in `lorabooth --help`)
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("train.command:train", "Photos and a trigger word in, a LoRA out."),
    "check": ("lorabooth.check.command:check", "Which photos are good enough, before an hour is spent."),
    "plan": ("train.plan_command:plan", "Whether and how a training fits a GPU, before anything loads."),
    "generate": ("infer.command:generate", "A prompt and LoRAs in, pictures out."),
    "grid": ("infer.grid_command:grid", "Prompts beside weights of a LoRA, or beside checkpoints."),
    "reproduce": ("infer.reproduce_command:reproduce", "A picture made again from what is written in it."),
    "export": ("infer.convert_command:export", "A run's LoRA for ComfyUI, kohya or diffusers."),
    "convert": ("infer.convert_command:convert", "Any LoRA in another format; several made one."),
    "push": ("lorabooth.push_command:push", "A run's LoRA to the Hugging Face hub, with its card."),
    "pull": ("infer.pull_command:pull", "Any LoRA of the hub, CivitAI or the web, as a file of yours."),
    "loras": ("infer.loras_command:loras", "The LoRAs of this machine, and all that a file tells."),
    "diff": ("infer.diff_command:diff", "Whether two LoRAs are the same, and which layers are not."),
    "demo": ("lorabooth.demo:demo", "The whole way on the mini model: no GPU, no account, minutes."),
    "doctor": ("lorabooth.doctor:doctor", "What this machine has, what is missing and how to get it."),
    "completion": ("lorabooth.completion:completion", "Print the script that completes commands in bash, zsh or fish."),
}

# Read by the libraries when they are imported: their progress bars and notices would hide ours, and a tool on one's own machine reports to nobody.
SETTINGS_OF_LIBRARIES = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # torch's threads wait for each other by spinning, and where another program has the cores, that takes the time that the awaited one would work in: a
    # step of mini beside two other trainings took 1.5 to 40 times as long (docs/BENCHMARKS.md, "On a busy machine"). After so few turns they sleep.
    "GOMP_SPINCOUNT": "1000",
}

# Failures of the machine, not of the program: what happened, and how to go on.
MACHINE_FAILURES = {
    errno.ENOSPC: ("the disk is full", "free some space, then run the same command again to go on"),
    errno.EDQUOT: ("your disk quota is used up", "free some space, then run the same command again to go on"),
    errno.EACCES: ("permission denied", "choose a place that you may read and write"),
    errno.EPERM: ("this is not permitted", "choose a place that you may read and write"),
    errno.ENOENT: ("there is no such file or folder", "look at the path again"),
    errno.ELOOP: ("this path is a link to itself", "choose another path"),
    errno.ENOTDIR: ("a part of this path is a file, not a folder", "choose another folder"),
    errno.EEXIST: ("there is something of this name already", "choose another name"),
    errno.EISDIR: ("this is a folder, not a file", "give a file"),
    errno.ENAMETOOLONG: ("this name is too long for the file system", "choose a shorter one with --out FOLDER"),
    errno.EROFS: ("the disk is read-only", "choose a place that you may write to"),
    errno.EFBIG: ("a file grew larger than the disk or ulimit -f allows", "raise that limit or use another disk, then run the command again"),
    errno.ENXIO: ("this is no file that can be read", "give a file"),
    errno.EIO: ("the disk cannot be read or written", "see whether it is whole, then run the same command again to go on"),
    errno.ESTALE: ("the network disk no longer has this file", "see whether it is mounted and whole, then run the same command again to go on"),
    errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n 4096), then run the same command again to go on"),
}

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class Terminated(BaseException):
    """A signal that asks the command to end came; raised so that what is begun is tidied up."""


def _terminate(number: int, _: object) -> None:
    for again in ENDING:  # the terminal and the shell each send one
        signal.signal(again, signal.SIG_IGN)
    raise Terminated(number)


class LazyGroup(click.Group):
    """A group whose subcommands are known by name and help line, and imported when chosen."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the order of the table, which is the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the subcommand, or None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module_name, attribute = COMMANDS[cmd_name][0].split(":")
        command = getattr(importlib.import_module(module_name), attribute)
        assert isinstance(command, click.Command), f"{module_name}:{attribute} is not a click command"
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, but a misspelt name is compared with the table."""
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as error:
            raise click.exceptions.NoSuchCommand(error.command_name, possibilities=COMMANDS, ctx=ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands from the table, importing none."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete names from the table: a Tab key must not wait for an import."""
        names = [CompletionItem(name, help=line) for name, (_, line) in COMMANDS.items() if name.startswith(incomplete)]
        return names + click.Command.shell_complete(self, ctx, incomplete)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Train a FLUX LoRA of a person on your own GPU, and make portraits with it.

    \b
    Example, without a GPU:
      lorabooth demo
    Example, with a CUDA GPU:
      lorabooth train photos.zip --trigger TOK
      lorabooth generate "a portrait of TOK as a chef" --lora runs/TOK-photos
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; without `arguments`, those of the process."""
    return guarded(_run_group, sys.argv[1:] if arguments is None else list(arguments))


def guarded(work: Callable[[list[str]], int | None], arguments: list[str]) -> int:
    """Do `work(arguments)` and return the exit code: 0 done, 2 a problem the user can solve, 130 interrupted.

    Anything else that goes wrong is a fault of the program and keeps its traceback. For all entry points, `python -m train` too.
    """
    if sys.platform == "win32":  # locks and limits of memory are those of Unix
        return _fail("lorabooth runs on Linux", "on Windows use WSL 2: wsl --install, then set lorabooth up in it as on Linux; the GPU is there too")
    for name, value in SETTINGS_OF_LIBRARIES.items():
        os.environ.setdefault(name, value)
    open_streams()
    set_up_bars()
    before = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:
            signal.signal(number, _terminate)
    try:
        return _guarded(work, arguments)
    finally:
        let_go(sys.stdout)
        for number, handler in before.items():
            signal.signal(number, handler)


def _guarded(work: Callable[[list[str]], int | None], arguments: list[str]) -> int:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at each start which kernels a CPU would like to have
    try:
        code = work(arguments)
        if sys.stdout:  # None where it was closed before the start
            sys.stdout.flush()  # here, where a closed pipe is caught
        return code or 0
    except UserError as error:
        return _fail(f"lorabooth: {error.message}", error.hint)
    except StageFailed as error:
        # A code of ours has had its sentence; a signal, such as the kernel's when memory is used up, has not.
        return (
            error.code
            if error.code > 0
            else _fail(f"lorabooth: {error}", "if memory ran out, lower the resolution or the batch size; then run the command again")
        )
    except click.UsageError as error:
        return _fail_usage(error)
    except click.ClickException as error:
        return _fail(f"lorabooth: {error.format_message()}")
    except (click.Abort, KeyboardInterrupt) as error:
        # click makes an Abort of an interruption; a command that cannot go on has said what became of its work.
        said = str(error.__cause__ or error)
        return _fail(said or "interrupted; run the same command again to go on", code=EXIT_INTERRUPTED)
    except Terminated as error:
        return 128 + int(error.args[0])  # as shells have it
    except BrokenPipeError:
        return 1  # `lorabooth ... | head` closed our output, which is no failure; click's own code when it meets the closed pipe first
    except OSError as error:
        if "No usable temporary directory" in str(error):
            return _fail("lorabooth: there is no folder for temporary files that can be written to", "set TMPDIR to one")
        if error.errno not in MACHINE_FAILURES:
            raise
        what, hint = MACHINE_FAILURES[error.errno]
        return _fail(f"lorabooth: {what}" + (f": {error.filename}" if error.filename else ""), hint)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return _fail(
            "lorabooth: the GPU's memory is used up; what was saved is kept",
            "train with --resolution 512 --batch-size 1, generate smaller pictures, or stop other programs on the GPU (nvidia-smi lists them)",
        )


def _run_group(arguments: list[str]) -> int | None:
    # A command has nothing to return: what comes back is the code of `ctx.exit(code)`, or None.
    code: int | None = cli.main(args=arguments, prog_name="lorabooth", standalone_mode=False)
    return code


def _fail(message: str, hint: str = "", code: int = EXIT_USER_ERROR) -> int:
    """Say what happened on standard error and return the exit code; LORABOOTH_TRACEBACK=1 adds where. A process that a launcher started leaves it for the
    command behind that."""
    if os.environ.get("LORABOOTH_TRACEBACK") == "1":
        traceback.print_exc()
    if last_words.leave(message, hint, code):
        return code
    click.echo(message, err=True)
    if hint:
        click.echo(f"  {hint}", err=True)
    return code


def _fail_usage(error: click.UsageError) -> int:
    """A wrong option or argument: one sentence, and where the right ones are listed."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):  # just `lorabooth`: the message is the help itself
        error.show()
        return EXIT_USER_ERROR
    command = error.ctx.command_path if error.ctx else "lorabooth"
    sentence = " ".join(error.format_message().split())  # click lists choices on lines of their own
    return _fail(f"{command}: {sentence}", f"{command} --help lists what it takes")
