"""What is on this host, read locally and as root: logs inventory."""

import asyncio

import click
from msgspec import to_builtins

from handlers.errors import Failure
from handlers.host.inventory import collect
from handlers.host.jail.jails import Jails
from schemas.requests import InstanceRef
from worker.cli.commands import instance_arguments
from worker.cli.context import CliError, config_option, json_option, print_json, settings_of


@click.command()
@instance_arguments
@click.option("--launch", type=click.IntRange(min=1), help="Which launch. Default: the last.")
@config_option
@json_option
def logs(
    tenant_id: str,
    pool_id: str,
    instance_id: str,
    launch: int | None,
    config: str | None,
    as_json: bool,
) -> None:
    """Print the VMM's log of an instance; the last three launches are kept."""
    settings = settings_of(config)
    ref = InstanceRef(tenant_id, pool_id, instance_id)
    jails = Jails(
        data=settings.paths.data, state=settings.paths.state, jail_base=settings.jail_base
    )
    try:
        log = asyncio.run(jails.read_log(ref, launch))
    except Failure as error:
        raise CliError(error.code, error.message) from error
    except PermissionError as error:
        raise CliError("host_fault", f"{error.filename}: {error.strerror}") from error
    if not log:
        raise CliError("not_found", f"no launch of {ref} has left a log in {settings.paths.state}")
    text = log.decode(errors="replace")
    if as_json:
        print_json({"log": text})
    else:
        click.echo(text, nl=False)


@click.command()
@click.option("--names", is_flag=True, help="Tell what they are, not only how many.")
@config_option
@json_option
def inventory(names: bool, config: str | None, as_json: bool) -> None:
    """Count what hostd owns on this host, from the kernel and the file systems."""
    settings = settings_of(config)
    try:
        found = collect(settings)
    except Failure as error:
        raise CliError(error.code, error.message) from error
    except PermissionError as error:
        raise CliError(
            "host_fault", f"{error.filename}: {error.strerror}; run it as root"
        ) from error
    if as_json:
        print_json(to_builtins(found) if names else found.counts)
        return
    for kind, count in found.counts.items():
        click.echo(f"{kind:<10} {count:>6}")
        for name in getattr(found, kind) if names else ():
            click.echo(f"  {name}")
