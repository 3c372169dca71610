"""`hostd provision`: streams, KV bucket and consumers of a cell, with an admin credential."""

import asyncio
from dataclasses import asdict

import click
import msgspec

from schemas.naming import HOST_ID_PATTERN
from schemas.subjects import Subjects
from worker.bus import accounts, streams
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
JS_DOMAIN = "hostd"  # in the printed accounts, if [nats] js_domain is empty


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
@click.option(
    "--size",
    "sizes",
    metavar="KIND=MIB",
    multiple=True,
    help="Size of a stream or the bucket, KIND one of cmd, evt, reply, dead, state; repeatable. "
    f"Default: {' '.join(f'{kind}={mib}' for kind, mib in streams.SIZES_MIB.items())}.",
)
@click.option(
    "--server-config",
    is_flag=True,
    help="Print the accounts of nats-server.conf for the cell and its hosts; change nothing.",
)
@config_option
@json_option
def provision(
    url: str | None,
    creds: str | None,
    hosts: tuple[str, ...],
    replicas: int,
    sizes: tuple[str, ...],
    server_config: bool,
    config: str | None,
    as_json: bool,
) -> None:
    """Create a cell's streams, KV bucket and one consumer per host. Idempotent.

    With --server-config: print the NATS accounts that give each role exactly what it needs.
    """
    settings = settings_of(config)
    hosts = hosts or (settings.host.id,)
    if bad := [host for host in hosts if not HOST_ID_PATTERN.fullmatch(host)]:
        raise click.UsageError(
            f"invalid host ID {bad[0]!r}: use 1-63 characters A-Z, a-z, 0-9, '_' or '-'"
        )
    sizes_mib = {**streams.SIZES_MIB, **dict(map(_size, sizes))}
    nats = msgspec.structs.replace(
        settings.nats, url=url or settings.nats.url, creds=creds or settings.nats.creds
    )
    subjects = Subjects(settings.root, hosts[0], settings.host.cell)
    if server_config:
        domain = settings.nats.js_domain or JS_DOMAIN
        click.echo(accounts.server_config(subjects, hosts, domain), nl=False)
        return

    async def work() -> list[Made]:
        connection = Connection(nats, name="hostd-provision", inbox="_INBOX.hostd-provision")
        await connection.start()
        try:
            await asyncio.wait_for(connection.wait_connected(), CONNECT_TIMEOUT_S)
            return await provision_cell(
                connection, subjects, hosts, replicas=replicas, sizes_mib=sizes_mib
            )
        except TimeoutError as error:
            raise NoAnswer(
                f"cannot connect to NATS at {nats.url} within {CONNECT_TIMEOUT_S:g} s: "
                f"{connection.last_error or 'no connection'}"
            ) from error
        finally:
            await connection.close()

    progress(f"provisioning cell {settings.host.cell} at {nats.url}, hosts: {', '.join(hosts)}")
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


def _size(text: str) -> tuple[str, int]:
    """`KIND=MIB`, from 1 MiB to 1 PiB."""
    kind, _, mib = text.partition("=")
    if kind not in streams.SIZES_MIB or not mib.isdecimal() or not 1 <= int(mib[:11]) <= 1 << 30:
        raise click.UsageError(
            f"invalid --size {text!r}: use KIND=MIB with KIND {', '.join(streams.SIZES_MIB)} "
            "and 1 to 1073741824 MiB"
        )
    return kind, int(mib)
