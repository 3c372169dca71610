"""`hostd decode` and `hostd encode`: what an agentd's author debugs with. No bus, no settings.

Both take commands, replies and events, which their keys tell apart, and are as strict as the
worker; what a worker would refuse is refused here with the same code and path.
"""

import json
from collections.abc import Callable
from typing import BinaryIO

import click

from schemas import codec
from schemas.codes import EXIT_CODES, Code
from schemas.decode_error import DecodeError, quoted
from schemas.envelopes import Form
from schemas.subjects import lane_of_any
from schemas.unpack import ANSWER, COMMAND, check, pack, read_json, unpack_map

JSON_FLAG = click.option(
    "--json", "as_json", is_flag=True, help="Taken for uniformity: the output is JSON anyway."
)
FILE = click.argument("file", type=click.File("rb"), default="-")


@click.command()
@click.option("--subject", help="Also check the message against the subject it came on.")
@click.option("--lines", is_flag=True, help="One hex string per line in, one JSON object out.")
@JSON_FLAG
@FILE
@click.pass_context
def decode(
    ctx: click.Context, file: BinaryIO, subject: str | None, lines: bool, as_json: bool
) -> None:
    """Print the JSON that serde_json would write for an envelope's msgpack bytes.

    FILE holds one raw message ("-" or nothing is stdin). What a worker would refuse prints
    {"error": {"code", "path", "message"}} and exits with the code of its class: 10 invalid,
    11 unsupported. With --lines every line is answered; the first refusal gives the exit code.
    """
    del as_json

    def one(text: bytes) -> bytes:
        data = _from_hex(text) if lines else text
        return _json(_read_bytes(data, subject)) + b"\n"

    _run(ctx, file, one, lines=lines)


@click.command()
@click.option(
    "--form",
    type=click.Choice([form.value for form in Form]),
    default=Form.NAMED.value,
    show_default=True,
    help="How the serde types inside are written: as maps or as arrays.",
)
@click.option("--lines", is_flag=True, help="One JSON object per line in, one hex string out.")
@click.option("--json", "as_json", is_flag=True, help='Print {"hex": ...} for each message.')
@FILE
@click.pass_context
def encode(ctx: click.Context, file: BinaryIO, form: str, lines: bool, as_json: bool) -> None:
    """Write the msgpack bytes of an envelope given as JSON: the inverse of decode.

    FILE holds one JSON object ("-" or nothing is stdin). Refuses what decode refuses, on stdout,
    with the same exit codes.
    """

    def one(text: bytes) -> bytes:
        data = pack(_read_json(text, compact=form == Form.COMPACT))
        _read_bytes(data, None)  # what was written is what a worker takes: sizes
        if as_json:
            return _json({"hex": data.hex()}) + b"\n"
        return data.hex().encode() + b"\n" if lines else data

    _run(ctx, file, one, lines=lines)


def _run(ctx: click.Context, file: BinaryIO, one: Callable[[bytes], bytes], *, lines: bool) -> None:
    """Answer each message; the first refusal gives the exit code."""
    content = file.read()
    first = Code.OK
    for message in content.splitlines() if lines else [content]:
        try:
            answer = one(message)
        except DecodeError as error:
            first = error.code if first is Code.OK else first
            text = {"code": error.code, "path": error.path, "message": error.message}
            answer = _json({"error": text}) + b"\n"
        click.echo(answer, nl=False)
    ctx.exit(EXIT_CODES[first])


def _read_bytes(data: bytes, subject: str | None) -> dict[str, object]:
    raw = unpack_map(data, ANSWER)
    kind = _kind_of(raw)
    lane = None if subject is None else lane_of_any(subject, kind)
    if kind == "reply":
        return codec.write_reply(codec.read_reply(raw))
    if kind == "evt":
        return codec.write_event(codec.read_event(raw))
    command = codec.decode_command(data)
    if lane is not None:
        lane.check(command.request)
    _say_ignored(command.unknown_keys)
    return codec.write_command(command)


def _read_json(text: bytes, *, compact: bool) -> dict[str, object]:
    raw = read_json(text, ANSWER)
    kind = _kind_of(raw)
    if kind == "reply":
        return codec.write_reply(codec.read_reply(raw), compact=compact)
    if kind == "evt":
        return codec.write_event(codec.read_event(raw))
    check(raw, COMMAND)
    command = codec.read_command(raw)
    _say_ignored(command.unknown_keys)
    return codec.write_command(command, compact=compact)


def _kind_of(raw: dict[str, object]) -> str:
    """The kind of subject an envelope belongs on, by the key that only it has."""
    if "request" in raw:
        return "cmd"
    if "response" in raw:
        return "reply"
    return "evt" if "kind" in raw else "cmd"


def _from_hex(text: bytes) -> bytes:
    try:
        return bytes.fromhex(text.decode("ascii"))
    except ValueError:
        raise DecodeError("$", "the line is not hex") from None


def _say_ignored(keys: tuple[str, ...]) -> None:
    if keys:
        click.echo(f"ignored keys of the envelope: {', '.join(map(quoted, keys))}", err=True)


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
