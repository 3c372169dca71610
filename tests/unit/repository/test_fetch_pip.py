"""Where Python came without ensurepip, pip comes from the index: the pinned one or none at all."""

import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "deploy" / "fetch_pip.py"
NAME = "pip-1.0-py3-none-any.whl"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        pass


@pytest.fixture
def index(tmp_path: Path) -> Iterator[str]:
    """The URL of an index on loopback with one pip, which prints its arguments."""
    page = tmp_path / "simple" / "pip"
    page.mkdir(parents=True)
    (page / "index.html").write_text(f'<a href="../../files/{NAME}#sha256=0">{NAME}</a>')
    (tmp_path / "files").mkdir()
    with zipfile.ZipFile(tmp_path / "files" / NAME, "w") as wheel:
        wheel.writestr("pip/__main__.py", "import sys; print(*sys.argv[1:])")
    handler = partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}/simple"
        server.shutdown()
        serving.join()


def fetch(index: str, version: str, sha256: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    return subprocess.run(
        [sys.executable, SCRIPT, version, sha256],
        env=environment | {"PIP_INDEX_URL": index},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_pinned_wheel_installs_itself(index: str, tmp_path: Path) -> None:
    sha256 = hashlib.sha256((tmp_path / "files" / NAME).read_bytes()).hexdigest()

    done = fetch(index, "1.0", sha256)

    assert done.returncode == 0, done.stderr
    assert "install --quiet --no-index" in done.stdout
    assert done.stdout.rstrip().endswith(NAME)


def test_nothing_of_another_wheel_runs(index: str) -> None:
    done = fetch(index, "1.0", "0" * 64)

    assert (done.returncode, done.stdout) == (1, "")
    assert f"pinned is {'0' * 64}" in done.stderr


def test_an_index_without_it_is_named(index: str) -> None:
    done = fetch(index, "2.0", "0" * 64)

    assert done.stderr == f"pip-2.0-py3-none-any.whl is not listed in {index}/pip/\n"


def test_an_index_that_does_not_answer_is_named() -> None:
    done = fetch("http://127.0.0.1:1/simple", "1.0", "0" * 64)

    assert done.returncode == 1
    assert done.stderr.startswith("http://127.0.0.1:1/simple/pip/: ")


def test_without_an_index_nothing_is_fetched() -> None:
    done = fetch("", "1.0", "0" * 64)

    assert done.returncode == 1
    assert done.stderr == "PIP_INDEX_URL is not set\n"
