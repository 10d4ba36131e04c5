"""A real MLflow server on loopback, and a proxy in front of it that misbehaves on request."""

import shutil
import socket
import threading

import pytest


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
        self._port = 0  # any
        self._open = []
        self._listen()
        self.uri = f"http://127.0.0.1:{self._port}"

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
        self._port = self._listener.getsockname()[1]
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


@pytest.fixture(scope="session")
def make_server(bench_module):
    """`make_server(folder)`: an MLflow server over `folder/mlflow.db`, not started."""
    return bench_module("_outage").Server


@pytest.fixture(scope="session")
def server(make_server, empty_store, tmp_path_factory):
    """A server that all tests share: each has its own search, so its own runs."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_store, folder / "mlflow.db")
    server = make_server(folder).start().wait()
    yield server
    server.kill()


@pytest.fixture
def proxy(server):
    proxy = Proxy(server.port)
    yield proxy
    proxy.fault = "gone"
