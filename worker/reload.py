"""SIGHUP: reads the settings again and puts into effect those that can change in a running worker.

These are `[log] level`; the connection: `[nats] url`, `creds`, `tls`, and the content of the two
files; and Firecracker: `[vmm] version`, `allow_untested`, and the programs. Any other setting that
changed is logged and waits for a restart. If something is invalid, nothing changes.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from msgspec.structs import replace

from handlers.errors import Failure
from schemas.settings import Settings, VmmSettings
from worker import logs
from worker.bus.connection import Connection
from worker.bus.protocol import BusError
from worker.preflight import check_connection
from worker.settings import SettingsError, keys

RELOADED: Final = (
    "log.level",
    "nats.url",
    "nats.creds",
    "nats.tls",
    "vmm.version",
    "vmm.allow_untested",
)
Reread = Callable[[VmmSettings], Awaitable[Callable[[], None]]]
"""Reads Firecracker's programs again; the result puts them into effect."""

log = structlog.get_logger()


class Reload:
    """Applies the settings that `read` returns.

    Args:
        settings: those in effect.
        read: reads them again; may raise SettingsError.
        connection: of the worker.
        reread: of Firecracker's programs.
    """

    def __init__(
        self,
        settings: Settings,
        read: Callable[[], Settings],
        connection: Connection,
        reread: Reread,
    ) -> None:
        self._settings, self._read, self._connection = settings, read, connection
        self._reread = reread

    async def run(self, requested: asyncio.Event) -> None:
        """Reload each time that `requested` is set; runs until cancelled."""
        while True:
            await requested.wait()
            requested.clear()
            await self.apply()

    async def apply(self) -> None:
        """Reload once, by the `production` that is in effect; never raises."""
        try:
            new = await asyncio.to_thread(self._read)
            check_connection(replace(new, host=self._settings.host))
            vmm = replace(
                self._settings.vmm,
                version=new.vmm.version,
                allow_untested=new.vmm.allow_untested,
            )
            use_programs = await self._reread(vmm)
            reconnects = await self._connection.reload(new.nats)
        except (SettingsError, Failure, BusError) as error:
            log.error("settings.reload_failed", error=str(error))  # noqa: TRY400
            return
        except Exception as error:  # noqa: BLE001 - nothing has changed, and the worker goes on
            log.error("settings.reload_failed", **logs.facts_of(error))  # noqa: TRY400
            return
        use_programs()
        logs.set_level(new.log.level)
        waiting = changed(self._settings, new)
        nats = self._settings.nats
        self._settings = replace(
            self._settings,
            log=new.log,
            vmm=vmm,
            nats=replace(nats, url=new.nats.url, creds=new.nats.creds, tls=new.nats.tls),
        )
        log.info("settings.reloaded", reconnects=reconnects, need_restart=waiting)


def changed(old: Settings, new: Settings) -> list[str]:
    """The settings that differ and cannot be reloaded."""
    return [
        key.dotted
        for key in keys()
        if key.dotted not in RELOADED
        and getattr(getattr(old, key.table), key.name) != getattr(getattr(new, key.table), key.name)
    ]
