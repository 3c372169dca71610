"""Install pip into the venv of this interpreter, where Python came without ensurepip.

`python fetch_pip.py VERSION SHA256`; with the standard library alone. The wheel is checked before
anything of it runs. The index is PIP_INDEX_URL, which must be set: without pip there is no default.
PIP_CERT is used as pip uses it.
"""

import hashlib
import os
import re
import ssl
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request

TIMEOUT_S = 60


def main(version: str, sha256: str) -> None:
    name = f"pip-{version}-py3-none-any.whl"
    wheel = fetch_wheel(name)
    found = hashlib.sha256(wheel).hexdigest()
    if found != sha256:
        raise SystemExit(f"{name}: sha256 is {found}, pinned is {sha256}")
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, name)
        with open(path, "wb") as file:
            file.write(wheel)
        pip = [sys.executable, os.path.join(path, "pip"), "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", "--no-index", path], check=True)


def fetch_wheel(name: str) -> bytes:
    """Find the file in the index, as the simple repository API lists it, and fetch it."""
    index = os.environ.get("PIP_INDEX_URL")
    if not index:
        raise SystemExit("PIP_INDEX_URL is not set")
    page = index.rstrip("/") + "/pip/"
    link = re.search(rf'href="([^"]*/{re.escape(name)}[^"]*)"', fetch(page).decode())
    if link is None:
        raise SystemExit(f"{name} is not listed in {page}")
    return fetch(urllib.parse.urljoin(page, link[1].replace("&amp;", "&")))


def fetch(url: str) -> bytes:
    trusted = ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S, context=trusted) as answer:  # noqa: S310
            body: bytes = answer.read()
            return body
    except OSError as error:
        raise SystemExit(f"{url}: {error}") from error


if __name__ == "__main__":
    main(*sys.argv[1:])
