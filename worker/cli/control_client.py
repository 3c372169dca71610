"""A client of the control socket of this host's worker; for root, and without NATS."""

import contextlib
import http.client
import json
import socket
from collections.abc import Callable, Generator, Mapping
from typing import Any, Final, cast

from schemas.codes import Code
from schemas.settings import Settings
from worker.cli.context import CliError, NoAnswer, NoWorker
from worker.control.endpoint import path_in, short_path

# The worker ends a request without progress after 30 s, and reports progress at least as often.
SILENCE_S: Final = 60.0

Answer = Mapping[str, Any]


class _Connection(http.client.HTTPConnection):
    """To a Unix socket. `Host` is sent, since HTTP/1.1 requires it, and means nothing."""

    def __init__(self, run: str) -> None:
        super().__init__("localhost", timeout=SILENCE_S)
        self._run = run

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        with short_path(self._run) as path:
            self.sock.connect(path)


class ControlClient:
    """One request each; raises only CliError."""

    def __init__(self, settings: Settings) -> None:
        self._run = settings.paths.run

    def get(self, path: str) -> Answer:
        with self._request("GET", path, None) as response:
            return _answer_of(response.read())

    def post(self, path: str, body: Answer) -> Answer:
        with self._request("POST", path, body) as response:
            return _answer_of(response.read())

    def follow(self, path: str, body: Answer, show: Callable[[Answer], None]) -> Answer:
        """Send a request that takes long: `show` gets each progress, the result is returned."""
        with self._request("POST", path, body) as response:
            while line := response.readline():
                answer = _answer_of(line)
                if "progress" in answer:
                    show(answer["progress"])
                else:
                    return cast("Answer", answer.get("result", answer))
        raise NoAnswer("the worker ended the connection before the result: does it still run?")

    @contextlib.contextmanager
    def _request(
        self, method: str, path: str, body: Answer | None
    ) -> Generator[http.client.HTTPResponse]:
        connection = _Connection(self._run)
        data = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            connection.request(method, path, body=data, headers=headers)
            yield connection.getresponse()
        except PermissionError as error:
            raise CliError(
                Code.HOST_FAULT, f"{path_in(self._run)}: {error.strerror}; run as root"
            ) from error
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NoWorker(
                f"no worker listens on {path_in(self._run)}: start it, or check [paths] run"
            ) from error
        except TimeoutError as error:
            raise NoAnswer(
                f"the worker sent nothing for {SILENCE_S:g} s on {path_in(self._run)}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise NoAnswer(
                f"the worker ended the connection on {path_in(self._run)}: is it stopping, or are "
                "too many connections open?"
            ) from error
        finally:
            connection.close()


def _answer_of(data: bytes) -> Answer:
    try:
        answer: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise NoAnswer(f"the worker's answer is no JSON: {error}") from error
    if not isinstance(answer, dict):
        raise NoAnswer("the worker's answer is no JSON object")
    found = cast("dict[str, Any]", answer)
    if isinstance(failure := found.get("error"), dict):
        facts = cast("dict[str, Any]", failure)
        raise CliError(str(facts.get("code")), str(facts.get("message")))
    return found
