"""`hostd provision`: streams, KV bucket and consumers of a cell, with an admin credential."""

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import click
import msgspec

from schemas.naming import HOST_ID_PATTERN
from schemas.settings import NatsSettings, without_password
from schemas.subjects import Subjects
from worker import logs
from worker.bus import accounts, imports, streams
from worker.bus.compact import Compacted, compact
from worker.bus.connection import Connection
from worker.bus.protocol import BusError, NotProvisioned
from worker.bus.provision import Made, provision_mirrors
from worker.bus.provision import provision as provision_cell
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
DOMAIN = HOST_ID_PATTERN
SIZE_MIB = re.compile(r"[0-9]{1,10}")
LACKING = "lacking"
TO_DO = 1  # the exit code of a dry run that finds something, as of `hostd doctor`
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
    help="Replicas of each stream and the bucket. Default: as they are; 1 for new ones.",
)
@click.option(
    "--placement-tag",
    "tags",
    metavar="TAG",
    multiple=True,
    help="Keep streams and bucket on servers with this tag; repeatable. Default: as they are.",
)
@click.option(
    "--placement-cluster",
    "cluster",
    metavar="NAME",
    help="Keep streams and bucket on servers of this cluster. Default: as they are.",
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
    "--check-creds",
    "checks",
    metavar="ACCOUNT=FILE",
    multiple=True,
    help="Check what the server's configuration lacks for an account, with the credentials of one "
    "of its users; e.g. HOST_h1=h1.creds; repeatable.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print what is missing or differs and change nothing; exit code 1 if there is something.",
)
@click.option(
    "--server-config",
    is_flag=True,
    help="Print the accounts of nats-server.conf for the cell and its hosts; change nothing.",
)
@click.option(
    "--mirrors", is_flag=True, help="With --server-config: also the account of a mirror's server."
)
@click.option(
    "--mirror-of",
    metavar="DOMAIN",
    help="On a server of the dashboards: make copies of events, dead letters and state of the cell "
    "in that JetStream domain, and nothing else.",
)
@click.option(
    "--compact",
    "compacts",
    is_flag=True,
    help="Remove deletion markers older than an hour from the state bucket, or from a mirror of it "
    "on the server that is connected to, and do nothing else.",
)
@config_option
@json_option
def provision(
    *,
    url: str | None,
    creds: str | None,
    hosts: tuple[str, ...],
    replicas: int | None,
    tags: tuple[str, ...],
    cluster: str | None,
    sizes: tuple[str, ...],
    checks: tuple[str, ...],
    dry_run: bool,
    server_config: bool,
    mirrors: bool,
    mirror_of: str | None,
    compacts: bool,
    config: str | None,
    as_json: bool,
) -> None:
    """Create a cell's streams, KV bucket and one consumer per host. Idempotent.

    With --server-config: print the NATS accounts that give each role exactly what it needs.
    With --mirror-of: make copies for dashboards instead, on the server that keeps them.
    With --compact: remove what deleted keys left in the bucket instead.
    """
    settings = settings_of(config)
    others = server_config, mirror_of, checks, hosts, replicas, tags, cluster, sizes
    if compacts and any(others):
        raise click.UsageError("--compact goes with --url, --creds and --dry-run only")
    hosts = hosts or (settings.host.id,)
    if (mirrors and not server_config) or (mirror_of is not None and (server_config or checks)):
        raise click.UsageError(
            "--mirrors is an option of --server-config; --mirror-of excludes that and --check-creds"
        )
    if bad := [host for host in hosts if not HOST_ID_PATTERN.fullmatch(host)]:
        raise click.UsageError(
            f"invalid host ID {bad[0]!r}: use 1-63 characters A-Z, a-z, 0-9, '_' or '-'"
        )
    sizes_mib = {**streams.SIZES_MIB, **dict(map(_size, sizes))}
    accounts_to_check = [_account(text, hosts) for text in checks]
    nats = msgspec.structs.replace(
        settings.nats, url=url or settings.nats.url, creds=creds or settings.nats.creds
    )
    shown = without_password(nats.url)
    subjects = Subjects(settings.root, hosts[0], settings.host.cell)
    if server_config:
        domain = settings.nats.js_domain or JS_DOMAIN
        click.echo(accounts.server_config(subjects, hosts, domain, mirror=mirrors), nl=False)
        return

    make = partial(provision_cell, hosts=hosts)
    of = f"bucket {subjects.state_bucket}" if compacts else f"hosts: {', '.join(hosts)}"
    if mirror_of is not None:
        domain = _domain(mirror_of)
        make, of = partial(provision_mirrors, js_domain=domain), f"mirrors of domain {domain}"

    async def work() -> list[Made]:
        async with _connected(nats, f"cannot connect to NATS at {shown}") as connection:
            if compacts:
                found = await compact(connection, subjects, dry_run=dry_run)
                return [_of_markers(found, subjects, dry_run=dry_run)]
            made = await make(
                connection,
                subjects,
                replicas=replicas,
                placement=_placement(cluster, tags),
                sizes_mib=sizes_mib,
                dry_run=dry_run,
            )
        for account, path in accounts_to_check:
            made.append(await _check(nats, account, path, subjects, hosts))
        return made

    if nats.creds:
        check_credentials(nats.creds)
    logs.configure("critical", stream="stderr")  # a failure is reported once, in words
    verb = "comparing" if dry_run else "compacting" if compacts else "provisioning"
    progress(f"{verb} cell {settings.host.cell} at {shown}, {of}")
    try:
        made = asyncio.run(work())
    except NotProvisioned as error:
        raise CliError("conflict", str(error)) from error
    except BusError as error:
        raise NoAnswer(str(error)) from error
    _report(made, as_json=as_json, dry_run=dry_run)


