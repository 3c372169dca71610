"""What is on this host, read locally and as root."""

import asyncio

import click

from handlers.errors import Failure
from handlers.host.jails import Jails
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
    jails = Jails(
        data=settings.paths.data, state=settings.paths.state, jail_base=settings.jail_base
    )
    try:
        log = asyncio.run(jails.read_log(InstanceRef(tenant_id, pool_id, instance_id), launch))
    except Failure as error:
        raise CliError(error.code, error.message) from error
    except PermissionError as error:
        raise CliError("host_fault", f"{error.filename}: {error.strerror}") from error
    text = log.decode(errors="replace")
    if as_json:
        print_json({"log": text})
    else:
        click.echo(text, nl=False)
