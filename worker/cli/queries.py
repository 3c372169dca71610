"""Read-only queries to a worker over its `ask` subjects, and its events: ls show events."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import click

from worker.cli.client import Client, connect
from worker.cli.commands import bus_options
from worker.cli.context import (
    CliError,
    NoAnswer,
    NoWorker,
    check_id,
    clock,
    explained_host,
    load,
    print_json,
    progress,
    settings_of,
    text_of,
)


def ask(question: str, body: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Send one query to one host; `options` are those of `bus_options`."""
    loaded = load(options["config"])
    settings = loaded.settings

    async def exchange() -> dict[str, Any]:
        async with connect(settings, url=options["url"], creds=options["creds"]) as client:
            return await client.ask(options["host"] or settings.host.id, question, body)

    with explained_host(loaded, options["host"]):
        return asyncio.run(exchange())


def named(tenant_id: str, pool_id: str | None, instance_id: str | None) -> dict[str, Any]:
    """The body of a query about an instance, or a tenant, with the IDs checked."""
    if (pool_id is None) != (instance_id is None):
        raise click.UsageError("expected TENANT or TENANT POOL INSTANCE")
    body = {"tenant_id": tenant_id}
    if pool_id is not None and instance_id is not None:
        body |= {"pool_id": pool_id, "instance_id": instance_id}
    for kind, value in body.items():
        check_id(kind.removesuffix("_id"), value)
    return body


@click.command("ls")
@bus_options
def ls(as_json: bool, **options: Any) -> None:
    """List a host's networks, instances and warm VMMs."""
    answer = ask("list", {}, options)
    if as_json:
        print_json(answer)
        return
    rows = [
        (network["tenant_id"], "network", network["status"], network["bridge_name"])
        for network in answer["networks"]
    ] + [
        (
            f"{instance['tenant_id']}/{instance['pool_id']}/{instance['instance_id']}",
            "instance",
            instance["status"],
            f"since {clock(instance['since_ms'])}",
        )
        for instance in answer["instances"]
    ]
    if warm_vmms := answer.get("warm_vmms", 0):
        rows.append(("warm_pool", "vmms", "ready", str(warm_vmms)))
    if not rows:
        click.echo("no networks or instances")
        return
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*cells, row[3]]))


@click.command()
@click.argument("tenant_id", metavar="TENANT")
@click.argument("pool_id", metavar="[POOL", required=False)
@click.argument("instance_id", metavar="INSTANCE]", required=False)
@bus_options
def show(
    tenant_id: str, pool_id: str | None, instance_id: str | None, as_json: bool, **options: Any
) -> None:
    """Show a tenant's network or an instance in full."""
    answer = ask("describe", named(tenant_id, pool_id, instance_id), options)
    if as_json:
        print_json(answer)
        return
    for name, value in answer.items():
        click.echo(f"{'since' if name == 'since_ms' else name}: {text_of(value, name)}")


@click.command()
@click.argument("tenant_id", metavar="TENANT")
@click.argument("pool_id", metavar="[POOL", required=False)
@click.argument("instance_id", metavar="INSTANCE]", required=False)
@bus_options
def usage(
    tenant_id: str, pool_id: str | None, instance_id: str | None, as_json: bool, **options: Any
) -> None:
    """Show what an instance, or all of a tenant's on a host, has used.

    CURRENT is the launch that runs, or the rest that lasts; ENDED is the sum of those before.
    """
    answer = ask("usage", named(tenant_id, pool_id, instance_id), options)
    if as_json:
        print_json(answer)
        return
    facts = {name: value for name, value in answer.items() if not isinstance(value, dict)}
    for name, value in facts.items():
        click.echo(f"{'since' if name == 'since_ms' else name}: {text_of(value, name)}")
    current: dict[str, Any] = answer.get("current") or current_of(answer)
    ended: dict[str, Any] = answer.get("totals") or {}
    if (from_ms := ended.pop("from_ms", None)) is not None:
        click.echo(f"counted since: {clock(from_ms)}")
    rows: list[tuple[str, ...]] = [("", "CURRENT", "ENDED")]
    for name in dict.fromkeys((*ended, *current)):
        cells = (text_of(part[name], name) if name in part else "" for part in (current, ended))
        rows.append((name, *cells))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        name, *numbers = row
        right = (cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True))
        click.echo("  ".join((name.ljust(widths[0]), *right)).rstrip())


