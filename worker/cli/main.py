"""The `hostd` command: one explicit table of subcommands, each imported on first use."""

import importlib
from typing import Any, Final

import click
import structlog

from worker import logs
from worker.cli.context import CliError, config_option, exit_code, print_json
from worker.release.build import this_build
from worker.settings import nearest

SECTIONS: Final[dict[str, dict[str, str]]] = {
    "Worker": {
        "run": "worker.cli.run:run",
        "check-config": "worker.cli.check_config:check_config",
        "provision": "worker.cli.provision:provision",
        "demo": "worker.demo.command:demo",
    },
    "Commands (sent over NATS)": {
        "ping": "worker.cli.commands:ping",
        "net-up": "worker.cli.commands:net_up",
        "net-down": "worker.cli.commands:net_down",
        "start": "worker.cli.commands:start",
        "stop": "worker.cli.commands:stop",
        "sleep": "worker.cli.commands:sleep",
        "wake": "worker.cli.commands:wake",
        "destroy": "worker.cli.commands:destroy",
    },
    "Queries and dead letters (over NATS)": {
        "ls": "worker.cli.queries:ls",
        "show": "worker.cli.queries:show",
        "usage": "worker.cli.queries:usage",
        "events": "worker.cli.queries:events",
        "dead": "worker.cli.dead:dead",
    },
    "This host's worker (as root, without NATS)": {
        "drain": "worker.cli.drain:drain",
        "undrain": "worker.cli.drain:undrain",
        "doctor": "worker.cli.doctor:doctor",
        "explain": "worker.cli.explain:explain",
        "top": "worker.cli.state:top",
        "dump": "worker.cli.state:dump",
        "audit": "worker.cli.journal:audit",
        "adopt": "worker.cli.claims:adopt",
        "release": "worker.cli.claims:release",
        "sweep": "worker.cli.claims:sweep",
    },
    "Local files and kernel state (as root)": {
        "logs": "worker.cli.local:logs",
        "inventory": "worker.cli.local:inventory",
        "journal": "worker.cli.journal:journal",
        "seed": "worker.cli.seed:seed",
    },
    "Message debugging": {
        "decode": "worker.cli.codec:decode",
        "encode": "worker.cli.codec:encode",
    },
    "Shell": {
        "completion": "worker.cli.completion:completion",
    },
}
COMMANDS: Final[dict[str, str]] = {
    name: target for section in SECTIONS.values() for name, target in section.items()
}


class LazyGroup(click.Group):
    """A group that imports a subcommand on first use: `hostd decode` needs no NATS client."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command = getattr(importlib.import_module(module), name)
        if not isinstance(command, click.Command):
            raise TypeError(f"{COMMANDS[cmd_name]}: expected a click command, got {command!r}")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise click.UsageError(
                f"no such command '{args[0]}'{nearest(args[0], COMMANDS)}", ctx
            ) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The subcommands by section, in the order of the table."""
        width = max(map(len, COMMANDS))
        for title, section in SECTIONS.items():
            rows: list[tuple[str, str]] = []
            for name in section:
                command = self.get_command(ctx, name)
                if command is not None:
                    rows.append((name.ljust(width), command.get_short_help_str(limit=80)))
            with formatter.section(title):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand. The only place that prints a failure."""
        as_json = "--json" in ctx.args
        try:
            return super().invoke(ctx)
        except CliError as error:
            if as_json:
                print_json({"error": {"code": error.code, "message": error.message}})
            else:
                click.echo(error, err=True)
            ctx.exit(exit_code(error.code))


def show_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    """Print which build this is, and end."""
    if asked and not ctx.resilient_parsing:
        click.echo(f"hostd, version {this_build()}")
        ctx.exit()


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=show_version,
    help="Show the version and the commit, and exit.",
)
@config_option
@click.pass_context
def main(ctx: click.Context, config: str | None) -> None:
    """Host daemon for Firecracker microVMs, and its command-line client.

    Exit codes: 0 ok, 1 doctor or provision --dry-run found something, 2 usage error, 10 invalid,
    11 unsupported, 12 conflict, 13 not found, 14 exhausted, 15 unavailable, 16 expired,
    17 superseded, 18 draining, 20 host fault, 21 internal, 30 no answer.
    """
    del config  # read by `context.load`
    logs.configure("warning", stream="stderr")
    ctx.call_on_close(structlog.reset_defaults)
