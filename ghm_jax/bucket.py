"""Places in a Google Cloud Storage bucket, with the methods of `pathlib.Path` that runs need.

All use of the packages that speak to a bucket is in this file, except that of Orbax. They retry
requests that fail for a while, with growing pauses. What still fails is an OSError here, as on a
disk, so that callers have one kind of error; `exists` and `is_dir` raise it too, because "cannot
tell" must never be taken for "is not there".
"""

import contextlib
import errno
import fnmatch
import functools
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, NamedTuple

from etils.epath import gpath

from ghm_jax.exceptions import ConfigError

SCHEME = "gs://"


class StoredFile(NamedTuple):
    """What a bucket says of an object."""

    size: int
    """In bytes."""
    version: str
    """Another one for each content that it has had."""
    md5: str
    """In base64; empty if the bucket does not say."""


class BucketPath(gpath.PosixGPath):
    """A place in a bucket. What lies below gs://BUCKET/NAME/ is a directory as long as there is at
    least one object; an object appears at once and whole, or not at all."""

    @property
    def _key(self) -> tuple[str, str]:
        """Its bucket, and the name of the object there."""
        bucket, _, name = str(self).removeprefix(SCHEME).partition("/")
        return bucket, name

    def _info(self) -> dict[str, Any] | None:
        """What the bucket says of it; None: it does not exist."""
        with contextlib.suppress(FileNotFoundError), _telling(self):
            return _system().info(str(self))
        return None

    def exists(self) -> bool:
        return self._info() is not None

    def is_dir(self) -> bool:
        info = self._info()
        return info is not None and info["type"] == "directory"

    def is_file(self) -> bool:
        info = self._info()
        return info is not None and info["type"] != "directory"

    def resolve(self, strict: bool = False) -> "BucketPath":
        del strict
        return self

    def iterdir(self) -> Iterator["BucketPath"]:
        with _telling(self):
            names = _system().ls(str(self), detail=False)
        children = {PurePosixPath(name).name for name in names if name.strip("/") != self._whole}
        yield from (self / name for name in sorted(children))

    @property
    def _whole(self) -> str:
        return str(self).removeprefix(SCHEME)

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """`pattern` may have wildcards in its last part only."""
        folder, _, name = pattern.rpartition("/")
        with contextlib.suppress(FileNotFoundError):
            found = list((self / folder if folder else self).iterdir())
            yield from (path for path in found if fnmatch.fnmatchcase(path.name, name))

    def objects(self) -> list["BucketPath"]:
        """All objects below it, and itself if it is one."""
        with _telling(self):
            return [BucketPath(SCHEME + name) for name in sorted(_system().find(str(self)))]

    def files(self) -> dict[str, "StoredFile"]:
        """All objects below it, by their names from here on."""
        with _telling(self):
            found = _system().find(str(self), detail=True)
        return {
            name.removeprefix(self._whole).lstrip("/"): StoredFile(
                info["size"], str(info.get("generation", "")), info.get("md5Hash", "")
            )
            for name, info in sorted(found.items())
        }

    def stat(self) -> Any:
        """With `st_size` in bytes and `st_mtime`, by the clock of the bucket."""
        with _telling(self):
            info = _system().info(str(self))
            when = info["mtime"].timestamp() if info.get("mtime") else 0.0
            return SimpleNamespace(st_size=info["size"], st_mtime=when)

    def read_bytes(self, start: int | None = None, end: int | None = None) -> bytes:
        with _telling(self):
            return _system().cat_file(str(self), start, end)

    def read_text(self, encoding: str | None = None, errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors)

    def write_bytes(self, data: bytes) -> int:
        with _telling(self):
            _system().pipe_file(str(self), data)
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def create(self, data: bytes) -> None:
        """Writes a new object; raises FileExistsError if there is one, whoever writes it first."""
        with _telling(self):
            _system().pipe_file(str(self), data, mode="create")

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing to do: a bucket has no directories."""

    def unlink(self, missing_ok: bool = False) -> None:
        with contextlib.suppress(*([FileNotFoundError] if missing_ok else [])), _telling(self):
            _system().rm_file(str(self))

    def unlink_if(self, content: bytes) -> bool:
        """Removes the object if it has this content; False: it has another one, or is gone."""
        info = self._info()
        try:
            if info is None or self.read_bytes() != content:
                return False
            with _telling(self):
                generation = info["generation"]
                _system().call("DELETE", "b/{}/o/{}", *self._key, ifGenerationMatch=generation)
        except (FileNotFoundError, FileExistsError):  # removed, or written again, in between
            return False
        return True

    def upload(self, file: Path) -> None:
        """Writes a file of any size; the object appears when all of it has arrived."""
        with _telling(self):
            _system().put_file(str(file), str(self))

    def copy_to(self, other: "BucketPath") -> None:
        """Copies the object within the store."""
        with _telling(self):
            _system().cp_file(str(self), str(other))

    def replace(self, target: Any) -> "BucketPath":
        """Renames the object; not in one step, but the target is always whole."""
        self.copy_to(target)
        self.unlink(missing_ok=True)
        return target


def check_bucket(location: str) -> None:
    """Raises ConfigError if the bucket of gs://BUCKET/... cannot be used, with the remedy."""
    bucket = location.removeprefix(SCHEME).partition("/")[0]
    if not re.fullmatch(r"[a-z0-9][-._a-z0-9]{1,220}[a-z0-9]", bucket):
        raise ConfigError(
            location,
            f"{bucket!r} cannot be the name of a bucket, which has 3 or more of a-z, 0-9, -, _, .",
            "write it like gs://BUCKET/DIR",
        )
    _check_access(bucket)
    _system()  # before Orbax opens its own, which is then without cached listings too


