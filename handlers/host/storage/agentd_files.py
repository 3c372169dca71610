"""agentd's directories: `<data>/tenants/<t>/...`, read as untrusted input.

`instance.json` is a best-effort copy for agentd; hostd itself relies on its journal and the kernel.
"""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from handlers.errors import Failure, Invalid, NotFound, of_os_error
from handlers.host.linux.file_threads import HandedFd, run_in_thread
from handlers.host.linux.openat2 import Directory
from handlers.host.linux.rmtree import remove_names, remove_tree
from handlers.host.storage.instance_json import (
    INSTANCE,
    JSON_MAX_BYTES,
    PreparedFile,
    checked,
    prepare,
    update,
)
from schemas import naming
from schemas.decode_error import DecodeError
from schemas.files import (
    InstanceFile,
    PoolSpec,
    TenantConfig,
    parse_instance,
    parse_pool,
    parse_tenant,
)
from schemas.requests import InstanceRef

SECRETS_MAX_BYTES = 1 << 20
CURRENT = re.compile(rf"revisions/({naming.REVISION_PATTERN.pattern})")
KNOWN_FILES, KNOWN_BYTES = 512, 4096

T = TypeVar("T")


def instance_path(ref: InstanceRef) -> str:
    """Below the tenant's directory."""
    return f"pools/{ref.pool_id}/instances/{ref.instance_id}"


def split_tenant_path(data: str, path: str) -> tuple[str, str] | None:
    """The tenant ID and the path below the tenant's directory; None if it is not below one.

    For a path that hostd made itself; it is opened by `open_tenant` all the same.
    """
    tenants = f"{data}/tenants/"
    if not path.startswith(tenants):
        return None
    tenant_id, _, below = path.removeprefix(tenants).partition("/")
    return tenant_id, below


def open_tenant(data: str, tenant_id: str) -> Directory:
    """The tenant's directory below the data root; everything else is opened beneath it.

    Raises:
        NotFound: there is no such tenant.
        Invalid: the tenant ID is not valid, or the directory is a symlink.
    """
    if naming.ID_PATTERN.fullmatch(tenant_id) is None:
        raise Invalid(
            f"invalid tenant ID {tenant_id[:64]!r}: use 1-63 characters a-z, 0-9 or '-',"
            " not at the ends"
        )
    with Directory.trusted(data) as root:
        return root.shared(f"tenants/{tenant_id}")


def open_instance(data: str, ref: InstanceRef) -> Directory:
    """The instance's directory. Raises as `open_tenant`."""
    _check_ids(ref)
    with open_tenant(data, ref.tenant_id) as tenant:
        return tenant.directory(instance_path(ref))


def _check_ids(ref: InstanceRef) -> None:
    for each in (ref.pool_id, ref.instance_id):
        if naming.ID_PATTERN.fullmatch(each) is None:
            raise Invalid(
                f"invalid ID {each[:64]!r}: use 1-63 characters a-z, 0-9 or '-', not at the ends"
            )


