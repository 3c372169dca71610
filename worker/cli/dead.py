"""`hostd dead`: read, replay and drop dead letters, the messages that could not be processed.

They are in the stream `HOSTD_DEAD_<cell>`, which the administrator's credential reads; to send one
again takes the credential of the host's agentd.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import click
from msgspec.structs import replace

from schemas.subjects import Subjects
from worker.cli.client import Client, Kept, connect, new_id
from worker.cli.commands import bus_options
from worker.cli.context import CliError, print_json, settings_of, text_of

SHOWN_BYTES = 4096
T = TypeVar("T")


@click.group()
def dead() -> None:
    """Read, replay or drop dead letters. Each takes --json.

    --creds is the administrator's: no other role reads the stream or deletes from it.
    """


@dead.command("ls")
@bus_options
def ls(as_json: bool, **options: Any) -> None:
    """List a host's dead letters, oldest first."""

    async def read(client: Client, subjects: Subjects) -> list[dict[str, Any]]:
        letters = client.kept(subjects.dead_stream, f"{subjects.root}.{subjects.host_id}.dead.>")
        return [facts_of(letter, subjects) async for letter in letters]

    found = _with_client(read, options)
    if as_json:
        print_json({"dead_letters": found})
        return
    for letter in found:
        lane, size = letter["lane"], letter["size_bytes"]
        click.echo(f"{letter['seq']:>8}  {letter['at']}  {lane}  {size} bytes  {letter['reason']}")
    if not found:
        click.echo("no dead letters")


@dead.command()
@click.argument("seq", type=click.IntRange(min=1))
@click.option("--raw", is_flag=True, help="Write the message's bytes, e.g. for `hostd decode`.")
@bus_options
def show(seq: int, raw: bool, as_json: bool, **options: Any) -> None:
    """Show one dead letter: why it is one, and its bytes."""

    async def read(client: Client, subjects: Subjects) -> tuple[dict[str, Any], bytes]:
        letter = await _letter(client, subjects, seq)
        return facts_of(letter, subjects), letter.data

    facts, data = _with_client(read, options)
    if raw:
        click.echo(data, nl=False)
        return
    if as_json:
        print_json(facts | {"data": data})
        return
    for name, value in facts.items():
        click.echo(f"{name}: {text_of(value, name)}")
    more = f" (of {len(data)} bytes)" if len(data) > SHOWN_BYTES else ""
    click.echo(f"data: {data[:SHOWN_BYTES].hex()}{more}")


@dead.command()
@click.argument("seq", type=click.IntRange(min=1))
@click.option(
    "--send-creds",
    metavar="FILE",
    help="NATS credentials file of the host's agentd, to send it with. Default: --creds.",
)
@bus_options
def replay(seq: int, send_creds: str | None, as_json: bool, **options: Any) -> None:
    """Send a dead letter's bytes again, to the lane that they were sent to.

    The dead letter stays; drop it once its command has ended. Its command ID is the sender's: an
    ID that has a reply gets that reply again.
    """
    message_id = new_id()

    async def read(client: Client, subjects: Subjects) -> Kept:
        return await _letter(client, subjects, seq)

    letter = _with_client(read, options)
    if size := letter.headers.get("Hostd-Truncated"):
        raise CliError("invalid", f"dead letter {seq} was cut: the original had {size} bytes")

    async def send(client: Client, subjects: Subjects) -> str:
        subject = f"{subjects.root}.{subjects.host_id}.cmd.{_lane_of(letter, subjects)}"
        await client.publish_bytes(subject, letter.data, message_id)
        return subject

    subject = _with_client(send, options | {"creds": send_creds or options["creds"]})
    if as_json:
        print_json({"seq": seq, "subject": subject, "msg_id": message_id})
    else:
        click.echo(f"ok: sent {len(letter.data)} bytes to {subject} as message {message_id}")


@dead.command()
@click.argument("seq", type=click.IntRange(min=1))
@bus_options
def drop(seq: int, as_json: bool, **options: Any) -> None:
    """Delete a dead letter from the stream."""

    async def delete(client: Client, subjects: Subjects) -> None:
        await _letter(client, subjects, seq)  # of this host, and a dead letter
        await client.delete_kept(subjects.dead_stream, seq)

    _with_client(delete, options)
    print_json({"seq": seq, "dropped": True}) if as_json else click.echo(f"ok: dropped {seq}")


def facts_of(letter: Kept, subjects: Subjects) -> dict[str, Any]:
    """What the headers say of a dead letter."""
    headers = letter.headers
    return {
        "seq": letter.seq,
        "at": headers.get("Nats-Time-Stamp", ""),
        "lane": _lane_of(letter, subjects),
        "reason": headers.get("Hostd-Reason", ""),
        "id": headers.get("Nats-Msg-Id", ""),
        "sha256": headers.get("Hostd-Sha256", ""),
        "size_bytes": len(letter.data),
        "truncated": headers.get("Hostd-Truncated"),
    }


def _lane_of(letter: Kept, subjects: Subjects) -> str:
    return letter.subject.removeprefix(f"{subjects.root}.{subjects.host_id}.dead.")


async def _letter(client: Client, subjects: Subjects, seq: int) -> Kept:
    letter = await client.kept_message(subjects.dead_stream, seq)
    if not letter.subject.startswith(f"{subjects.root}.{subjects.host_id}.dead."):
        raise CliError(
            "not_found",
            f"message {seq} is not a dead letter of host {subjects.host_id}: use --host",
        )
    return letter


def _with_client(work: Callable[[Client, Subjects], Awaitable[T]], options: dict[str, Any]) -> T:
    """Connect as `bus_options` say, and do the work."""
    settings = settings_of(options["config"])
    # The administrator's account imports the API under its own name (`worker/bus/accounts.py`).
    settings = replace(settings, nats=replace(settings.nats, js_domain=""))
    try:
        host = options["host"] or settings.host.id
        subjects = Subjects(settings.root, host, settings.host.cell)
    except ValueError as error:
        raise CliError("invalid", str(error)) from error

    async def connected() -> T:
        async with connect(settings, url=options["url"], creds=options["creds"]) as client:
            return await work(client, subjects)

    return asyncio.run(connected())