def _of_markers(found: Compacted, subjects: Subjects, *, dry_run: bool) -> Made:
    what = f"deletion markers of bucket {subjects.state_bucket}"
    detail = f"{found.old} older than 1 h, {found.kept} kept"
    if not found.old:
        return Made(what, "found", detail)
    return Made(what, "stale" if dry_run else "removed", detail)


def _report(made: Sequence[Made], *, as_json: bool, dry_run: bool) -> None:
    """Print it; exit with what it means."""
    if as_json:
        print_json([asdict(one) for one in made])
    else:
        click.echo("\n".join(str(one) for one in made))
    if any(one.how == LACKING for one in made):
        raise CliError("conflict", "the NATS server's configuration is incomplete, see above")
    if dry_run and any(one.how != "found" for one in made):
        raise SystemExit(TO_DO)


def _placement(cluster: str | None, tags: Sequence[str]) -> dict[str, Any] | None:
    """None if none is asked for; without the parts that are not, as servers return it."""
    asked = {"cluster": cluster, "tags": list(tags)}
    return {part: value for part, value in asked.items() if value} or None


@contextlib.asynccontextmanager
async def _connected(
    nats: NatsSettings, failed: str, *, inbox: str = "_INBOX.hostd-provision"
) -> AsyncGenerator[Connection]:
    """A connection, closed afterwards; NoAnswer, beginning with `failed`, if there is none."""
    connection = Connection(nats, name="hostd-provision", inbox=inbox)
    await connection.start()
    try:
        try:
            await asyncio.wait_for(connection.wait_connected(), CONNECT_TIMEOUT_S)
        except TimeoutError as error:
            why = connection.last_error or "no connection"
            raise NoAnswer(f"{failed} within {CONNECT_TIMEOUT_S:g} s: {why}") from error
        yield connection
    finally:
        await connection.close()


async def _check(
    nats: NatsSettings, account: str, path: str, subjects: Subjects, hosts: Sequence[str]
) -> Made:
    """Whether the account has what its role needs, with a connection of its own."""
    settings = msgspec.structs.replace(nats, creds=path)
    host_id = account.partition("_")[2] or hosts[0]
    inbox = streams.inbox_prefix(host_id) if account.startswith("HOST_") else "_INBOX.hostd-check"
    failed = f"cannot connect to NATS with {path} for account {account}"
    async with _connected(settings, failed, inbox=inbox) as connection:
        domain = nats.js_domain or JS_DOMAIN
        text = await imports.check(connection, account, subjects, hosts, domain)
    what = f"account {account}"
    return Made(what, "found") if text == "ok" else Made(what, LACKING, text)


def _account(text: str, hosts: Sequence[str]) -> tuple[str, str]:
    """`ACCOUNT=FILE`."""
    account, _, path = text.partition("=")
    known = [name for name in accounts.users(hosts, mirror=True) if name != accounts.SYSTEM]
    if account not in known or not path:
        raise click.UsageError(
            f"invalid --check-creds {text!r}: use ACCOUNT=FILE with ACCOUNT {', '.join(known)}"
        )
    return account, os.path.abspath(path)


def _domain(value: str) -> str:
    """A JetStream domain, one token of a subject."""
    if not DOMAIN.fullmatch(value):
        raise click.UsageError(
            f"invalid --mirror-of {value!r}: use 1-63 characters A-Z, a-z, 0-9, '_' or '-'"
        )
    return value


def _size(text: str) -> tuple[str, int]:
    """`KIND=MIB`, from 1 MiB to 1 PiB."""
    kind, _, mib = text.partition("=")
    if kind not in streams.SIZES_MIB or not SIZE_MIB.fullmatch(mib) or not 1 <= int(mib) <= 1 << 30:
        raise click.UsageError(
            f"invalid --size {text!r}: use KIND=MIB with KIND {', '.join(streams.SIZES_MIB)} "
            "and 1 to 1073741824 MiB"
        )
    return kind, int(mib)
