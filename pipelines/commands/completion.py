"""completion: what a shell needs to complete commands, options and fields of the spec."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command(epilog="For example: xtoken completion bash")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes a shell complete commands and fields.

    In ~/.bashrc or ~/.zshrc: eval "$(xtoken completion bash)", or zsh. In ~/.config/fish/config.fish: xtoken completion fish | source.
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(click.get_current_context().find_root().command, {}, "xtoken", "_XTOKEN_COMPLETE").source())
