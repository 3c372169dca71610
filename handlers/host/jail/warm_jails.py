"""The jails of idle VMMs that were launched ahead, each taken by one launch as that launch's jail.

`<jail_base>/firecracker/warm-<12 hex>/root` has the log and an empty tmpfs for secrets, mounted
before the VMM runs: a later mount would not reach its mount namespace. Taking a jail is a rename of
the directory above `root`: the VMM holds `root` itself, so it notices nothing.
"""

import contextlib
import os
import stat

from handlers.errors import Invalid, of_os_error
from handlers.host.jail import secrets_tmpfs
from handlers.host.jail.layout import JailLayout, JailMetadata
from handlers.host.linux.checksummed_json import write_sealed
from handlers.host.linux.file_id import FileId
from handlers.host.linux.rmtree import remove_path
from handlers.jail_names import LOG, METADATA, ROOT, SECRETS_DIR, jail_dir
from schemas import naming

NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class WarmLayout(JailLayout):
    """The jails below one `[vmm] jail_base` that no launch has taken yet."""

    def directory(self, jail_id: str) -> str:
        """Raises Invalid: not the ID of a warm VMM."""
        if naming.WARM_ID_PATTERN.fullmatch(jail_id) is None:
            raise Invalid(f"invalid warm jail ID {jail_id[:100]!r}: want warm- and 12 hex digits")
        return jail_dir(self.jail_base, jail_id)

    def list_ids(self) -> list[str]:
        try:
            names = os.listdir(self.base)
        except FileNotFoundError:
            return []
        return sorted(name for name in names if naming.WARM_ID_PATTERN.fullmatch(name))


class WarmJails:
    """Makes and removes jails that no launch has taken; `take` gives one to a launch.

    Needs: CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_SYS_ADMIN.
    """

    def __init__(self, jail_base: str) -> None:
        self._layout = WarmLayout(jail_base)

    def make(self, warm_id: str, uid: int) -> None:
        """Raises HostFault, Exhausted: it could not be made; nothing of it is left."""
        directory, root = self._layout.directory(warm_id), self._layout.root(warm_id)
        try:
            self._layout.make_base()
            os.mkdir(directory, 0o700)
            os.mkdir(root, 0o700)
            secrets_tmpfs.mount_empty(f"{root}/{SECRETS_DIR}", uid)
            log = os.open(f"{root}/{LOG}", NEW, 0o600)
            try:
                os.fchown(log, uid, uid)
            finally:
                os.close(log)
            os.chown(root, uid, uid)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.remove(warm_id)
            raise of_os_error(error, f"cannot make warm jail {warm_id}") from error

    def take(self, warm_id: str, jail_id: str, metadata: JailMetadata) -> FileId | None:
        """Make it the jail `jail_id`, which must not exist; returns the log's file.

        The metadata is in it from the first moment that it has the new name. None, with nothing
        done, if it is not as it was made: it is not to be used.
        """
        directory, root = self._layout.directory(warm_id), self._layout.root(warm_id)
        try:
            log = os.lstat(f"{root}/{LOG}")
            found, secrets = os.lstat(root), os.lstat(f"{root}/{SECRETS_DIR}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not (
            stat.S_ISDIR(found.st_mode)
            and stat.S_ISREG(log.st_mode)
            and stat.S_ISDIR(secrets.st_mode)
            and log.st_nlink == 1
            and secrets.st_dev != found.st_dev  # the tmpfs is mounted
            and {found.st_uid, log.st_uid, secrets.st_uid} == {metadata.uid}
        ):
            return None
        write_sealed(f"{directory}/{METADATA}", metadata, sync=False)
        os.rename(directory, jail_dir(self._layout.jail_base, jail_id))
        return FileId.of(log)

    def remove(self, warm_id: str) -> None:
        """Remove a jail that nobody took; its VMM must be gone. Absent is success."""
        secrets_tmpfs.unmount_secrets(f"{self._layout.directory(warm_id)}/{ROOT}/{SECRETS_DIR}")
        remove_path(self._layout.directory(warm_id))

    def list_ids(self) -> list[str]:
        return self._layout.list_ids()