@functools.cache
def _check_access(bucket: str) -> None:
    """Asks for the bucket itself, as Orbax will; remembered only if that succeeds."""
    where = f"{SCHEME}{bucket}"
    for package in ("gcsfs", "google.cloud.storage"):
        with contextlib.suppress(ModuleNotFoundError):
            if importlib.util.find_spec(package):
                continue
        raise ConfigError(
            where, f"needs the package {package}", 'pip install "ghm-jax[gcs]", or use a directory'
        )

    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import storage
    from google.cloud.storage.retry import DEFAULT_RETRY

    try:
        client = storage.Client()
        client.get_bucket(bucket, timeout=30, retry=DEFAULT_RETRY.with_timeout(30))
        return
    except exceptions.NotFound:
        problem = "there is no such bucket"
        remedy = f"create it (gcloud storage buckets create {where}), or correct the name"
    except (exceptions.Forbidden, exceptions.Unauthorized):
        problem = "the account of this machine may not use the bucket"
        remedy = "grant it Storage Object Admin and Storage Legacy Bucket Reader on the bucket"
    except GoogleAuthError:
        problem = "no Google credentials were found"
        remedy = "run gcloud auth application-default login, or use a VM with a service account"
    except Exception as error:  # kinds of requests and urllib3, and an OSError of Google's own
        problem, remedy = f"cannot be reached ({_reason(error)})", "check the network"
        if "Project was not passed" in str(error):
            problem, remedy = "the Google Cloud project is not known", "set GOOGLE_CLOUD_PROJECT"
    raise ConfigError(where, problem, remedy)


@functools.cache
def _system() -> Any:
    """The file system of all buckets.

    Listings are not cached, neither here nor in Orbax, which has the same package: other processes
    change what a run holds.
    """
    import fsspec
    import fsspec.config

    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    return fsspec.filesystem("gs")


@contextlib.contextmanager
def telling_of_retries(say: Callable[[str], None]) -> Iterator[None]:
    """Says once that requests fail and are repeated. Those of Orbax's arrays are repeated by
    TensorStore, which does not tell."""

    class Listener(logging.Handler):
        said = False

        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if not self.said and "retrying after exception" in text:
                self.said = True
                why = " ".join(text.partition("exception:")[2].split())[:100]
                say(f"the bucket does not answer every request ({why}); they are repeated")

    log, listener = logging.getLogger("gcsfs"), Listener()
    before = log.level, log.propagate
    log.setLevel(logging.DEBUG)  # the level at which it tells
    log.propagate = False
    log.addHandler(listener)
    try:
        yield
    finally:
        log.removeHandler(listener)
        log.setLevel(before[0])
        log.propagate = before[1]


@contextlib.contextmanager
def _telling(path: BucketPath) -> Iterator[None]:
    """Whatever is raised becomes an OSError that names the path and has its reason on one line."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
    except Exception as error:
        refused = str(error).startswith("Forbidden") or getattr(error, "code", None) in (401, 403)
        number = errno.EACCES if refused else errno.EIO
        raise OSError(number, _reason(error), str(path)) from error


def _reason(error: Exception) -> str:
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}"[:200] if said else type(error).__name__
