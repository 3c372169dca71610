import click

def write_man_pages(
    name: str,
    cli: click.Command,
    parent_ctx: click.Context | None = None,
    version: str | None = None,
    target_dir: str | None = None,
    date: str | None = None,
) -> None: ...
