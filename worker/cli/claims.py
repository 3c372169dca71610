"""What hostd takes for its own on this host, over the control socket: adopt, release, sweep."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import click

from schemas.codes import Code
from schemas.requests import InstanceRef
from worker.cli.commands import instance_arguments
from worker.cli.context import (
    config_option,
    json_option,
    leave,
    print_json,
    printable,
    progress,
    settings_of,
)
from worker.cli.control_client import ControlClient

DONE: Final = {"adopt": "adopted", "release": "released"}


@click.command()
@instance_arguments
@config_option
@json_option
def adopt(
    tenant_id: str, pool_id: str, instance_id: str, config: str | None, as_json: bool
) -> None:
    """Prove whose an instance's VMM or data disk is, and take it up.

    It becomes running, or stopped with its data disk recorded; or nothing changes, and the reasons
    are printed.
    """
    claim("adopt", InstanceRef(tenant_id, pool_id, instance_id), config, as_json=as_json)


@click.command()
@instance_arguments
@config_option
@json_option
def release(
    tenant_id: str, pool_id: str, instance_id: str, config: str | None, as_json: bool
) -> None:
    """Give up hostd's claim on an instance. Nothing is killed.

    Its record goes. A VMM that runs keeps its uid, memory and address until it ends.
    """
    claim("release", InstanceRef(tenant_id, pool_id, instance_id), config, as_json=as_json)


@click.command()
@click.option("--dry-run", is_flag=True, help="Remove nothing; print what would be removed.")
@config_option
@json_option
def sweep(dry_run: bool, config: str | None, as_json: bool) -> None:
    """Remove orphans now that were seen twice, 60 s apart.

    Without the grace period and the hourly budget of the worker's own sweep.
    """
    answer = ask(config)("/v1/sweep", {"dry_run": dry_run})
    orphans: list[dict[str, Any]] = answer["orphans"]
    if as_json:
        print_json(answer)
    for each in () if as_json else orphans:
        text = (
            f"{each['state']:<8} {each['kind']:<10} {each['name']}  (seen for {each['seen_s']} s)"
        )
        click.echo(printable(text + (f": {each['reason']}" if each["reason"] else "")))
    if not orphans and not as_json:
        click.echo("no orphans")
    if any(each["state"] == "failed" for each in orphans):
        leave(Code.HOST_FAULT)


def claim(name: str, ref: InstanceRef, config: str | None, *, as_json: bool) -> None:
    body = {
        "tenant_id": ref.tenant_id,
        "pool_id": ref.pool_id,
        "instance_id": ref.instance_id,
    }
    answer = ask(config)(f"/v1/{name}", body)
    if as_json:
        print_json(answer)
        return
    done = DONE[name] if answer["changed"] else "nothing to do"
    click.echo(f"{ref}: {answer['status']} ({done})")
    for title, facts in (("proved", answer["proved"]), ("not proved", answer["not_proved"])):
        for each in facts:
            click.echo(f"  {title:<10}  {each['fact']}: {each['found']}")


def ask(config: str | None) -> Callable[[str, Mapping[str, Any]], Mapping[str, Any]]:
    """Send to the worker of this host; what it waits for is printed as progress."""
    client = ControlClient(settings_of(config))
    return lambda path, body: client.follow(path, body, lambda each: progress(str(each["waits"])))
