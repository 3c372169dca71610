"""`[nats] creds`: the worker's NATS credentials."""

import os
import stat

from nats import errors

JWT_MARK = b"-----BEGIN NATS USER JWT-----"
SEED_MARK = b"BEGIN USER NKEY SEED"


class CredentialsFile:
    """`[nats] creds`, read at each attempt to connect, so that a rotation needs no restart.

    Either a NATS credentials file (JWT and seed) or one line `user:password`. Replace it by rename.
    """

    def __init__(self, path: str, *, reread: bool = True) -> None:
        self.path = path
        self._reread = reread
        self._pair: tuple[str, str] | None = None

    def check(self) -> None:
        """Read it in either form.

        Raises:
            OSError: it cannot be read.
            errors.Error: it is readable by others, in neither form, or without a sound seed.
        """
        data = self._read()
        if JWT_MARK not in data:
            self.user()
            return
        import nkeys  # noqa: PLC0415 - 1 MiB, for those who use such a file

        seed = data.partition(SEED_MARK)[2].partition(b"\n")[2].partition(b"\n")[0]
        try:
            nkeys.from_seed(bytearray(seed)).wipe()
        except (nkeys.NkeysError, ValueError) as error:
            raise errors.Error(
                f"{self.path}: expected the seed of a NATS user after its JWT"
            ) from error

    def is_jwt(self) -> bool:
        """Whether it is a NATS credentials file; false while it cannot be read."""
        try:
            return JWT_MARK in self._read()
        except (OSError, errors.Error):
            return False

    def user(self) -> str:
        """Read the file; nats-py calls `password` next, for the same attempt."""
        if self._pair is None or self._reread:
            user, colon, password = self._read().decode(errors="replace").strip().partition(":")
            if not colon or not user or "\n" in password:
                raise errors.Error(
                    f"{self.path}: expected NATS credentials or one line user:password"
                )
            self._pair = user, password
        return self._pair[0]

    def password(self) -> str:
        return self._pair[1] if self._pair else ""

    def _read(self) -> bytes:
        with open(self.path, "rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise errors.Error(f"{self.path}: readable by group or others; chmod 600 it")
            return file.read(65_536)
