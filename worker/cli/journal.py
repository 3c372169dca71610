"""`hostd audit`, `hostd journal`: automatic actions; backups, and the way back to one. As root."""

import os
from typing import Any

import click

from handlers.errors import of_os_error
from handlers.host.lock import HostLock
from worker.cli.context import (
    CliError,
    clock,
    config_option,
    failures,
    json_option,
    print_json,
    printable,
    settings_of,
)
from worker.cli.control_client import ControlClient
from worker.journal.migration import backup
from worker.journal.migration.restore import restore as put_back


@click.command()
@config_option
@json_option
def audit(config: str | None, as_json: bool) -> None:
    """List what was done on this host without a command."""
    answer = ControlClient(settings_of(config)).get("/v1/audit")
    if as_json:
        print_json(answer)
        return
    for row in reversed(answer["actions"]):
        result = row["result"] or "under way"
        what = f"{row['kind']} {row['name']}: {result}"
        line = f"{clock(row['at_ms'])}  {row['actor']:<8}  {what}  {row['reason'] or ''}"
        click.echo(printable(line))
    if not answer["actions"]:
        click.echo("no actions")


@click.group()
def journal() -> None:
    """List backups of the journal, or restore one. Each takes --json."""


@journal.command()
@config_option
@json_option
def ls(config: str | None, as_json: bool) -> None:
    """List the backups that were made before the journal's tables changed."""
    path = f"{settings_of(config).paths.state}/journal.db"
    try:
        paths = backup.backups(path)
    except PermissionError as error:
        raise CliError("host_fault", f"{error.filename}: {error.strerror}; run as root") from error
    found: list[dict[str, Any]] = [
        {"path": each, "schema_version": backup.version_in_name(each), "size_bytes": size(each)}
        for each in paths
    ]
    if as_json:
        print_json({"backups": found})
        return
    for each in found:
        click.echo(f"{each['path']}  schema {each['schema_version']}  {each['size_bytes']} bytes")
    if not found:
        click.echo("no backups")


def size(path: str) -> int:
    """In bytes."""
    return os.stat(path).st_size


@journal.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, resolve_path=True))
@click.option("--stale", is_flag=True, help="Also without what happened since the backup.")
@config_option
@json_option
def restore(file: str, stale: bool, config: str | None, as_json: bool) -> None:
    """Put a backup in the place of the journal; stop the worker first."""
    settings = settings_of(config)
    owned = (settings.paths.state, settings.jail_base)
    try:
        with failures():
            os.makedirs(settings.paths.run, mode=0o700, exist_ok=True)
            with HostLock(settings.paths.run, *owned):
                done = put_back(f"{settings.paths.state}/journal.db", file, stale=stale)
    except OSError as error:
        fault = of_os_error(error)
        raise CliError(fault.code, fault.message) from error
    if as_json:
        print_json(
            {
                "schema_version": done.version,
                "kept": done.kept,
                "journal_id": done.journal_id,
                "stale": done.stale,
            }
        )
        return
    since = "without what happened since, as another journal" if done.stale else "up to date"
    click.echo(f"restored: schema {done.version}, {since}, journal_id {done.journal_id}")
    if done.kept:
        click.echo(f"the journal that was in use is kept as {done.kept}")
