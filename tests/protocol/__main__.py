"""`make protocol`: write the files of docs/protocol that are generated, and delete stale ones."""

import structlog

from tests.protocol.documents import DIRECTORY, generated

structlog.configure(logger_factory=structlog.ReturnLoggerFactory())  # the worker's log
made = generated()
for stale in DIRECTORY.glob("*/*.json"):
    if str(stale.relative_to(DIRECTORY)) not in made:
        stale.unlink()
for name, text in made.items():
    path = DIRECTORY / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
print(f"{len(made)} files in {DIRECTORY}")
