"""`hostd decode` and `hostd encode`: debugging tools for authors of an agentd.

Neither uses NATS. Both accept commands, replies and events, distinguished by their keys, and are as
strict as a worker with the same settings: a command that it would refuse before it looks at the
host is refused here by the same functions, with the same code and path. The settings are read for
a command only, and a host without valid ones takes the defaults: a message is read anywhere.
"""

import functools
import json
from collections.abc import Callable
from typing import BinaryIO

import click

from schemas import codec
from schemas.acceptance import judge
from schemas.codes import EXIT_CODES, Code
from schemas.decode_error import DecodeError, quoted
from schemas.envelopes import Command, Form
from schemas.requests import SetupNetwork, TeardownNetwork
from schemas.settings import Settings
from schemas.subjects import lane_of_any
from schemas.tenant_net import check_net_of
from schemas.unpack import ANSWER, COMMAND, check, pack, read_json, unpack_map
from worker.cli.context import CliError, chosen_config, config_option, settings_of

JSON_FLAG = click.option(
    "--json", "as_json", is_flag=True, help="Accepted for consistency; the output is always JSON."
)
FILE = click.argument("file", type=click.File("rb"), default="-")
GetSettings = Callable[[], Settings]


@click.command()
@click.option("--subject", help="Also check the message against this subject's lane.")
@click.option(
    "--lines", is_flag=True, help="Read one hex string per line, write one JSON object per line."
)
@JSON_FLAG
@config_option
@FILE
@click.pass_context
def decode(
    ctx: click.Context,
    file: BinaryIO,
    subject: str | None,
    lines: bool,
    as_json: bool,
    config: str | None,
) -> None:
    """Decode a msgpack envelope to JSON.

    The output is what serde_json would write. FILE is one raw message; without it, or with "-",
    stdin is read. A message that a worker with these settings would refuse prints {"error":
    {"code", "path", "message"}} and exits with 10 (invalid) or 11 (unsupported). With --lines
    every line gets a line of output and the first error sets the exit code. A host without valid
    settings uses the defaults, unless --config or $HOSTD_CONFIG names them.
    """
    del as_json
    settings = functools.cache(functools.partial(_settings, config))

    def one(text: bytes) -> bytes:
        data = _from_hex(text) if lines else text
        return _json(_read_bytes(data, subject, settings)) + b"\n"

    _run(ctx, file, one, lines=lines)


@click.command()
@click.option(
    "--form",
    type=click.Choice([form.value for form in Form]),
    default=Form.NAMED.value,
    show_default=True,
    help="Form of the serde types: maps (named) or arrays (compact).",
)
@click.option(
    "--lines", is_flag=True, help="Read one JSON object per line, write one hex string per line."
)
@click.option("--json", "as_json", is_flag=True, help='Print {"hex": ...} instead of raw bytes.')
@config_option
@FILE
@click.pass_context
def encode(
    ctx: click.Context,
    file: BinaryIO,
    form: str,
    lines: bool,
    as_json: bool,
    config: str | None,
) -> None:
    """Encode a JSON envelope to msgpack, the inverse of decode.

    FILE is one JSON object; without it, or with "-", stdin is read. Errors are reported as by
    decode: on stdout, with the same exit codes.
    """
    settings = functools.cache(functools.partial(_settings, config))

    def one(text: bytes) -> bytes:
        data = pack(_read_json(text, compact=form == Form.COMPACT))
        _read_bytes(data, None, settings)  # what decode refuses is not encoded
        if as_json:
            return _json({"hex": data.hex()}) + b"\n"
        return data.hex().encode() + b"\n" if lines else data

    _run(ctx, file, one, lines=lines)


def _settings(config: str | None) -> Settings:
    """Those of this host, or the defaults if it has none that are valid.

    Raises:
        click.UsageError: the settings file that was asked for is invalid or cannot be read. Its
            exit code is none of a message's.
    """
    try:
        return settings_of(config)
    except CliError as error:
        if chosen_config(config):
            raise click.UsageError(error.message) from error
        click.echo(f"default settings are used: {error.message}", err=True)
        return Settings()


def _run(ctx: click.Context, file: BinaryIO, one: Callable[[bytes], bytes], *, lines: bool) -> None:
    """Write one result per message; the first error sets the exit code."""
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


def _read_bytes(data: bytes, subject: str | None, settings: GetSettings) -> dict[str, object]:
    try:
        raw = unpack_map(data, ANSWER)
    except DecodeError:
        return _read_command(data, subject, settings)
    kind = _kind_of(raw)
    if kind == "cmd":
        return _read_command(data, subject, settings)
    if subject is not None:
        lane_of_any(subject, kind)
    if kind == "reply":
        return codec.write_reply(codec.read_reply(raw))
    return codec.write_event(codec.read_event(raw))


def _read_command(data: bytes, subject: str | None, get_settings: GetSettings) -> dict[str, object]:
    """The command as plain objects, if a worker with these settings takes it."""
    settings = get_settings()
    lane_of = None if subject is None else lambda: lane_of_any(subject, "cmd")
    command = judge(data, settings.nats.inbox_prefixes, lane_of).content
    if not isinstance(command, Command):
        raise command
    if isinstance(command.request, SetupNetwork | TeardownNetwork):
        check_net_of(command.request, settings.network.allowed)
    _report_ignored(command.unknown_keys)
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
    _report_ignored(command.unknown_keys)
    return codec.write_command(command, compact=compact)


def _kind_of(raw: dict[str, object]) -> str:
    """`cmd`, `reply` or `evt`, by the key that only this envelope has."""
    if "request" in raw:
        return "cmd"
    if "response" in raw:
        return "reply"
    return "evt" if "kind" in raw else "cmd"


def _from_hex(text: bytes) -> bytes:
    try:
        return bytes.fromhex(text.decode("ascii"))
    except ValueError:
        raise DecodeError("$", "invalid line: expected a hex string") from None


def _report_ignored(keys: tuple[str, ...]) -> None:
    if keys:
        click.echo(f"ignored unknown envelope keys: {', '.join(map(quoted, keys))}", err=True)


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
