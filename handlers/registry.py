"""Command type -> handler: one explicit list on one screen."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from handlers.machine import Host
from handlers.steps import Done, Steps

# The first argument is the request of the type that the handler is listed under.
Handler = Callable[[Any, Steps, Host], Awaitable[Done]]

HANDLERS: Final[Mapping[type, Handler]] = {}