def current_of(answer: dict[str, Any]) -> dict[str, Any]:
    """The current launch, state and snapshot of an instance, by the names of the sums."""
    span: dict[str, Any] = answer.get("span") or {}
    vmm: dict[str, Any] = dict(answer.get("vmm") or {})
    snapshot: dict[str, Any] = answer.get("snapshot") or {}
    vmm.pop("duration_ms", None)
    times = {f"{span['state']}_ms": span["duration_ms"]} if span else {}
    return {**times, **vmm, **{f"snapshot_{name}": size for name, size in snapshot.items()}}


@click.command()
@click.option("--all-hosts", is_flag=True, help="Events of all hosts of the cell.")
@click.option("--kept", is_flag=True, help="Start with retained events (replay), oldest first.")
@click.option("--no-follow", is_flag=True, help="Exit after the retained events.")
@click.option("--count", type=click.IntRange(min=1), help="Exit after this many events.")
@click.option("--timeout", "timeout_s", type=float, metavar="S", help="Exit after S seconds.")
@bus_options
def events(
    all_hosts: bool,
    kept: bool,
    no_follow: bool,
    count: int | None,
    timeout_s: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Follow the event stream. With --json, one event per line.

    Exits with 30 if --timeout expires before --count events have arrived.
    """
    if no_follow and not kept:
        raise click.UsageError("--no-follow requires --kept")
    settings = settings_of(options["config"])
    host = "*" if all_hosts else options["host"] or settings.host.id
    shown = 0
    newest: dict[str, int] = {}

    def show_event(event: dict[str, Any]) -> bool:
        """Print an event unless it is a duplicate; true when `--count` is reached."""
        nonlocal shown
        journal = f"{event['host_id']}:{event['journal_id']}"
        if event["seq"] > newest.get(journal, 0):
            newest[journal] = event["seq"]
            shown += 1
            print_json(event) if as_json else click.echo(describe_event(event))
        return shown == count

    async def follow() -> None:
        async with connect(settings, url=options["url"], creds=options["creds"]) as client:
            live = await client.live_events(host)
            if not all_hosts:
                await _note_absent(client, host)
            if kept:
                stream = f"HOSTD_EVT_{settings.host.cell}"
                if await _until(client.kept_events(stream, host), show_event) or no_follow:
                    return
            await _until(live, show_event)

    async def bounded() -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await follow()
        except TimeoutError as error:
            if count is not None:
                raise NoAnswer(
                    f"received {shown} of {count} events within {timeout_s:g} s"
                ) from error

    with suppress(KeyboardInterrupt):
        asyncio.run(bounded())


async def _note_absent(client: Client, host: str) -> None:
    """Say on stderr that no worker of this host is there; its events may still come."""
    try:
        await client.ask(host, "ping")
    except NoWorker as error:
        progress(f"note: {error.message}; check the host ID if no event is shown")
    except CliError:
        return


async def _until(
    source: AsyncIterator[dict[str, Any]], last: Callable[[dict[str, Any]], bool]
) -> bool:
    async for event in source:
        if last(event):
            return True
    return False


def describe_event(event: dict[str, Any]) -> str:
    """One event on one line."""
    ids = (event.get("tenant_id"), event.get("pool_id"), event.get("instance_id"))
    about = "/".join(part for part in ids if part) or event["host_id"]
    before = f"{event['from']} " if event.get("from") else ""
    change = f" {before}-> {event['to']}" if event.get("to") else ""
    reason = f" ({event['reason']})" if event.get("reason") else ""
    detail: dict[str, Any] = event.get("detail") or {}
    if event["kind"] == "command":  # its type and the code of its reply
        change += "".join(f" {detail[key]}" for key in ("type", "code") if key in detail)
    return f"{clock(event['at_ms'])} {event['seq']} {event['kind']} {about}{change}{reason}"
