"""The commands, sent over the bus: ping start stop sleep wake destroy net-up net-down."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

import click
import msgspec

from schemas import codec
from schemas.decode_error import DecodeError
from schemas.envelopes import Reply
from schemas.files import TenantConfig
from schemas.naming import ID_PATTERN
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
    config_option,
    json_option,
    leave,
    print_json,
    settings_of,
)

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT_TIMEOUT_S = 120.0


def bus_options(command: F) -> F:
    """Where to: `--host`, `--url`, `--creds`; then `--config` and `--json`."""
    for add in (
        json_option,
        config_option,
        click.option("--creds", metavar="FILE", help="NATS credentials. Default: [nats] creds."),
        click.option("--url", help="NATS server. Default: [nats] url."),
        click.option("--host", help="Host id. Default: [host] id."),
    ):
        command = add(command)
    return command


def send_options(command: F) -> F:
    """What each sent command takes besides its own arguments."""
    for add in (
        click.option("--deadline", type=float, metavar="S", help="Not started after S seconds."),
        click.option("--id", "command_id", help="Command id; the same again tells its outcome."),
        click.option(
            "--timeout",
            "timeout_s",
            type=click.FloatRange(min=0.1),
            default=DEFAULT_TIMEOUT_S,
            show_default=True,
            metavar="S",
            help="How long to wait for the reply.",
        ),
    ):
        command = add(command)
    return bus_options(command)


def instance_arguments(command: F) -> F:
    for name in ("instance_id", "pool_id", "tenant_id"):
        command = click.argument(name, metavar=name.removesuffix("_id").upper())(command)
    return command


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
) -> None:
    """Send, print the reply, exit with the code of its class."""
    settings = settings_of(config)
    deadline_ms = None if deadline is None else int((time.time() + deadline) * 1000)

    async def exchange() -> dict[str, Any]:
        async with connect(settings, url=url, creds=creds) as client:
            return await client.send(
                host or settings.host.id,
                request,
                timeout_s=timeout_s,
                command_id=command_id or new_id(),
                deadline_ms=deadline_ms,
            )

    raw = asyncio.run(exchange())
    try:
        reply = codec.read_reply(raw)
    except DecodeError as error:
        raise CliError("internal", f"an answer that is no reply: {error}") from error
    if as_json:
        print_json(raw)
    else:
        click.echo(describe_reply(request, reply))
    leave(reply.code)


def describe_reply(request: Request, reply: Reply) -> str:
    """A reply for people: outcome, subject, status, time, and what is left behind."""
    about = _subject_of(request)
    if isinstance(reply.response, Error):
        again = "; may be sent again with a new id" if reply.retryable else ""
        lines = [f"{reply.code}: {about}: {reply.response.message}{again}"]
        if reply.supported:
            lines.append(f"supported: {', '.join(reply.supported)}")
    else:
        words = [f"ok: {about}"]
        if reply.status:
            words.append(f"is {reply.status}")
        if not reply.changed and not isinstance(request, Ping):
            words.append("(nothing to do)")
        if reply.replayed:
            words.append("(outcome of before)")
        lines = [f"{' '.join(words)}, {reply.finished_at_ms - reply.received_at_ms} ms"]
        lines += [f"  {name}: {value}" for name, value in reply.detail.items()]
    lines.extend(f"left behind: {what}" for what in reply.left_behind)
    return "\n".join(lines)


def _subject_of(request: Request) -> str:
    if isinstance(request, Ping):
        return "host"
    if isinstance(request, SetupNetwork | TeardownNetwork):
        return f"network of {request.tenant_id}"
    return str(request.ref)


def tenant_net(config: str | None, tenant_id: str) -> TenantNet:
    """The tenant's net as `tenant.json` has it.

    Raises:
        CliError: `not_found` or `invalid`, naming the file.
    """
    if not ID_PATTERN.fullmatch(tenant_id):
        raise CliError("invalid", f"{tenant_id!r} is no id: 1 to 63 of a-z 0-9 and inner -")
    path = f"{settings_of(config).paths.data}/tenants/{tenant_id}/tenant.json"
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(), type=TenantConfig).net
    except FileNotFoundError as error:
        raise CliError("not_found", f"{path}: no such file") from error
    except (OSError, msgspec.MsgspecError) as error:
        raise CliError("invalid", f"{path}: {error}") from error


@click.command()
@send_options
def ping(**options: Any) -> None:
    """Ask through the command stream whether the worker takes commands."""
    send(Ping(), **options)


@click.command()
@instance_arguments
@send_options
def start(tenant_id: str, pool_id: str, instance_id: str, **options: Any) -> None:
    """Start an instance: a jailed VMM runs it and its guest answers."""
    send(StartInstance(tenant_id, pool_id, instance_id), **options)


@click.command()
@instance_arguments
@send_options
def stop(tenant_id: str, pool_id: str, instance_id: str, **options: Any) -> None:
    """Stop an instance; its volumes stay, a snapshot does not."""
    send(StopInstance(tenant_id, pool_id, instance_id), **options)


@click.command()
@instance_arguments
@click.option("--force", is_flag=True, help="Do not ask the guest to drain first.")
@click.option(
    "--drain-timeout",
    "drain_timeout_secs",
    type=click.IntRange(min=0),
    metavar="S",
    help="Seconds the guest may drain. Default: the pool's policy.",
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
    """Put an instance to sleep: its memory goes to disk, all else is released."""
    send(SleepInstance(tenant_id, pool_id, instance_id, force, drain_timeout_secs), **options)


@click.command()
@instance_arguments
@send_options
def wake(tenant_id: str, pool_id: str, instance_id: str, **options: Any) -> None:
    """Wake a sleeping instance where it stopped."""
    send(WakeInstance(tenant_id, pool_id, instance_id), **options)


@click.command()
@instance_arguments
@click.option("--wipe-volumes", is_flag=True, help="Also wipe its data disk.")
@send_options
def destroy(
    tenant_id: str, pool_id: str, instance_id: str, wipe_volumes: bool, **options: Any
) -> None:
    """Destroy an instance."""
    send(DestroyInstance(tenant_id, pool_id, instance_id, wipe_volumes), **options)


@click.command("net-up")
@click.argument("tenant_id", metavar="TENANT")
@send_options
def net_up(tenant_id: str, config: str | None, **options: Any) -> None:
    """Set up a tenant's network as tenant.json has it; kept in force until net-down."""
    send(SetupNetwork(tenant_id, tenant_net(config, tenant_id)), config=config, **options)


@click.command("net-down")
@click.argument("tenant_id", metavar="TENANT")
@send_options
def net_down(tenant_id: str, config: str | None, **options: Any) -> None:
    """Take down a tenant's network; refused while an instance uses it."""
    send(TeardownNetwork(tenant_id, tenant_net(config, tenant_id)), config=config, **options)
