"""Read this host's files and kernel state directly, as root: logs inventory."""

import asyncio

import click
from msgspec import to_builtins

from handlers.errors import Failure
from handlers.host.inventory import collect
from handlers.host.jail.jails import Jails
from schemas.requests import InstanceRef
from worker.cli.commands import instance_arguments
from worker.cli.context import (
    CliError,
    config_option,
    json_option,
    print_json,
    printable,
    settings_of,
)


@click.command()
@instance_arguments
@click.option("--launch", type=click.IntRange(min=1), help="Launch number. Default: the latest.")
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
    """Print the VMM log of an instance. The last three launches are kept."""
    settings = settings_of(config)
    ref = InstanceRef(tenant_id, pool_id, instance_id)
    jails = Jails(
        data=settings.paths.data, state=settings.paths.state, jail_base=settings.jail_base
    )
    try:
        log = asyncio.run(jails.read_log(ref, launch))
        launches = [] if log else asyncio.run(jails.launches(ref))
    except Failure as error:
        raise CliError(error.code, error.message) from error
    except PermissionError as error:
        raise CliError("host_fault", f"{error.filename}: {error.strerror}; run as root") from error
    if not log:
        which = f"launch {launch} of {ref}" if launch else str(ref)
        kept = ", ".join(str(each) for each in sorted(launches)) or "none"
        raise CliError(
            "not_found",
            f"no VMM log of {which} below {settings.paths.state}/logs; launches with a log: {kept}",
        )
    text = log.decode(errors="replace")
    if as_json:
        print_json({"log": text})
    else:
        click.echo(text, nl=False)


@click.command()
@click.option("--names", is_flag=True, help="List names as well as counts.")
@config_option
@json_option
def inventory(names: bool, config: str | None, as_json: bool) -> None:
    """Count hostd's resources on this host. Reads the kernel and the file systems."""
    settings = settings_of(config)
    try:
        owned = collect(settings)
    except Failure as error:
        raise CliError(error.code, error.message) from error
    except PermissionError as error:
        raise CliError("host_fault", f"{error.filename}: {error.strerror}; run as root") from error
    if as_json:
        print_json(to_builtins(owned) if names else owned.counts)
        return
    for kind, count in owned.counts.items():
        click.echo(f"{kind:<10} {count:>6}")
        for name in getattr(owned, kind) if names else ():
            click.echo(f"  {printable(name)}")
