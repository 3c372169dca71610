"""The `hostd` command: one explicit table of subcommands, each loaded when it is used."""

import importlib
from importlib.metadata import version
from typing import Any, Final

import click
import structlog

from worker import logs
from worker.cli.context import CliError, config_option, exit_code, print_json

COMMANDS: Final[dict[str, str]] = {
    # the worker
    "run": "worker.cli.run:run",
    "demo": "worker.demo.command:demo",
    "check-config": "worker.cli.check_config:check_config",
    "provision": "worker.cli.provision:provision",
    # commands, over the bus
    "ping": "worker.cli.commands:ping",
    "start": "worker.cli.commands:start",
    "stop": "worker.cli.commands:stop",
    "sleep": "worker.cli.commands:sleep",
    "wake": "worker.cli.commands:wake",
    "destroy": "worker.cli.commands:destroy",
    "net-up": "worker.cli.commands:net_up",
    "net-down": "worker.cli.commands:net_down",
    # questions, over the bus
    "ls": "worker.cli.queries:ls",
    "show": "worker.cli.queries:show",
    "events": "worker.cli.queries:events",
    # on this host's files
    "seed": "worker.cli.seed:seed",
    "logs": "worker.cli.local:logs",
    "inventory": "worker.cli.local:inventory",
    # without a host
    "decode": "worker.cli.codec:decode",
    "encode": "worker.cli.codec:encode",
}


class Lazy(click.Group):
    """A group that imports a subcommand when it is asked for: `hostd decode` needs no bus."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command = getattr(importlib.import_module(module), name)
        if not isinstance(command, click.Command):
            raise TypeError(f"{COMMANDS[cmd_name]} is no command")
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand; a failure is printed once, here."""
        as_json = "--json" in ctx.args
        try:
            return super().invoke(ctx)
        except CliError as error:
            if as_json:
                print_json({"error": {"code": error.code, "message": error.message}})
            else:
                click.echo(error, err=True)
            ctx.exit(exit_code(error.code))


@click.command(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("hostd"), prog_name="hostd")
@config_option
@click.pass_context
def main(ctx: click.Context, config: str | None) -> None:
    """The host daemon of a Firecracker fleet.

    Exit codes: 0 done, 2 usage, 10 invalid, 11 unsupported, 12 conflict, 13 not found,
    14 exhausted, 15 unavailable, 16 expired, 17 superseded, 18 draining, 20 host fault,
    21 internal, 30 no answer.
    """
    del config  # read by `context.load`
    logs.configure("warning", stream="stderr")
    ctx.call_on_close(structlog.reset_defaults)
