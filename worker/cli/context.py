"""Shared by all subcommands: settings, output, and the mapping of failures to exit codes."""

import json
import os
from collections.abc import Callable
from typing import Any, Final, NoReturn, TypeVar

import click

from schemas.codes import EXIT_CODES, EXIT_NO_ANSWER, Code
from schemas.naming import ID_PATTERN
from schemas.settings import Settings
from worker.settings import DEFAULT_FILE, Loaded, SettingsError, load_with_origins

NO_ANSWER: Final = "no answer"
F = TypeVar("F", bound=Callable[..., Any])


class CliError(Exception):
    """Ends the subcommand: `main` prints it and exits with the exit code of `code`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class NoAnswer(CliError):
    """No answer: not connected, no stream, no worker, or the timeout expired."""

    def __init__(self, message: str) -> None:
        super().__init__(NO_ANSWER, message)


def exit_code(code: str) -> int:
    """The exit code of a result code; a code unknown to this version counts as `internal`."""
    if code == NO_ANSWER:
        return EXIT_NO_ANSWER
    try:
        return EXIT_CODES[Code(code)]
    except ValueError:
        return EXIT_CODES[Code.INTERNAL]


def config_option(command: F) -> F:
    """`--config FILE`; accepted before and after the subcommand."""
    return click.option(
        "--config",
        metavar="FILE",
        type=click.Path(dir_okay=False),
        help=f"Settings file (TOML). Default: $HOSTD_CONFIG, or {DEFAULT_FILE} if it exists.",
    )(command)


def json_option(command: F) -> F:
    """`--json`, as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")(
        command
    )


def load(config: str | None) -> Loaded:
    """The settings from `--config` (before or after the subcommand) or its default.

    Raises:
        CliError: `invalid`; the message names the file and the key.
    """
    try:
        return load_with_origins(path_of(config), os.environ)
    except SettingsError as error:
        raise CliError(Code.INVALID, str(error)) from error


def path_of(config: str | None) -> str | None:
    """The settings file: `--config`, else `$HOSTD_CONFIG`, else the default if it exists."""
    context = click.get_current_context(silent=True)
    path = config or (context.find_root().params.get("config") if context else None)
    path = path or os.environ.get("HOSTD_CONFIG")
    if not path and os.path.exists(DEFAULT_FILE):
        path = DEFAULT_FILE
    return path or None


def settings_of(config: str | None) -> Settings:
    return load(config).settings


def check_id(kind: str, value: str) -> None:
    """Refuse a malformed tenant, pool or instance ID before it becomes part of a path.

    Raises:
        CliError: `invalid`.
    """
    if not ID_PATTERN.fullmatch(value):
        raise CliError(
            Code.INVALID,
            f"{kind} ID {value!r}: use 1-63 characters a-z, 0-9 or '-', "
            "starting and ending with a letter or digit",
        )


def print_json(value: object) -> None:
    """One JSON document on one line."""
    click.echo(json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_plain))


def _plain(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def progress(text: str) -> None:
    """A progress line. On stderr: stdout carries the result only."""
    click.echo(text, err=True)


def leave(code: str) -> NoReturn:
    """Exit with the exit code of a result that was already printed."""
    raise SystemExit(exit_code(code))
