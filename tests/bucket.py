"""An emulator of Google Cloud Storage on 127.0.0.1, which counts the requests that it gets.

gcp-storage-emulator lacks a few things that clients rely on, which are added here: preconditions
(`ifGenerationMatch`) and the header that names an object's generation, which tensorstore needs, and
gcsfs's `moveTo`, which is answered by a copy and a removal.
"""

import contextlib
import functools
import http.server
import json
import logging
import os
import re
import socketserver
import threading
import urllib.parse
from collections.abc import Iterator

MOVE = re.compile(r"(.*/b/[^/]+/o/)([^/]+)/moveTo/o/([^/?]+)")
OBJECT = re.compile(r".*/b/([^/]+)/o/([^/?]+)")
NAME = "pixels"


class Bucket:
    """A bucket that is there while its context is; `environment` leads other processes to it.

    Attributes:
      url: gs://..., for paths.
      requests: (method, path with its query) of all that it was asked, in order.
      refuse: a function of (method, path) whose True answers with `status` alone.
    """

    def __init__(self):
        self.url, self.requests, self.refuse = f"gs://{NAME}", [], lambda method, path: False
        self.lock, self.status = threading.RLock(), 503

    def __enter__(self) -> "Bucket":
        from gcp_storage_emulator.handlers.buckets import create_bucket
        from gcp_storage_emulator.storage import Storage

        logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
        logging.getLogger("api.object").setLevel(logging.CRITICAL)
        self.storage = Storage(use_memory_fs=True)
        create_bucket(NAME, self.storage)
        handler = functools.partial(_handler(), self)
        self._server = _Server(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": endpoint,
            "TENSORSTORE_GCS_HTTP_URL": endpoint,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks by gRPC what kind of bucket it is
            "GOOGLE_CLOUD_PROJECT": "none",
            "no_proxy": "127.0.0.1",
        }
        self._before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        _forget_clients()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        _forget_clients()
        for name, value in self._before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})

    def names(self, below: str = "") -> list[str]:
        """The objects whose names begin with `below`."""
        with self.lock:
            return sorted(name for name in self.storage.objects.get(NAME, {}) if name.startswith(below))

    def put(self, name: str, data: bytes) -> None:
        """Makes an object as another program would: no client here knows of it."""
        from gcp_storage_emulator.handlers import objects

        with self.lock:
            made = objects._make_object_resource("", NAME, name, "", str(len(data)))
            self.storage.create_file(NAME, name, data, objects._checksums(data, made))

    def get(self, name: str) -> bytes:
        """The contents of an object."""
        with self.lock:
            return self.storage.get_file(NAME, name)

    def upload(self, folder, below: str) -> str:
        """Puts a local folder's files there; returns its gs:// path."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{below}/{path.relative_to(folder)}", path.read_bytes())
        return f"{self.url}/{below}"

    @contextlib.contextmanager
    def count(self, part: str = "") -> Iterator[list[tuple[str, str]]]:
        """A list that gets the requests of the block whose path, unquoted, holds `part`."""
        begin, found = len(self.requests), []
        yield found
        found += [r for r in self.requests[begin:] if part in urllib.parse.unquote(r[1])]


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads, request_queue_size = True, 64

    def handle_error(self, request, client_address):
        """A client may hang up: gcsfs asks in two ways at once and takes the first answer."""


def _forget_clients() -> None:
    """Makes gcsfs and epath open clients anew: theirs are of another endpoint."""
    from etils.epath import backend
    from gcsfs import GCSFileSystem, core

    GCSFileSystem.clear_instance_cache()
    core.GCSFileSystem.clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()


def _handler():
    from gcp_storage_emulator.server import RequestHandler, Router

    class Handler(RequestHandler):
        """One request at a time, counted, with what the emulator lacks."""

        def __init__(self, bucket: Bucket, *args):
            self.bucket = bucket
            super().__init__(bucket.storage, *args)

        def answer(self, method: str) -> None:
            self.bucket.requests.append((method, self.path))
            if self.bucket.refuse(method, self.path):
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return self.plain(self.bucket.status, {})
            with self.bucket.lock:
                if moved := MOVE.match(self.path):
                    return self.move(moved)
                if not self.as_expected(method):
                    self.rfile.read(int(self.headers.get("Content-Length") or 0))
                    return self.plain(412, {"error": {"code": 412, "message": "conditionNotMet"}})
                Router(self).handle(method)

        def found(self) -> dict | None:
            """The object that the request is about."""
            parts = urllib.parse.urlsplit(self.path)
            name = urllib.parse.parse_qs(parts.query).get("name")
            match = OBJECT.match(parts.path)
            key = name[0] if name else urllib.parse.unquote(match[2]) if match else None
            return self.storage.objects.get(NAME, {}).get(key)

        def as_expected(self, method: str) -> bool:
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
            there = (self.found() or {}).get("generation", "0")
            return query.get("ifGenerationMatch", [there])[0] == there

        def move(self, match) -> None:
            from gcp_storage_emulator.handlers.objects import _copy

            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            old, new = (urllib.parse.unquote(match[i]) for i in (2, 3))
            made = _copy("", self.storage, NAME, old, NAME, new)
            self.storage.delete_file(NAME, old)
            self.plain(200, made)

        def plain(self, status: int, value: dict) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def end_headers(self):
            if (found := self.found()) is not None:
                self.send_header("x-goog-generation", found["generation"])
            super().end_headers()

    for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
        setattr(Handler, f"do_{method}", functools.partialmethod(Handler.answer, method))
    return Handler
