"""What programs may rely on: `worker/client` and the types of `schemas`, held by a committed list.

A change of the list is a change of the surface: add its digest to the changelog with what changed
(`python -m tests.unit.repository.test_client_surface` writes the list and prints the digest).
"""

import enum
import hashlib
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

ROOT = Path(__file__).parents[3]
LIST = ROOT / "tests/golden/client-surface.txt"
MODULES = (
    "schemas.codes",
    "schemas.envelopes",
    "schemas.requests",
    "worker.client.blocking",
    "worker.client.client",
    "worker.client.errors",
    "worker.client.feed",
    "worker.client.queries",
)


def surface() -> str:
    """One line per name, field and method, with its type or signature."""
    lines = [line for name in MODULES for line in _of_module(importlib.import_module(name))]
    return "\n".join(lines) + "\n"


def _of_module(module: ModuleType) -> Iterator[str]:
    for name in sorted(module.__all__):
        value = getattr(module, name)
        yield from _of_name(f"{module.__name__}.{name}", value)


def _of_name(name: str, value: Any) -> Iterator[str]:
    if not inspect.isclass(value):
        yield f"{name}{_signature(value)}" if inspect.isfunction(value) else f"{name} = {value!r}"
        return
    bases = ", ".join(base.__name__ for base in value.__bases__)
    yield f"{name}({bases})"
    if issubclass(value, enum.Enum):
        yield from (f"{name}.{each.name} = {each.value!r}" for each in value)
        return
    if issubclass(value, msgspec.Struct):
        for field in msgspec.structs.fields(value):
            kind = getattr(field.type, "__name__", str(field.type))
            kind = str(field.type) if "[" in str(field.type) else kind
            optional = "" if field.required else " (optional)"
            yield f"{name}.{field.encode_name}: {kind}{optional}"
    else:
        if "__init__" in vars(value) and issubclass(value, Exception):
            yield f"{name}{_signature(value)}"
        for attribute, kind in inspect.get_annotations(value).items():
            yield f"{name}.{attribute}: {getattr(kind, '__name__', kind)}"
    for member, method in sorted(vars(value).items()):
        if member.startswith("_") and member not in ("__aiter__", "__anext__", "__next__"):
            continue
        plain = getattr(method, "__func__", method)
        if isinstance(method, property):
            yield f"{name}.{member} (property)"
        elif inspect.isfunction(plain):
            yield f"{name}.{member}{_signature(plain)}"


def _signature(value: Any) -> str:
    return re.sub(r"\b(?:typing|collections\.abc|schemas|worker)\.(?:\w+\.)*", "",
                  str(inspect.signature(value)))  # fmt: skip


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def test_the_surface_is_the_committed_list() -> None:
    assert surface().splitlines() == LIST.read_text(encoding="utf-8").splitlines()


def test_the_changelog_has_the_digest_of_the_list() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    (newest, *_) = re.findall(r"^## \[.*?(?=^## \[|\Z)", changelog, re.MULTILINE | re.DOTALL)

    assert f"`{digest(LIST.read_text(encoding='utf-8'))}`" in newest, (
        "the surface of the client changed: say what in the changelog, with its new digest"
    )


def test_every_name_of_the_surface_has_a_docstring() -> None:
    bare = [
        f"{module}.{name}"
        for module in MODULES[3:]
        for name in importlib.import_module(module).__all__
        if not inspect.getdoc(getattr(importlib.import_module(module), name))
    ]

    assert bare == []


if __name__ == "__main__":
    LIST.write_text(surface(), encoding="utf-8")
    print(digest(LIST.read_text(encoding="utf-8")))
