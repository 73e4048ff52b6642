"""An S3 server (moto) that rejects writes while a file exists. `python -m tests.faults.s3_server HOST GATE`.

Prints its port when it listens.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

_BUSY = b"<Error><Code>SlowDown</Code><Message>please try again later</Message></Error>"


class Gate:
    """Answers writes with 503 while `gate` exists."""

    def __init__(self, application: Any, gate: Path) -> None:
        self._application = application
        self._gate = gate

    def __call__(self, environment: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environment["REQUEST_METHOD"] in {"PUT", "POST", "DELETE"} and self._gate.exists():
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [_BUSY]
        answer: Iterable[bytes] = self._application(environment, start_response)
        return answer


def main(host: str, gate: str) -> None:
    """Serve until killed."""
    application = Gate(DomainDispatcherApplication(create_backend_app), Path(gate))
    server = make_server(host, 0, application, threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
