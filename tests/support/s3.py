"""An S3 server for the tests: TEST_S3_ENDPOINT_URL's (with its `AWS_*` credentials), else moto's in this process."""

import os
import secrets
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

ACCESS_KEY, SECRET_KEY, REGION = "test-access-key", "test-secret-key", "us-east-1"


class NoS3(Exception):
    """None can be started here, and why."""


@contextmanager
def server() -> Iterator[dict[str, str]]:
    """Give the `AWS_*` variables that lead to a running server. Raises `NoS3`."""
    if endpoint := os.environ.get("TEST_S3_ENDPOINT_URL"):
        yield {name: value for name, value in os.environ.items() if name.startswith("AWS_")} | {
            "AWS_ENDPOINT_URL": endpoint
        }
        return
    try:
        from moto.moto_server.threaded_moto_server import ThreadedMotoServer
    except ImportError as error:
        raise NoS3("no S3 server: set TEST_S3_ENDPOINT_URL, or install moto") from error
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        host, port = running.get_host_and_port()
        yield {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": REGION,
        }
    finally:
        running.stop()


def make_bucket(environment: dict[str, str]) -> str:
    """Make a bucket of a fresh name and return its URL. A server that wants signatures needs TEST_S3_BUCKET's."""
    if bucket := os.environ.get("TEST_S3_BUCKET"):
        return f"s3://{bucket}/tests-{secrets.token_hex(6)}"
    bucket = f"defeat-{secrets.token_hex(6)}"
    request = urllib.request.Request(f"{environment['AWS_ENDPOINT_URL']}/{bucket}", method="PUT")
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200
    return f"s3://{bucket}/with/prefix"
