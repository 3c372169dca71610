"""`hostd provision`: the streams, bucket and consumers of a cell, with an admin's credential."""

import asyncio
from dataclasses import asdict

import click
import msgspec

from schemas.naming import HOST_ID_PATTERN
from schemas.subjects import Subjects
from worker.bus.connection import Connection
from worker.bus.protocol import BusError, NotProvisioned
from worker.bus.provision import Made
from worker.bus.provision import provision as provision_cell
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
@click.option("--url", help="NATS server. Default: [nats] url.")
@click.option("--creds", metavar="FILE", help="The administrator's NATS credentials.")
@click.option("--host", "hosts", multiple=True, help="Repeatable. Default: [host] id.")
@click.option("--replicas", type=click.IntRange(1, 5), default=1, show_default=True)
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
    """Make what a cell needs on the NATS server, and a consumer per host; may be repeated."""
    settings = settings_of(config)
    hosts = hosts or (settings.host.id,)
    if bad := [host for host in hosts if not HOST_ID_PATTERN.fullmatch(host)]:
        raise click.UsageError(f"{bad[0]!r} is no host id")
    nats = msgspec.structs.replace(
        settings.nats, url=url or settings.nats.url, creds=creds or settings.nats.creds
    )
    subjects = Subjects(settings.root, hosts[0], settings.host.cell)

    async def work() -> list[Made]:
        connection = Connection(nats, name="hostd-provision", inbox="_INBOX.hostd-provision")
        await connection.start()
        try:
            await asyncio.wait_for(connection.wait_connected(), CONNECT_TIMEOUT_S)
            return await provision_cell(connection, subjects, hosts, replicas=replicas)
        except TimeoutError as error:
            raise NoAnswer(f"{nats.url}: {connection.last_error or 'no connection'}") from error
        finally:
            await connection.close()

    progress(f"provisioning cell {settings.host.cell} for {len(hosts)} hosts at {nats.url}")
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
