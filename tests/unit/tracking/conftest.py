"""Real MLflow servers on loopback, and a proxy in front of them that misbehaves on request."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """`mlflow server` over the SQLite file `store`."""

    def __init__(self, store, port=None):
        self.store = store
        self.port = port or free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.store}", "--workers", "1"]
        command += ["--artifacts-destination", str(self.store.parent / "served")]
        log_file = self.store.with_suffix(".log")
        with log_file.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 150
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                    return self
            except OSError:
                assert self._process.poll() is None, log_file.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)

    def stop(self):
        os.killpg(self._process.pid, signal.SIGTERM)  # its own session: the server and its workers
        self._process.wait(30)


class Proxy:
    """Forwards HTTP to `backend` (a port), or does what `fault` says.

    gone: nobody listens. hang: takes connections and never answers. cut: the request is carried out, the
    answer breaks off in the middle. drop: the same, with no answer at all. A number: that HTTP status.
    `login`: the Authorization header without which the answer is 401.
    """

    def __init__(self, backend):
        self.backend = backend
        self.login = None
        self.requests = 0
        self.choose = None
        self._fault = None
        self._port = free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self._open = []
        self._listen()

    @property
    def fault(self):
        return self._fault

    @fault.setter
    def fault(self, fault):
        was_gone, self._fault = self._fault == "gone", fault
        if fault == "gone" and not was_gone:
            self.close()
        elif was_gone and fault != "gone":
            self._listen()

    def _listen(self):
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", self._port))
        self._listener.listen(50)
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            connection.close()
        self._open.clear()

    def _accept(self, listener):
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self._open.append(connection)
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection):
        try:
            request = _message(connection)
            if request:
                self.requests += 1
                self._answer(connection, request, self.choose() if self.choose else self._fault)
        except OSError:
            connection.close()

    def _answer(self, connection, request, fault):
        if fault == "hang":
            return  # with the connection open
        if self.login is not None and f"authorization: {self.login}".lower() not in request.decode().lower():
            fault = 401
        if isinstance(fault, int):
            body = b"the proxy says no"
            head = f"HTTP/1.1 {fault} No\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
            connection.sendall(f"{head}Content-Type: text/plain\r\n\r\n".encode() + body)
        else:
            answer = self._forward(request)
            kept = {"cut": len(answer) - 2, "drop": 0}.get(fault, len(answer))
            connection.sendall(answer[:kept])
        connection.close()

    def _forward(self, request):
        head, _, rest = request.partition(b"\r\n\r\n")
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        with socket.create_connection(("127.0.0.1", self.backend)) as server:
            server.sendall(b"\r\n".join([*lines, b"Connection: close", b"", b""]) + rest)
            answer = b""
            while part := server.recv(1 << 16):
                answer += part
        return answer


def _message(connection):
    """One HTTP request with its body."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(1 << 16)
        if not part:
            return b""
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
    )
    while len(body) < length:
        body += connection.recv(1 << 16)
    return head + b"\r\n\r\n" + body


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """A database with MLflow's tables: making them takes longer than any test here."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def make_server():
    """`make_server(store, port=None)`: a server that ends with the test, unless it was stopped."""
    return Server


@pytest.fixture(scope="session")
def server(empty_store, tmp_path_factory):
    """A server that all tests share: each has its own search, so its own runs."""
    import shutil

    store = tmp_path_factory.mktemp("server") / "mlflow.db"
    shutil.copy(empty_store, store)
    server = Server(store).start()
    yield server
    server.stop()


@pytest.fixture
def proxy(server):
    proxy = Proxy(server.port)
    yield proxy
    proxy.fault = "gone"
