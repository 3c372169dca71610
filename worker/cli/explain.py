"""`hostd explain COMMAND ...`: what that command would do now, asked of this host's worker."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import click

from schemas.codes import Code
from schemas.requests import Request
from schemas.serde import REQUEST
from worker.cli import commands
from worker.cli.context import leave, print_json, printable, settings_of, text_of
from worker.cli.control_client import ControlClient

# Of the command line of a command: what says how to send it, which does not matter here.
SENDING: Final = frozenset({"host", "url", "creds", "timeout_s", "command_id", "deadline"})
EXPLAINED: Final = (
    commands.ping, commands.net_up, commands.net_down, commands.start, commands.stop,
    commands.sleep, commands.wake, commands.destroy,
)  # fmt: skip
EFFECTS: Final = {
    "waits": "waits for",
    "supersedes": "supersedes",
    "hurries": "hurries, and waits for",
}


@click.group()
@click.pass_context
def explain(context: click.Context) -> None:
    """Explain what a command would do now, and why. Nothing is done.

    COMMAND and its arguments are those of `hostd COMMAND`. The exit code is that of the refusal, or
    0. No VMM and no guest is asked: each step is taken to succeed. With --json, behind COMMAND, the
    worker's answer is printed.
    """
    context.obj = commands.Instead(answer)


def answer(request: Request, *, config: str | None, as_json: bool) -> None:
    """Ask, print, exit."""
    body = {"request": REQUEST.write(request, compact=False)}
    found = ControlClient(settings_of(config)).post("/v1/explain", body)
    if as_json:
        print_json(found)
    else:
        for line in lines_of(found):
            click.echo(printable(line))
    leave(Code.OK if found["refused"] is None else Code(found["refused"]["code"]))


def lines_of(found: Mapping[str, Any]) -> Iterator[str]:
    """An answer as text."""
    about = f"{found['type'] or 'the command'} of lane {found['lane'] or 'unknown'}"
    refused = found["refused"]
    if refused is not None:
        yield f"{about} would be refused: {refused['code']}: {refused['message']}"
        yield from (
            f"  {name}: {text_of(value, name)}" for name, value in refused["detail"].items()
        )
    elif not found["changes"]:
        yield f"{about} would change nothing: {found['why']}"
    else:
        status = f" and leave it {found['status']}" if found["status"] else ""
        yield f"{about} would be run{status}"
    for each in found["before"]:
        effect = EFFECTS[each["effect"]]
        yield f"  it {effect} {each['type']} {each['id']}, which is {each['state']}"
    if found["provisional"]:
        yield "  these come first: what follows is of now, not of then"
    for what in found["waits"]:
        yield f"  it waits for {what}"
    for number, step in enumerate(found["steps"], 1):
        yield f"{number:>4}. {described(step)}"


def described(step: Mapping[str, Any]) -> str:
    """One step: what it makes or removes, and whether that is there."""
    words = step["name"]
    if "key" in step:
        removes = step["name"].startswith("remove_")
        is_there = ("is there" if removes else "is there, checked") if step["there"] else None
        words += f" {step['key']}: {is_there or ('is gone already' if removes else 'is made')}"
    return f"{words}: refused here" if step["outcome"] == "failed" else words


def explained(command: click.Command) -> click.Command:
    """The command with its own arguments, without the options that only concern its sending."""
    callback = command.callback
    assert callback is not None  # noqa: S101 - each of them is a function

    def run(**options: Any) -> None:
        callback(**dict.fromkeys(SENDING), **options)

    params = [each for each in command.params if each.name not in SENDING]
    return click.Command(command.name, callback=run, params=params, help=command.help)


for each in EXPLAINED:
    explain.add_command(explained(each))
