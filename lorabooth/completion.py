"""`lorabooth completion`: the script with which a shell completes commands and options."""

import click
from click.shell_completion import get_completion_class

from lorabooth.errors import UserError

# Where each shell looks for completions of its own accord, so that no start-up file has to be edited.
INSTALL = {
    "bash": "mkdir -p ~/.local/share/bash-completion/completions && lorabooth completion bash > ~/.local/share/bash-completion/completions/lorabooth",
    "zsh": "mkdir -p ~/.zfunc && lorabooth completion zsh > ~/.zfunc/_lorabooth   # with `fpath+=~/.zfunc` before `compinit` in ~/.zshrc",
    "fish": "mkdir -p ~/.config/fish/completions && lorabooth completion fish > ~/.config/fish/completions/lorabooth.fish",
}


@click.command()
@click.argument("shell", type=click.Choice(sorted(INSTALL)))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of SHELL, with the way to install it at its end.

    \b
    Example, for this terminal only:
      eval "$(lorabooth completion bash)"
    """
    script_class = get_completion_class(shell)
    if script_class is None:
        raise UserError(f"this version of click has no completion for {shell}", hint="choose another shell")
    # click's script asks the program itself for completions, through this environment variable.
    script = script_class(ctx.find_root().command, {}, "lorabooth", "_LORABOOTH_COMPLETE").source()
    click.echo(script)
    click.echo(f"# To keep it, run once, then open a new terminal:\n#   {INSTALL[shell]}")
