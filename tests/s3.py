"""An S3 store on loopback, and a way to it on which things go wrong."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time

ACCESS_KEY, SECRET_KEY = "AKIAHIERTUNETEST", "hiertune-secret-Ab3dEf6hIj9"
"""The secret is one that can be searched for in all that a search leaves."""
BUCKET = "hiertune-tests"


@contextlib.contextmanager
def s3_server():
    """moto's server with one bucket: `(host:port)`."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    make_bucket(f"{host}:{port}")
    yield f"{host}:{port}"
    server.stop()


def make_bucket(endpoint, name=BUCKET):
    import boto3

    keys = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET_KEY}
    client = boto3.client("s3", endpoint_url=f"http://{endpoint}", region_name="us-east-1", **keys)
    client.create_bucket(Bucket=name)


class FaultyWay:
    """A proxy of one HTTP request per connection. `fault(method, path)` says what happens to each request.

    None: it passes. An int: that status is answered. "hang": nothing is, until `heal`. "cut": half of the
    request's body is passed on, then both ends are closed. "lost": the request passes, its answer does not.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self.fault = lambda method, path: None
        self.seen: list[tuple[str, str]] = []
        self._healed = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def break_with(self, fault) -> None:
        """Every request from now on."""
        self._healed.clear()
        self.fault = lambda method, path: fault

    def heal(self) -> None:
        self.fault = lambda method, path: None
        self._healed.set()

    def close(self) -> None:
        self.heal()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            stream = client.makefile("rb")
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                line = stream.readline()
                if not line:
                    return
                head += line
            method, path = head.split(b" ", 2)[:2]
            lines = head.decode("latin-1").split("\r\n")[1:]
            headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
            self.seen.append((method.decode(), path.decode()))
            fault = self.fault(method.decode(), path.decode())
            if "100-continue" in headers.get("expect", "").lower() and fault != "hang":
                client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            length = int(headers.get("content-length", 0))
            if fault == "hang":
                self._healed.wait(120)
                return
            if "chunked" in headers.get("transfer-encoding", ""):
                body = _chunks(stream)
            else:
                body = stream.read(length)
            if fault == "cut":
                body = body[: len(body) // 2]
            if isinstance(fault, int):
                code = "SlowDown" if fault == 503 else "InternalError"
                text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>try later</Message></Error>"
                client.sendall(
                    f"HTTP/1.1 {fault} Broken\r\nContent-Type: application/xml\r\nContent-Length: {len(text)}"
                    f"\r\nConnection: close\r\n\r\n{text}".encode()
                )
                return
            kept = [
                line
                for line in lines
                if line and line.partition(":")[0].lower() not in ("connection", "expect")
            ]
            first = head.split(b"\r\n", 1)[0]
            forward = "\r\n".join([*kept, "Connection: close", "", ""]).encode("latin-1")
            with socket.create_connection(self._target) as server:
                server.sendall(first + b"\r\n" + forward + body)
                if fault == "cut":
                    time.sleep(0.05)
                    return
                while data := server.recv(1 << 16):
                    if fault != "lost":
                        client.sendall(data)


def _chunks(stream) -> bytes:
    """A chunked body as it came, up to the end of its trailer."""
    body = b""
    while True:
        line = stream.readline()
        body += line
        size = int(line.split(b";")[0], 16)
        if size == 0:
            break
        body += stream.read(size + 2)
    while line not in (b"\r\n", b""):
        line = stream.readline()
        body += line
    return body
