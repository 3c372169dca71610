"""`hostd check-config`: validate the settings and print the effective ones."""

import json
from typing import Any

import click

from schemas.settings import Settings
from worker.cli.context import config_option, json_option, load, print_json
from worker.settings import DEFAULT, Key, Loaded, keys


@click.command("check-config")
@config_option
@json_option
def check_config(config: str | None, as_json: bool) -> None:
    """Validate the settings and print each with its unit and origin."""
    loaded = load(config)
    if as_json:
        print_json(
            {
                key.dotted: {
                    "value": value_of(loaded.settings, key),
                    "unit": key.unit,
                    "from": loaded.origins[key.dotted],
                    "default": key.default,
                }
                for key in keys()
            }
        )
        return
    click.echo("\n".join(describe(loaded)))


def value_of(settings: Settings, key: Key) -> Any:
    return getattr(getattr(settings, key.table), key.name)


def describe(loaded: Loaded) -> list[str]:
    """The effective settings as TOML; a comment gives unit and origin."""
    lines: list[str] = []
    table = ""
    for key in keys():
        if key.table != table:
            table = key.table
            lines += ["", f"[{table}]"] if lines else [f"[{table}]"]
        pair = f"{key.name} = {toml(value_of(loaded.settings, key))}"
        origin = loaded.origins[key.dotted]
        notes = [key.unit] if key.unit else []
        notes.append(origin if origin == DEFAULT else f"from {origin}")
        lines.append(f"{pair:<44} # {', '.join(notes)}")
    return lines


def toml(value: object) -> str:
    """A value in TOML; strings, numbers, booleans and lists of strings are the same in JSON."""
    return json.dumps(value, ensure_ascii=False)
