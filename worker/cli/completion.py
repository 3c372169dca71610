"""`hostd completion`: the script that completes subcommands and options in a shell."""

import click
from click.shell_completion import get_completion_class

from worker.cli.context import json_option, print_json

VARIABLE = "_HOSTD_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@json_option
@click.pass_context
def completion(ctx: click.Context, shell: str, as_json: bool) -> None:
    """Print the completion script of a shell.

    For example, in ~/.bashrc: source <(hostd completion bash)
    """
    script = script_of(ctx.find_root().command, shell)
    if as_json:
        print_json({"shell": shell, "script": script})
    else:
        click.echo(script)


def script_of(command: click.Command, shell: str) -> str:
    """Click's own script. Not `source()`, which runs the shell to look at its version."""
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"click has no completion for {shell}")
    made = kind(command, {}, "hostd", VARIABLE)
    return (made.source_template % made.source_vars()).strip()