class SharedFiles:
    """Reads and updates agentd's files below the data root `data`.

    Every file is opened beneath its tenant's directory and without following symlinks.
    """

    def __init__(self, data: str) -> None:
        self._data = data

    async def tenant(self, tenant_id: str) -> TenantConfig:
        return await run_in_thread(self._tenant, tenant_id)

    async def pool(self, tenant_id: str, pool_id: str) -> PoolSpec:
        return await run_in_thread(self._pool, tenant_id, pool_id)

    async def instance(self, ref: InstanceRef) -> InstanceFile:
        return await run_in_thread(self._instance, ref)

    async def instances(
        self, refs: Sequence[InstanceRef]
    ) -> Mapping[InstanceRef, InstanceFile | Failure | OSError]:
        """Many instances' files, or why one cannot be read, in one thread call."""

        def read(ref: InstanceRef) -> InstanceFile | Failure | OSError:
            try:
                return self._instance(ref)
            except (Failure, OSError) as error:
                return error

        return await run_in_thread(lambda: {ref: read(ref) for ref in refs})

    async def of_launch(self, ref: InstanceRef) -> tuple[TenantConfig, PoolSpec, InstanceFile]:
        """The three files that a launch needs, read in this order in one thread call."""

        def read() -> tuple[TenantConfig, PoolSpec, InstanceFile]:
            with open_tenant(self._data, ref.tenant_id) as tenant:
                return _files_of(tenant, ref)

        return await run_in_thread(read)

    async def of_start(self, ref: InstanceRef) -> tuple[TenantConfig, PoolSpec, InstanceFile, str]:
        """As `of_launch`, and the revision that `artifacts/current` names, in one thread call.

        Raises:
            NotFound: also if the pool has no artifacts.
            Invalid: also if `current` is not a relative symlink `revisions/<hash>`.
        """

        def read() -> tuple[TenantConfig, PoolSpec, InstanceFile, str]:
            with open_tenant(self._data, ref.tenant_id) as tenant:
                return *_files_of(tenant, ref), _current_revision(tenant, ref.pool_id)

        return await run_in_thread(read)

    async def secrets(self, tenant_id: str) -> bytes | None:
        """The content of the tenant's `secrets.json`, or None. Never log it."""

        def look() -> bytes | None:
            with open_tenant(self._data, tenant_id) as tenant:
                try:
                    data, _ = tenant.read("secrets.json", SECRETS_MAX_BYTES)
                except NotFound:
                    return None
                return data

        return await run_in_thread(look)

    async def prepare_update(
        self, ref: InstanceRef, changes: dict[str, Any]
    ) -> PreparedFile | None:
        new = HandedFd()
        try:
            return await run_in_thread(self._prepare, ref, changes, new)
        except BaseException:  # cancelled or abandoned: nobody has what it made, or will make
            new.close()
            raise

    async def update_instance(self, ref: InstanceRef, changes: dict[str, Any]) -> None:
        """Change hostd's fields of `instance.json`; `failed` is written as `stopped`.

        All other fields, unknown ones included, and the order of keys stay byte for byte. A write
        by agentd between the last check and the rename (microseconds) is lost; hostd does not
        depend on the fields that agentd may write.
        """
        await run_in_thread(self._update, ref, checked(changes))

    async def remove_instance(self, ref: InstanceRef, *, keep_volumes: bool) -> None:
        """Remove the instance's directory, or all of it but `volumes/`; absent is success."""
        await run_in_thread(self._remove, ref, keep_volumes=keep_volumes)

    def _tenant(self, tenant_id: str) -> TenantConfig:
        with open_tenant(self._data, tenant_id) as tenant:
            return _tenant_config(tenant, tenant_id)

    def _pool(self, tenant_id: str, pool_id: str) -> PoolSpec:
        with open_tenant(self._data, tenant_id) as tenant:
            return _pool_spec(tenant, tenant_id, pool_id)

    def _instance(self, ref: InstanceRef) -> InstanceFile:
        with open_instance(self._data, ref) as directory:
            return _instance_file(directory, ref)

    def _prepare(
        self, ref: InstanceRef, changes: dict[str, Any], new: HandedFd
    ) -> PreparedFile | None:
        with open_instance(self._data, ref) as directory:
            return prepare(directory, changes, new, reopen=lambda: open_instance(self._data, ref))

    def _update(self, ref: InstanceRef, changes: dict[str, Any]) -> None:
        with open_instance(self._data, ref) as directory:
            update(directory, changes)

    def _remove(self, ref: InstanceRef, *, keep_volumes: bool) -> None:
        try:
            instance = open_instance(self._data, ref)
        except NotFound:
            return
        with instance:
            try:
                remove_tree(instance.fd, INSTANCE)  # agentd may have put a directory there
                keep = frozenset({"volumes"}) if keep_volumes else frozenset[str]()
                remove_names(instance.fd, keep=keep)
                os.fsync(instance.fd)
                if not keep_volumes or instance.stat("volumes") is None:
                    self._remove_dir(ref)
            except OSError as error:
                raise of_os_error(error, f"cannot empty {instance.path}") from error

    def _remove_dir(self, ref: InstanceRef) -> None:
        with (
            open_tenant(self._data, ref.tenant_id) as tenant,
            tenant.directory(f"pools/{ref.pool_id}/instances") as parent,
            contextlib.suppress(FileNotFoundError),
        ):
            try:
                os.rmdir(ref.instance_id, dir_fd=parent.fd)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:  # agentd put something there again
                    raise


def _files_of(tenant: Directory, ref: InstanceRef) -> tuple[TenantConfig, PoolSpec, InstanceFile]:
    _check_ids(ref)
    config = _tenant_config(tenant, ref.tenant_id)
    pool = _pool_spec(tenant, ref.tenant_id, ref.pool_id)
    with tenant.directory(instance_path(ref)) as directory:
        return config, pool, _instance_file(directory, ref)


# These files seldom change, and a launch reads both: the same bytes are not parsed again.


@lru_cache(maxsize=KNOWN_FILES)
def _known_tenant(data: bytes, file: str, tenant_id: str) -> TenantConfig:
    return parse_tenant(data, file, tenant_id)


@lru_cache(maxsize=KNOWN_FILES)
def _known_pool(data: bytes, file: str, tenant_id: str, pool_id: str) -> PoolSpec:
    return parse_pool(data, file, tenant_id, pool_id)


def _tenant_config(tenant: Directory, tenant_id: str) -> TenantConfig:
    return _parsed(
        tenant,
        "tenant.json",
        lambda d, f: (_known_tenant if len(d) <= KNOWN_BYTES else parse_tenant)(d, f, tenant_id),
    )


def _pool_spec(tenant: Directory, tenant_id: str, pool_id: str) -> PoolSpec:
    name = f"pools/{pool_id}/pool.json"
    return _parsed(
        tenant,
        name,
        lambda d, f: (_known_pool if len(d) <= KNOWN_BYTES else parse_pool)(
            d, f, tenant_id, pool_id
        ),
    )


def _instance_file(directory: Directory, ref: InstanceRef) -> InstanceFile:
    return _parsed(directory, INSTANCE, lambda d, f: parse_instance(d, f, ref))


def _current_revision(tenant: Directory, pool_id: str) -> str:
    name = f"pools/{pool_id}/artifacts/current"
    path = tenant.named(name)
    try:
        target = tenant.link_target(name)
    except NotFound as error:
        raise NotFound(f"the pool has no artifacts: {path}", path=path) from error
    found = CURRENT.fullmatch(target)
    if found is None:
        raise Invalid(f"invalid target of {path}: want revisions/<hash>", path=path)
    return found[1]


def _parsed(directory: Directory, name: str, parse: Callable[[bytes, str], T]) -> T:
    path = directory.named(name)
    data, _ = directory.read(name, JSON_MAX_BYTES)
    try:
        return parse(data, path)
    except DecodeError as error:
        raise Invalid(str(error), path=error.path) from error
