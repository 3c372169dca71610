"""`POST /v1/explain`: what a command would do now, for `hostd explain`."""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from worker.control.routes import Answer, Body, read_body


class ExplainBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`request` as in a command's envelope."""

    request: Any


class ExplainRoute:
    """Answers the route with `worker.queries.explain.Explain`."""

    def __init__(self, explain: Callable[[object], Awaitable[Answer]]) -> None:
        self._explain = explain

    async def answer(self, body: Body) -> Answer:
        return await self._explain(read_body(body, ExplainBody).request)
