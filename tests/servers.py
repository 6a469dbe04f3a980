"""Servers on this machine's loopback for tests of remote checkpoints: a web server that can misbehave, a Hub, an S3."""

import json
import re
import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit


@dataclass
class Web:
    """What a web server serves, how it misbehaves, and what it was asked."""

    root: Path
    url: str = ""
    lists: bool = True  # shows an index page
    ranges: bool = True  # serves ranges
    # -> 503, 405, reset, midway, short, stall, slow, whole; of the answer's head: unsized, unplaced, displaced, zipped
    fault: Callable[[str, str, int], str] = lambda method, name, number: ""
    links: tuple[str, ...] = ()  # of the index page, beside the files'
    tags: Callable[[Path], str] = lambda path: f'"{path.stat().st_mtime_ns}-{path.stat().st_size}"'
    stall: float = 1.0
    ended: threading.Event = field(default_factory=threading.Event)  # nobody stalls any longer
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, name, Range
    served: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # body bytes by name
    authorized: set[tuple[str, str | None]] = field(default_factory=set)  # a Hub's: part of it, Authorization
    lock: threading.Lock = field(default_factory=threading.Lock)

    def faulty(self, method: str, name: str) -> str:
        """The fault of this request to a file, which is its `number`-th."""
        with self.lock:
            number = sum(one[:2] == (method, name) for one in self.requests) - 1
        return self.fault(method, name, number)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: Web

    def log_message(self, *_: object) -> None:
        """Nothing: stderr is the test's."""

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def place(self) -> tuple[str, Path] | None:
        """(name for the counts, file) of the request; None: already answered."""
        name = unquote(urlsplit(self.path).path).strip("/")
        if name.endswith("/") or not name or (self.web.root / name).is_dir():
            self._index(self.web.root / name)
            return None
        return name, self.web.root / name

    def _index(self, folder: Path) -> None:
        links = "".join(f'<a href="{path.name}">{path.name}</a>\n' for path in sorted(folder.iterdir()))
        links += "".join(f'<a href="{link}">{link}</a>' for link in self.web.links)
        page = f"<html>{links}</html>".encode() if self.web.lists else b"forbidden"
        self.send_response(200 if self.web.lists else 403)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def _serve(self, body: bool) -> None:
        place = self.place()
        if place is None:
            return
        name, path = place
        asked = self.headers.get("Range", "")
        with self.web.lock:
            self.web.requests.append((self.command, name, asked))
        fault = self.web.faulty(self.command, name)
        if not path.is_file():
            return self._empty(404)
        if fault in ("503", "405"):
            return self._empty(int(fault))
        if fault == "reset":
            return self._reset()
        size = path.stat().st_size
        begin, end, status = 0, size, 200
        if asked and self.web.ranges and fault != "whole":
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
            begin, end, status = int(match[1]), min(int(match[2]) + 1, size), 206
            if begin >= size:
                return self._empty(416)
        self.send_response(status)
        if fault == "unsized":
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(end - begin))
        if fault == "zipped":
            self.send_header("Content-Encoding", "gzip")
        self.send_header("ETag", self.web.tags(path))
        if status == 206 and fault != "unplaced":
            shift = 1 if fault == "displaced" else 0
            self.send_header("Content-Range", f"bytes {begin}-{end - 1 - shift}/{size}")
        self.end_headers()
        if body:
            self._body(name, path, begin, end, fault)

    def _body(self, name: str, path: Path, begin: int, end: int, fault: str) -> None:
        with path.open("rb") as file:
            file.seek(begin)
            data = file.read(end - begin)
        half = len(data) // 2
        try:
            if fault == "short":  # fewer bytes than announced, then the end
                self.wfile.write(data[:half])
                self.close_connection = True
            elif fault == "midway":  # a reset in the middle of the body
                self.wfile.write(data[:half])
                self.wfile.flush()
                return self._reset()
            elif fault == "stall":
                self.wfile.write(data[:half])
                self.wfile.flush()
                self.web.ended.wait(self.web.stall)
                self.close_connection = True
            elif fault == "slow":
                for at in range(0, len(data), max(1, len(data) // 8)):
                    self.wfile.write(data[at : at + max(1, len(data) // 8)])
                    self.wfile.flush()
                    self.web.ended.wait(self.web.stall / 8)
            else:
                self.wfile.write(data)
        except OSError:
            self.close_connection = True
            return
        with self.web.lock:
            self.web.served[name] += half if fault in ("short", "stall") else len(data)

    def _empty(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _reset(self) -> None:
        """RST instead of an orderly end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.rfile.close()  # the last that keeps the socket open
        self.connection.close()
        self.wfile = self.rfile = _Nothing()


class _Nothing:
    """In place of a closed connection's streams."""

    closed = True

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def write(self, data: bytes) -> None: ...


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # connections that were cut on purpose


@contextmanager
def serve(handler: type[BaseHTTPRequestHandler], web: Any) -> Iterator[Any]:
    server = _Server(("127.0.0.1", 0), type("Handler", (handler,), {"web": web}))
    web.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield web
    finally:
        web.ended.set()
        server.shutdown()
        server.server_close()


def web_server(root: Path) -> "contextmanager[Iterator[Web]]":
    """`root`'s folders by http."""
    return serve(_Handler, Web(root))


class _Hub(_Handler):
    """A Hub with one commit: its listing, and files that are redirected to another path as to a CDN."""

    COMMIT = "c0ffee" + "0" * 34

    def place(self) -> tuple[str, Path] | None:
        path = unquote(urlsplit(self.path).path)
        part = "cdn" if path.startswith("/cdn/") else "hub"
        self.web.authorized.add((part, self.headers.get("Authorization")))
        if match := re.fullmatch(r"/api/models/(.+)/revision/(.+)", path):
            return self._listing(match[1], match[2])
        if match := re.fullmatch(r"/(.+)/resolve/(.+?)/(.+)", path):
            assert match[2] == self.COMMIT, match[2]
            self.send_response(302)
            port = self.server.server_address[1]
            self.send_header("Location", quote(f"http://localhost:{port}/cdn/{match[1]}/{match[3]}", safe=":/"))
            self.send_header("X-Repo-Commit", self.COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        name = path.removeprefix("/cdn/")
        return name, self.web.root / name

    def _listing(self, repo: str, revision: str) -> None:
        with self.web.lock:
            self.web.requests.append(("LIST", repo, revision))
        folder = self.web.root / repo
        if not folder.is_dir() or revision not in ("main", "v1", "refs/pr/1", self.COMMIT):
            return self._empty(404)
        siblings = [
            {"rfilename": str(path.relative_to(folder)), "size": path.stat().st_size, "blobId": f"blob of {path.name}"}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        page = json.dumps({"id": repo, "sha": self.COMMIT, "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)


def hub_server(root: Path) -> "contextmanager[Iterator[Web]]":
    """`root`'s folders org/model as models of a Hub."""
    return serve(_Hub, Web(root))


class _Google(BaseHTTPRequestHandler):
    """The part of Google Cloud Storage's JSON API that gcsfs uses for small files: one bucket, in memory."""

    protocol_version = "HTTP/1.1"
    web: "Google"

    def log_message(self, *_: object) -> None:
        """Nothing: stderr is the test's."""

    def _answer(self, status: int, body: object = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def _asked(self) -> tuple[str, str, dict[str, list[str]]]:
        """(kind, object, parameters)"""
        parts = urlsplit(self.path)
        match = re.fullmatch(r"/(download|storage|upload)(?:/storage)?/v1/b/models/o(?:/(.+))?", parts.path)
        kind, name = (match[1], unquote(match[2] or "")) if match else ("", "")
        self.web.requests.append((self.command, name, self.headers.get("Range", "")))
        return kind, name, parse_qs(parts.query)

    def _info(self, name: str) -> dict[str, str]:
        generation, data = self.web.objects[name]
        return {"name": name, "bucket": "models", "size": str(len(data)), "generation": str(generation), "etag": "e"}

    def do_GET(self) -> None:
        kind, name, given = self._asked()
        if self.web.fault == "stall":
            self.web.ended.wait(600)
        if self.web.fault:
            return self._answer(400, {"error": {"code": 400, "message": self.web.fault}})
        if kind == "storage" and not name:
            prefix = given.get("prefix", [""])[0]
            below = sorted(one for one in self.web.objects if one.startswith(prefix))
            items = [self._info(one) for one in below if "/" not in one.removeprefix(prefix)]
            folders = {prefix + one.removeprefix(prefix).split("/")[0] + "/" for one in below} - {
                one["name"] + "/" for one in items
            }
            return self._answer(200, {"items": items, "prefixes": sorted(folders)})
        if name not in self.web.objects or given.get("generation", [None])[0] not in (
            None,
            str(self.web.objects[name][0]),
        ):
            return self._answer(404, {"error": {"code": 404, "message": "No such object"}})
        if kind == "storage":
            return self._answer(200, self._info(name))
        data = self.web.objects[name][1]
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        begin, end = (int(match[1]), int(match[2]) + 1) if match else (0, len(data))
        self._answer(206 if match else 200, data[begin:end], Content_Range=f"bytes {begin}-{end - 1}/{len(data)}")

    def do_POST(self) -> None:
        self._asked()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        _, settings, data = body.removesuffix(b"\n--==0==--").split(b"--==0==", 2)
        name = json.loads(settings.partition(b"\n\n")[2])["name"]
        self.web.put(name, data.partition(b"\n\n")[2])
        self._answer(200, self._info(name))

    def do_DELETE(self) -> None:
        _, name, _ = self._asked()
        self._answer(204 if self.web.objects.pop(name, None) else 404)


@dataclass
class Google:
    """The bucket `models` of a server like Google's."""

    url: str = ""
    objects: dict[str, tuple[int, bytes]] = field(default_factory=dict)  # name -> generation, bytes
    fault: str = ""  # stall, or what it says to every request
    ended: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, str, str]] = field(default_factory=list)

    def put(self, name: str, data: bytes) -> None:
        self.objects[name] = (len(self.requests) + 1, data)

    def files(self, prefix: str) -> dict[str, bytes]:
        """Objects below a prefix."""
        found = {name.removeprefix(prefix + "/"): data for name, (_, data) in self.objects.items()}
        return {name: data for name, data in found.items() if name not in self.objects}


def google_server() -> "contextmanager[Iterator[Google]]":
    return serve(_Google, Google())


# --- S3, by moto


@dataclass
class Bucket:
    """A bucket of a moto server, and what was asked of the server."""

    name: str
    endpoint: str
    client: object  # boto3's
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, key, Range
    # -> 503, cut; lax: does not know If-Match, whole: nor ranges
    fault: Callable[[str, str, int, str], str] = lambda method, key, number, wanted: ""

    def files(self, prefix: str) -> dict[str, bytes]:
        """Objects directly below a prefix."""
        listed = self.client.list_objects_v2(Bucket=self.name, Prefix=prefix + "/").get("Contents", ())
        names = [one["Key"].removeprefix(prefix + "/") for one in listed]
        return {name: self.client.get_object(Bucket=self.name, Key=f"{prefix}/{name}")["Body"].read() for name in names}

    def upload(self, folder: Path, prefix: str) -> str:
        """A folder's files; their address."""
        for path in folder.iterdir():
            self.client.put_object(Bucket=self.name, Key=f"{prefix}/{path.name}", Body=path.read_bytes())
        return f"s3://{self.name}/{prefix}"


@contextmanager
def bucket_server() -> Iterator[Bucket]:
    """An empty bucket. The environment has to say AWS_ENDPOINT_URL and keys."""
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    moto, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()
    bucket = Bucket("models", "", None)

    def app(environ, start_response):
        method, key = environ["REQUEST_METHOD"], environ["PATH_INFO"].removeprefix("/models").strip("/")
        with lock:
            number = sum(one[:2] == (method, key) for one in bucket.requests)
            wanted = environ.get("HTTP_RANGE", "")
            bucket.requests.append((method, key, wanted))
        fault = bucket.fault(method, key, number, wanted)
        if fault == "503":
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"]
        if fault in ("lax", "whole"):
            environ.pop("HTTP_IF_MATCH", None)
        if fault == "whole":
            environ.pop("HTTP_RANGE", None)
        if fault == "cut":
            plain = start_response
            start_response = lambda status, headers: plain(status, [*headers, ("Connection", "close")])
        body = list(moto(environ, start_response))
        return [data[: len(data) // 2] for data in body] if fault == "cut" else body

    class Quiet(WSGIRequestHandler):
        def log(self, *_: object) -> None:
            """Nothing: stderr is the test's."""

    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    bucket.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        bucket.client = boto3.client("s3", endpoint_url=bucket.endpoint)
        bucket.client.create_bucket(Bucket=bucket.name)
        yield bucket
    finally:
        server.shutdown()
        server.server_close()
