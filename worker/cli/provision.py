"""`hostd provision`: streams, KV bucket and consumers of a cell, with an admin credential."""

import asyncio
from dataclasses import asdict

import click
import msgspec

from schemas.naming import HOST_ID_PATTERN
from schemas.subjects import Subjects
from worker import logs
from worker.bus.connection import Connection
from worker.bus.protocol import BusError, NotProvisioned
from worker.bus.provision import Made
from worker.bus.provision import provision as provision_cell
from worker.bus.strict_client import without_password
from worker.cli.client import check_credentials
from worker.cli.context import (
    CliError,
    NoAnswer,
    config_option,
    json_option,
    print_json,
    progress,
    settings_of,
)

CONNECT_TIMEOUT_S = 10.0


@click.command()
@click.option("--url", help="NATS server URL. Default: [nats] url.")
@click.option(
    "--creds",
    metavar="FILE",
    help="NATS credentials file of an administrator. Default: [nats] creds.",
)
@click.option("--host", "hosts", multiple=True, help="Host ID; repeatable. Default: [host] id.")
@click.option(
    "--replicas",
    type=click.IntRange(1, 5),
    default=1,
    show_default=True,
    help="Replicas of each stream and the bucket.",
)
@config_option
@json_option
def provision(
    url: str | None,
    creds: str | None,
    hosts: tuple[str, ...],
    replicas: int,
    config: str | None,
    as_json: bool,
) -> None:
    """Create a cell's streams, KV bucket and one consumer per host. Idempotent."""
    settings = settings_of(config)
    hosts = hosts or (settings.host.id,)
    if bad := [host for host in hosts if not HOST_ID_PATTERN.fullmatch(host)]:
        raise click.UsageError(
            f"invalid host ID {bad[0]!r}: use 1-63 characters A-Z, a-z, 0-9, '_' or '-'"
        )
    nats = msgspec.structs.replace(
        settings.nats, url=url or settings.nats.url, creds=creds or settings.nats.creds
    )
    shown = without_password(nats.url)
    subjects = Subjects(settings.root, hosts[0], settings.host.cell)

    async def work() -> list[Made]:
        connection = Connection(nats, name="hostd-provision", inbox="_INBOX.hostd-provision")
        await connection.start()
        try:
            await asyncio.wait_for(connection.wait_connected(), CONNECT_TIMEOUT_S)
            return await provision_cell(connection, subjects, hosts, replicas=replicas)
        except TimeoutError as error:
            raise NoAnswer(
                f"cannot connect to NATS at {shown} within {CONNECT_TIMEOUT_S:g} s: "
                f"{connection.last_error or 'no connection'}"
            ) from error
        finally:
            await connection.close()

    if nats.creds:
        check_credentials(nats.creds)
    logs.configure("critical", stream="stderr")  # a failure is reported once, in words
    progress(f"provisioning cell {settings.host.cell} at {shown}, hosts: {', '.join(hosts)}")
    try:
        made = asyncio.run(work())
    except NotProvisioned as error:
        raise CliError("conflict", str(error)) from error
    except BusError as error:
        raise NoAnswer(str(error)) from error
    if as_json:
        print_json([asdict(one) for one in made])
    else:
        click.echo("\n".join(str(one) for one in made))
