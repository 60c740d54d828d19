"""`underpass completion`: click's own completion scripts, printed for a shell to read."""

import click
from click.shell_completion import get_completion_class

PROGRAM = "underpass"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes SHELL complete commands, options and node names.

    \b
    bash  source <(underpass completion bash)      # in ~/.bashrc
    zsh   source <(underpass completion zsh)       # in ~/.zshrc, after compinit
    fish  underpass completion fish > ~/.config/fish/completions/underpass.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None  # click has these three
    root = context.find_root().command
    click.echo(kind(root, {}, PROGRAM, f"_{PROGRAM.upper()}_COMPLETE").source())
