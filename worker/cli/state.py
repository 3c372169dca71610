"""Look into this host's worker over its control socket: dump."""

from collections.abc import Iterator, Mapping
from typing import cast

import click

from worker.cli.context import config_option, json_option, print_json, settings_of, text_of
from worker.cli.control_client import ControlClient


@click.command()
@config_option
@json_option
def dump(config: str | None, as_json: bool) -> None:
    """Print the worker's full state: commands, lanes, locks, threads."""
    answer = ControlClient(settings_of(config)).get("/v1/dump")
    if as_json:
        print_json(answer)
        return
    for line in lines_of(answer):
        click.echo(line)


def lines_of(value: Mapping[str, object], indent: str = "") -> Iterator[str]:
    """Nested maps and lists as indented text, one fact per line."""
    for name, inner in value.items():
        if facts := _facts_in(inner):
            yield f"{indent}{name}:"
            yield from lines_of(facts, f"{indent}  ")
        elif items := _maps_in(inner):
            yield f"{indent}{name}:"
            yield from (f"{indent}  - {text_of(each)}" for each in items)
        else:
            yield f"{indent}{name}: {text_of(inner, name)}"


def _facts_in(value: object) -> Mapping[str, object]:
    return cast("dict[str, object]", value) if isinstance(value, dict) else {}


def _maps_in(value: object) -> list[object]:
    """The items of a list of maps; nothing of any other value."""
    items = cast("list[object]", value) if isinstance(value, list) else []
    return items if any(isinstance(each, dict) for each in items) else []
