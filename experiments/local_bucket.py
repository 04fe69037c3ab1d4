"""A bucket on this machine: gcp-storage-emulator, in this process, on a loopback address.

What it lacks, and the promises of a run rest on, is added here: the precondition
`ifGenerationMatch`, by which an object is created only if there is none and removed only if it is
still the same; the generation of what is read; binary uploads in parts, which it would read as
e-mail, empty ones, and those that a killed client has not sent to their end, which are no objects;
and requests that come together, which are answered one by one. On request some fail, as those of a
busy store do.
"""

import contextlib
import http.server
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

import gcp_storage_emulator.server

emulator: Any = gcp_storage_emulator.server  # without types

# Read when gcsfs is imported; it would ask Google what kind of bucket it is.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

BUCKET = "bucket"
URL = f"gs://{BUCKET}"


class Faults:
    """What the store does wrong, and how often it was asked."""

    def __init__(self) -> None:
        self.every = 0
        """One of so many requests fails; 0: none."""
        self.status = 503
        """Its answer; 0: none, the connection is closed."""
        self.asked = self.failed = 0

    def hit(self) -> bool:
        self.asked += 1
        hit = bool(self.every) and self.asked % self.every == 0
        self.failed += hit
        return hit


class Store(http.server.ThreadingHTTPServer):
    """The emulator, at an address of its own."""

    def __init__(self) -> None:
        self.storage = emulator.Storage(use_memory_fs=True)
        emulator.buckets.create_bucket(BUCKET, self.storage)
        self.faults, self.lock = Faults(), threading.Lock()
        super().__init__(("127.0.0.1", 0), lambda *args: _Handler(self, *args))
        address = f"http://127.0.0.1:{self.server_port}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": address,  # gcsfs and Google's own client
            "TENSORSTORE_GCS_HTTP_URL": address,  # Orbax's arrays
            "GOOGLE_CLOUD_PROJECT": "project",
            "NO_GCE_CHECK": "true",  # credentials would be looked for in the network
        }

    @property
    def objects(self) -> dict[str, bytes]:
        """All objects of the bucket by name."""
        with self.lock:
            names = sorted(self.storage.objects.get(BUCKET, {}))
            return {name: self.storage.get_file(BUCKET, name) for name in names}


@contextlib.contextmanager
def running_store() -> Iterator[Store]:
    """A store with one bucket; while it runs, the environment leads to it."""
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    logging.getLogger("api.object").setLevel(logging.CRITICAL)
    store = Store()
    threading.Thread(target=store.serve_forever, args=(0.01,), daemon=True).start()
    before = {name: os.environ.get(name) for name in store.environment}
    os.environ.update(store.environment)
    forget_store()
    try:
        yield store
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        forget_store()
        store.shutdown()
        store.server_close()


def forget_store() -> None:
    """Lets this process ask for credentials and buckets again."""
    import gcsfs
    from etils.epath import backend
    from orbax.checkpoint._src.path import gcs_utils

    from ghm_jax import bucket

    gcsfs.GCSFileSystem.clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()
    gcs_utils.get_bucket.cache_clear()
    bucket._check_access.cache_clear()
    bucket._system.cache_clear()


class _Handler(emulator.RequestHandler):
    """Answers one request at a time, and some with an error."""

    def __init__(self, store: Store, *args: Any) -> None:
        self._store = store
        super().__init__(store.storage, *args)

    def answer(self, usual: Callable[[Any], None]) -> None:
        faults = self._store.faults
        # Clients hang up on what they no longer want.
        with self._store.lock, contextlib.suppress(ConnectionError):
            if not faults.hit():
                usual(self)
            elif not faults.status:
                self.close_connection = True
            else:
                self.send_response(faults.status)
                self.send_header("Content-Length", "0")
                self.send_header("Connection", "close")
                self.end_headers()

    def do_GET(self) -> None:  # noqa: N802
        self.answer(emulator.RequestHandler.do_GET)

    def do_POST(self) -> None:  # noqa: N802
        self.answer(emulator.RequestHandler.do_POST)

    def do_PUT(self) -> None:  # noqa: N802
        self.answer(emulator.RequestHandler.do_PUT)

    def do_PATCH(self) -> None:  # noqa: N802
        self.answer(emulator.RequestHandler.do_PATCH)

    def do_DELETE(self) -> None:  # noqa: N802
        self.answer(emulator.RequestHandler.do_DELETE)


def _checked(usual: Callable[..., None]) -> Callable[..., None]:
    """A handler that heeds the generation of an object, and tells it."""

    def handle(request: Any, response: Any, storage: Any, *args: Any, **kwargs: Any) -> None:
        name = request.params.get("object_id") or request.query.get("name", [None])[0]
        objects = storage.objects.get(request.params["bucket_name"], {})
        found = objects.get(name or request.data["meta"]["name"], {"generation": "0"})
        generation = str(found["generation"])
        if request.query.get("ifGenerationMatch", [generation]) != [generation]:
            response.status = HTTPStatus.PRECONDITION_FAILED
        elif request.query.get("ifGenerationNotMatch") == [generation]:
            response.status = HTTPStatus.NOT_MODIFIED
        else:
            response["x-goog-generation"] = generation
            usual(request, response, storage, *args, **kwargs)

    return handle


def _read_data(request_handler: Any, query: Any, usual: Any = emulator._read_data) -> Any:
    """The body of a request."""
    kind = request_handler.headers.get("Content-Type", "")
    if not kind.startswith("multipart/related"):
        body = usual(request_handler, query)
        return b"" if body is None and query.get("uploadType") == ["media"] else body
    raw = emulator._decode_raw_data(emulator._read_raw_data(request_handler), request_handler)
    boundary = b"--" + kind.partition("boundary=")[2].strip("\"' ").encode()
    # Up to the first boundary, two parts of head and body, and what is after the last boundary.
    _, first, rest = raw.split(boundary, 2)
    second = rest[: rest.rindex(boundary)]
    head, _, body = _part(second)
    return {
        "meta": json.loads(_part(first)[2]),
        "content": body,
        "content-type": head.decode().partition(":")[2].strip(),
    }


def _read_raw_data(request_handler: Any, usual: Any = emulator._read_raw_data) -> Any:
    """The bytes of a body; what a killed client has not sent to its end is no object."""
    raw = usual(request_handler)
    if len(raw or b"") < int(request_handler.headers.get("Content-Length") or 0):
        raise ConnectionResetError
    return raw


def _part(raw: bytes) -> tuple[bytes, bytes, bytes]:
    blank = b"\r\n\r\n" if b"\r\n\r\n" in raw[:500] else b"\n\n"
    line = blank[: len(blank) // 2]
    head, _, body = raw.removeprefix(line).partition(blank)
    return head, blank, body.removesuffix(line)


emulator._read_data, emulator._read_raw_data = _read_data, _read_raw_data
objects = emulator.objects
for _, methods in emulator.HANDLERS:
    for method, usual in methods.items():
        if usual in (objects.insert, objects.delete, objects.get, objects.download):
            methods[method] = _checked(usual)
