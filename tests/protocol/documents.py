"""The files of docs/protocol, as they would be generated now."""

import asyncio
import json
import tempfile
from pathlib import Path

from schemas.protocol.asyncapi import asyncapi_documents
from schemas.protocol.json_schema import documents
from tests.protocol.examples import Examples, collect
from tests.protocol.pages import pages

DIRECTORY = Path(__file__).parents[2] / "docs" / "protocol"


def generated() -> dict[str, str]:
    """The text of each file, by its path below `DIRECTORY`."""
    made = {f"schema/{name}.json": each for name, each in documents().items()}
    made |= {f"asyncapi/{role}.json": each for role, each in asyncapi_documents().items()}
    return {name: as_text(each) for name, each in made.items()} | pages(examples())


def examples() -> Examples:
    """Those of a worker that is run for them."""
    with tempfile.TemporaryDirectory(prefix="hostd-protocol-") as directory:
        return asyncio.run(collect(Path(directory)))


def as_text(document: object) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
