"""Runs a module, `-m bench.as_installed MODULE`, as where only `requirements.lock` is installed.

structlog imports rich, which imports pygments and attrs, if they are there: in the development
environment they are, and cost a worker 4 MiB.
"""

import runpy
import sys

if __name__ == "__main__":
    sys.modules["rich"] = None  # type: ignore[assignment]
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
