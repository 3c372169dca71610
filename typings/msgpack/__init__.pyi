"""Types of the part of msgpack that hostd uses; the package ships none."""

from collections.abc import Callable

class UnpackException(Exception): ...
class OutOfData(UnpackException): ...
class FormatError(ValueError, UnpackException): ...
class StackError(ValueError, UnpackException): ...

class ExtraData(ValueError):
    unpacked: object
    extra: bytes

class ExtType:
    code: int
    data: bytes
    def __init__(self, code: int, data: bytes) -> None: ...

class Timestamp:
    def __init__(self, seconds: int, nanoseconds: int = ...) -> None: ...

def packb(o: object, *, use_bin_type: bool = ..., unicode_errors: str | None = ...) -> bytes: ...
def unpackb(
    packed: bytes,
    *,
    raw: bool = ...,
    strict_map_key: bool = ...,
    unicode_errors: str | None = ...,
    object_pairs_hook: Callable[[list[tuple[object, object]]], object] | None = ...,
    list_hook: Callable[[list[object]], object] | None = ...,
    max_str_len: int = ...,
    max_bin_len: int = ...,
    max_array_len: int = ...,
    max_map_len: int = ...,
    max_ext_len: int = ...,
) -> object: ...

class Unpacker:
    def __init__(
        self,
        *,
        raw: bool = ...,
        strict_map_key: bool = ...,
        unicode_errors: str | None = ...,
        max_buffer_size: int = ...,
        max_str_len: int = ...,
        max_bin_len: int = ...,
        max_array_len: int = ...,
        max_map_len: int = ...,
        max_ext_len: int = ...,
    ) -> None: ...
    def feed(self, next_bytes: bytes) -> None: ...
    def read_map_header(self) -> int: ...
    def unpack(self) -> object: ...
    def skip(self) -> None: ...
    def tell(self) -> int: ...
