"""The one exception of all decoders; it names the field at fault."""

import re

from schemas.codes import Code

__all__ = [
    "DecodeError",
    "child",
    "quoted",
]

PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")


class DecodeError(Exception):
    """The input does not decode or breaks a rule; never retried unchanged.

    Args:
        path: the field at fault, e.g. `$.request.SleepInstance.drain_timeout_secs`; for a shared
            file its name comes first, e.g. `pool.json: $.instance_resources.vcpus`.
        message: one sentence, usually `got X, want Y`; input only quoted and bounded.
        code: `invalid`, or `unsupported` for something that a newer agentd may send.
    """

    def __init__(self, path: str, message: str, *, code: Code = Code.INVALID) -> None:
        super().__init__(path, message, code)
        self.path = path
        self.message = message
        self.code = code

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


def child(path: str, key: str | int) -> str:
    """The path of one field or element; an unusual key is quoted and truncated."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    if PLAIN_KEY.fullmatch(key):
        return f"{path}.{key}"
    return f"{path}[{quoted(key)}]"


def quoted(text: str) -> str:
    """Hostile text made safe for a message: ASCII, escaped, at most 64 characters of it."""
    return ascii(text if len(text) <= 64 else text[:64] + "...")
