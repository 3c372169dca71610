"""`adopt`, `release` and `sweep` over the control socket."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import msgspec

from handlers.errors import Invalid, Unavailable
from schemas import naming
from schemas.requests import InstanceRef
from worker.control.routes import Answer, Body, Route, read_body
from worker.reconcile.claims import Claims
from worker.reconcile.sweep import Sweep

PROGRESS_S = 10.0


class Named(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `adopt` and `release`."""

    tenant_id: str
    pool_id: str
    instance_id: str

    @property
    def ref(self) -> InstanceRef:
        """Raises Invalid: an ID is not valid; names the field."""
        for field in self.__struct_fields__:
            if naming.ID_PATTERN.fullmatch(getattr(self, field)) is None:
                raise Invalid(f"invalid {field}: want {naming.ID_RULE}", path=f"$.{field}")
        return InstanceRef(self.tenant_id, self.pool_id, self.instance_id)


class SweepBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dry_run: bool = False


class ClaimRoutes:
    """What changes hostd's claims on this host; `ready`: whether recovery is complete."""

    def __init__(self, claims: Claims, sweep: Sweep, *, ready: Callable[[], bool]) -> None:
        self._claims = claims
        self._sweep = sweep
        self._ready = ready

    @property
    def routes(self) -> tuple[Route, ...]:
        return (
            Route("POST", "/v1/adopt", self.adopt, writes=True),
            Route("POST", "/v1/release", self.release, writes=True),
            Route("POST", "/v1/sweep", self.sweep, writes=True),
        )

    def adopt(self, body: Body) -> AsyncGenerator[Answer]:
        ref = read_body(body, Named).ref

        async def run() -> Answer:
            return (await self._claims.adopt(ref)).as_map()

        return with_progress(run(), f"the lane of {ref} is busy, or it takes long to look")

    def release(self, body: Body) -> AsyncGenerator[Answer]:
        ref = read_body(body, Named).ref

        async def run() -> Answer:
            return (await self._claims.release(ref)).as_map()

        return with_progress(run(), f"the lane of {ref} is busy")

    def sweep(self, body: Body) -> AsyncGenerator[Answer]:
        dry_run = read_body(body, SweepBody).dry_run
        if not self._ready():
            raise Unavailable("cannot sweep: the worker is still recovering, try again")

        async def run() -> Answer:
            # Not cancelled with the connection: each removal has begun a row of the journal.
            swept = await asyncio.shield(self._sweep.start_now(dry_run=dry_run))
            return {"dry_run": dry_run, "orphans": [each.as_map() for each in swept]}

        return with_progress(run(), "sweeping")


async def with_progress(work: Coroutine[Any, Any, Answer], what: str) -> AsyncGenerator[Answer]:
    """A line every PROGRESS_S until the result; without a client nothing waits for it any more."""
    task = asyncio.create_task(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=PROGRESS_S)
            if not task.done():
                yield {"progress": {"waits": what}}
        yield {"result": task.result()}
    finally:
        task.cancel()
