"""Send a command and print its reply: ping net-up net-down start stop sleep wake destroy."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import click

from handlers.host.storage.agentd_files import SharedFiles
from schemas import codec, trace_context
from schemas.codes import Code
from schemas.decode_error import DecodeError
from schemas.envelopes import Reply
from schemas.naming import COMMAND_ID_PATTERN
from schemas.requests import (
    DestroyInstance,
    Error,
    Ping,
    Request,
    SetupNetwork,
    SleepInstance,
    StartInstance,
    StopInstance,
    TeardownNetwork,
    TenantNet,
    WakeInstance,
)
from worker.cli.client import connect, new_id
from worker.cli.context import (
    CliError,
    check_id,
    config_option,
    explained_host,
    failures,
    json_option,
    leave,
    load,
    print_json,
    settings_of,
    text_of,
)

F = TypeVar("F", bound=Callable[..., Any])
DEADLINE_MAX_S = 31_536_000
DEFAULT_TIMEOUT_S = 120.0


def bus_options(command: F) -> F:
    """The destination: `--host`, `--url`, `--creds`; then `--config` and `--json`."""
    for add in (
        json_option,
        config_option,
        click.option(
            "--creds", metavar="FILE", help="NATS credentials file. Default: [nats] creds."
        ),
        click.option("--url", help="NATS server URL. Default: [nats] url."),
        click.option("--host", help="Target host ID. Default: [host] id."),
    ):
        command = add(command)
    return command


def _check_deadline(
    _context: click.Context, _option: click.Parameter, seconds: float | None
) -> float | None:
    if seconds is not None and not seconds <= DEADLINE_MAX_S:  # nor NaN
        raise click.BadParameter(f"{seconds} is not at most {DEADLINE_MAX_S} (a year)")
    return seconds


def send_options(command: F) -> F:
    """The options that every command takes, in addition to its own arguments."""
    for add in (
        click.option(
            "--deadline",
            type=click.FloatRange(min=0, min_open=True),
            callback=_check_deadline,
            metavar="S",
            help="Reject the command if it has not started within S seconds.",
        ),
        click.option(
            "--traceparent",
            metavar="TEXT",
            callback=_checked_traceparent,
            help="Make the command part of a trace: W3C Trace Context, 00-TRACE-SPAN-01.",
        ),
        click.option(
            "--id",
            "command_id",
            metavar="ID",
            callback=_checked_command_id,
            help="Command ID (idempotency key). The same command again returns its stored reply.",
        ),
        click.option(
            "--timeout",
            "timeout_s",
            type=click.FloatRange(min=0.1),
            default=DEFAULT_TIMEOUT_S,
            show_default=True,
            metavar="S",
            help="Seconds to wait for the reply.",
        ),
    ):
        command = add(command)
    return bus_options(command)


def _checked_id(_context: click.Context, argument: click.Parameter, value: str) -> str:
    check_id(str(argument.name).removesuffix("_id"), value)
    return value


def _checked_command_id(
    _context: click.Context, _option: click.Parameter, value: str | None
) -> str | None:
    if value is not None and not COMMAND_ID_PATTERN.fullmatch(value):
        raise CliError(
            "invalid", f"--id '{value}': use 1 to 64 characters A-Z, a-z, 0-9, '_' or '-'"
        )
    return value


def _checked_traceparent(
    _context: click.Context, _option: click.Parameter, value: str | None
) -> str | None:
    if value is not None and trace_context.parse(value) is None:
        raise CliError(
            "invalid",
            f"--traceparent {value[:200]!r}: use 00-<32 hex digits>-<16 hex digits>-<2 hex "
            "digits>, lower case, no ID all zero",
        )
    return value


def instance_arguments(command: F) -> F:
    for name in ("instance_id", "pool_id", "tenant_id"):
        metavar = name.removesuffix("_id").upper()
        command = click.argument(name, metavar=metavar, callback=_checked_id)(command)
    return command


class Sends(Protocol):
    def __call__(self, request: Request, *, config: str | None, as_json: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class Instead:
    """What a command of the command line does with its request, if it does not send it."""

    do: Sends


def send(
    request: Request,
    *,
    host: str | None,
    url: str | None,
    creds: str | None,
    config: str | None,
    as_json: bool,
    timeout_s: float,
    command_id: str | None,
    deadline: float | None,
    traceparent: str | None,
) -> None:
    """Send the command, print its reply, exit with the reply's exit code; or what is done instead
    of sending it."""
    instead = click.get_current_context().find_object(Instead)
    if instead is not None:
        instead.do(request, config=config, as_json=as_json)
        return
    loaded = load(config)
    settings = loaded.settings
    deadline_ms = None if deadline is None else int((time.time() + deadline) * 1000)

    async def exchange() -> dict[str, Any]:
        async with connect(settings, url=url, creds=creds) as client:
            return await client.send(
                host or settings.host.id,
                request,
                timeout_s=timeout_s,
                command_id=command_id or new_id(),
                deadline_ms=deadline_ms,
                traceparent=traceparent,
            )

    with explained_host(loaded, host):
        raw = asyncio.run(exchange())
    try:
        reply = codec.read_reply(raw)
    except DecodeError as error:
        raise CliError("internal", f"cannot decode the reply: {error}") from error
    if as_json:
        print_json(raw)
    else:
        click.echo(describe_reply(request, reply))
    leave(reply.code)


def describe_reply(request: Request, reply: Reply) -> str:
    """A reply as text: outcome, subject, status, duration, detail, and what was left behind."""
    about = _subject_of(request)
    if isinstance(reply.response, Error):
        again = "; retryable with a new command ID" if reply.retryable else ""
        lines = [f"{reply.code}: {about}: {reply.response.message}{again}"]
        if reply.supported:
            lines.append(f"supported: {', '.join(reply.supported)}")
    else:
        words = [f"ok: {about}"]
        if status := reply.status or _network_status(request):
            words.append(f"is {status}")
        if not reply.changed and not isinstance(request, Ping):
            words.append("(no change)")
        if reply.replayed:
            words.append("(replayed)")
        lines = [f"{' '.join(words)}, {reply.finished_at_ms - reply.received_at_ms} ms"]
        lines += [f"  {name}: {text_of(value, name)}" for name, value in reply.detail.items()]
    lines.extend(f"left behind: {what}" for what in reply.left_behind)
    if (trace := trace_context.parse(reply.traceparent)) is not None:
        lines.append(f"trace: {trace.trace_id}")
    return "\n".join(lines)


def _network_status(request: Request) -> str:
    """What an `ok` says of a network; its reply has no status."""
    match request:
        case SetupNetwork():
            return "up"
        case TeardownNetwork():
            return "down"
        case _:
            return ""


def _subject_of(request: Request) -> str:
    if isinstance(request, Ping):
        return "host"
    if isinstance(request, SetupNetwork | TeardownNetwork):
        return f"network of {request.tenant_id}"
    return str(request.ref)


def tenant_net(config: str | None, tenant_id: str) -> TenantNet:
    """The `net` object of the tenant's `tenant.json`.

    Raises:
        CliError: `not_found` or `invalid`, naming the file.
    """
    check_id("tenant", tenant_id)
    shared = SharedFiles(settings_of(config).paths.data)
    try:
        with failures():
            return asyncio.run(shared.tenant(tenant_id)).net
    except CliError as error:
        if error.code != Code.NOT_FOUND:
            raise
        path = f"{settings_of(config).paths.data}/tenants/{tenant_id}/tenant.json"
        raise CliError(
            "not_found", f"{path}: no such file; check the tenant ID and [paths] data"
        ) from error


@click.command()
@send_options
def ping(**options: Any) -> None:
    """Check that the worker accepts commands. Sends Ping through the command stream."""
    send(Ping(), **options)


@click.command()
@instance_arguments
@send_options
def start(tenant_id: str, pool_id: str, instance_id: str, **options: Any) -> None:
    """Start an instance and wait until its guest agent answers."""
    send(StartInstance(tenant_id, pool_id, instance_id), **options)


@click.command()
@instance_arguments
@send_options
def stop(tenant_id: str, pool_id: str, instance_id: str, **options: Any) -> None:
    """Stop an instance. Keeps its volumes, discards its snapshot."""
    send(StopInstance(tenant_id, pool_id, instance_id), **options)


@click.command()
@instance_arguments
@click.option("--force", is_flag=True, help="Skip the guest's drain.")
@click.option(
    "--drain-timeout",
    "drain_timeout_secs",
    type=click.IntRange(min=0),
    metavar="S",
    help="Time limit of the guest's drain. Default: the pool's policy.",
)
@send_options
def sleep(
    tenant_id: str,
    pool_id: str,
    instance_id: str,
    force: bool,
    drain_timeout_secs: int | None,
    **options: Any,
) -> None:
    """Snapshot an instance to disk and release its resources."""
    send(SleepInstance(tenant_id, pool_id, instance_id, force, drain_timeout_secs), **options)


@click.command()
@instance_arguments
@send_options
def wake(tenant_id: str, pool_id: str, instance_id: str, **options: Any) -> None:
    """Resume a sleeping instance from its snapshot."""
    send(WakeInstance(tenant_id, pool_id, instance_id), **options)


@click.command()
@instance_arguments
@click.option("--wipe-volumes", is_flag=True, help="Also erase its data disk.")
@send_options
def destroy(
    tenant_id: str, pool_id: str, instance_id: str, wipe_volumes: bool, **options: Any
) -> None:
    """Remove an instance. Keeps its volumes unless --wipe-volumes is given."""
    send(DestroyInstance(tenant_id, pool_id, instance_id, wipe_volumes), **options)


@click.command("net-up")
@click.argument("tenant_id", metavar="TENANT")
@send_options
def net_up(tenant_id: str, config: str | None, **options: Any) -> None:
    """Set up a tenant's network from its tenant.json."""
    send(SetupNetwork(tenant_id, tenant_net(config, tenant_id)), config=config, **options)


@click.command("net-down")
@click.argument("tenant_id", metavar="TENANT")
@send_options
def net_down(tenant_id: str, config: str | None, **options: Any) -> None:
    """Remove a tenant's network. Refused while an instance uses it."""
    send(TeardownNetwork(tenant_id, tenant_net(config, tenant_id)), config=config, **options)
