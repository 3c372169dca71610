"""Shared by all subcommands: settings, output, and the mapping of failures to exit codes."""

import contextlib
import json
import os
from collections.abc import Callable, Generator
from datetime import UTC, datetime
from typing import Any, Final, NoReturn, TypeVar, cast

import click

from handlers.errors import Failure
from schemas.codes import EXIT_CODES, EXIT_NO_ANSWER, Code
from schemas.naming import ID_PATTERN
from schemas.settings import Settings
from worker.settings import DEFAULT_FILE, MACHINE_ID_FILE, Loaded, SettingsError, load_with_origins

NO_ANSWER: Final = "no_answer"
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


class NoWorker(NoAnswer):
    """Nothing subscribes to the queries of this host."""


def exit_code(code: str) -> int:
    """The exit code of a result code; a code unknown to this version counts as `internal`."""
    if code == NO_ANSWER:
        return EXIT_NO_ANSWER
    try:
        return EXIT_CODES[Code(code)]
    except ValueError:
        return EXIT_CODES[Code.INTERNAL]


@contextlib.contextmanager
def failures() -> Generator[None, None, None]:
    """Reports what a mechanism refuses under the same code as the worker would."""
    try:
        yield
    except Failure as error:
        raise CliError(error.code, error.message) from error


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
    path = path_of(config)
    try:
        return load_with_origins(path, os.environ)
    except SettingsError as error:
        named = "" if error.source != path or _option(config) else _origin(path)
        raise CliError(Code.INVALID, f"{error}{named}") from error


def _option(config: str | None) -> str | None:
    """`--config`, after or before the subcommand."""
    context = click.get_current_context(silent=True)
    return config or (context.find_root().params.get("config") if context else None)


def _origin(path: str | None) -> str:
    return " (named by $HOSTD_CONFIG)" if path and path == os.environ.get("HOSTD_CONFIG") else ""


@contextlib.contextmanager
def explained_host(loaded: Loaded, host: str | None) -> Generator[None]:
    """Add to a missing answer where the host ID is from, if it is the machine's."""
    own = loaded.settings.host.id
    try:
        yield
    except NoAnswer as error:
        if host or loaded.origins["host.id"] != MACHINE_ID_FILE or own not in error.message:
            raise
        raise NoAnswer(
            f"{error.message}; the host ID is from {MACHINE_ID_FILE}: if the worker has another "
            "one, set --host or [host] id"
        ) from error


def path_of(config: str | None) -> str | None:
    """The settings file: `--config`, else `$HOSTD_CONFIG`, else the default if it exists."""
    path = chosen_config(config)
    if not path and os.path.exists(DEFAULT_FILE):
        path = DEFAULT_FILE
    return path or None


def chosen_config(config: str | None) -> str | None:
    """The settings file that somebody named: `--config`, else `$HOSTD_CONFIG`."""
    return _option(config) or os.environ.get("HOSTD_CONFIG") or None


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


def text_of(value: object, name: str = "") -> str:
    """A value of a reply or an answer as text; `name` says whether a number is a time."""
    if value is None or value in ([], {}, "", ()):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        pairs = cast("dict[str, object]", value).items()
        return ", ".join(f"{key} {text_of(inner, key)}" for key, inner in pairs)
    if isinstance(value, list | tuple):
        items = cast("list[object]", value)
        nested = any(isinstance(item, dict | list | tuple) for item in items)
        return ("; " if nested else ", ").join(text_of(item) for item in items)
    if isinstance(value, int) and value and (name == "since_ms" or name.endswith("at_ms")):
        return clock(value)
    return _plain(value)


def clock(at_ms: int) -> str:
    """Unix milliseconds as UTC with millisecond precision."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + "Z"


def _plain(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def printable(text: str) -> str:
    """On a terminal: a name that another program gave must not steer it, nor begin a line."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def progress(text: str) -> None:
    """A progress line. On stderr: stdout carries the result only."""
    click.echo(text, err=True)


def leave(code: str) -> NoReturn:
    """Exit with the exit code of a result that was already printed."""
    raise SystemExit(exit_code(code))
