"""A folder in a bucket (Amazon S3 and what speaks its language, Google Cloud Storage), through fsspec."""

import asyncio
import logging
import posixpath
from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from ..errors import DersError
from . import store
from .store import Entry, Passing, Store, changed, line

PIECE = 16 << 20  # of an upload; S3 takes at most 10,000, so it grows with the file
AT_ONCE = 4  # pieces of one upload in memory and on the way

logging.getLogger("gcsfs").addHandler(logging.NullHandler())  # else it prints a traceback of all that it raises, too

Result = TypeVar("Result")


class BucketStore(Store):
    """What both kinds have in common: fsspec's listing, and its errors as ours."""

    scheme: str

    def __init__(self, address: str, path: str):
        self.address, self._path = address, path.strip("/")
        self.name = posixpath.basename(self._path)
        self._opened: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    @abstractmethod
    def open(self) -> Any:
        """The file system, without fsspec's caches of file systems and listings."""

    @property
    def _fs(self) -> Any:
        if self._opened is None:
            self._opened = self.open()
        return self._opened

    def key(self, name: str) -> str:
        """bucket/prefix/name"""
        return f"{self._path}/{name}"

    @abstractmethod
    def entry(self, info: dict[str, Any]) -> Entry:
        """A file by fsspec's listing of it."""

    def listing(self) -> dict[str, Entry | None]:
        try:
            infos = self._try("", lambda: self._fs.ls(self._path, detail=True, refresh=True))
        except FileNotFoundError:
            return {}
        found: dict[str, Entry | None] = {}
        for info in infos:
            name = info["name"].rstrip("/").removeprefix(self._path + "/")
            if name != info["name"].rstrip("/") and "/" not in name:  # else the folder's own placeholder
                found[name] = None if info["type"] == "directory" else self.entry(info)
        return found

    def put(self, path: Path, name: str) -> Entry:
        try:
            self._try(name, lambda: self._send(str(path), self.key(name)))
            entry = self._try(name, lambda: self.entry(self._fs.info(self.key(name), refresh=True)))
        except FileNotFoundError as error:
            raise DersError(f"{self.where(name)}: {line(error)}; expected a bucket that is there") from None
        if entry.size != path.stat().st_size:
            raise Passing(f"{path.stat().st_size} bytes sent, {entry.size} stand there")
        return entry

    @abstractmethod
    def _send(self, path: str, key: str) -> None:
        """Store a local file under a key."""

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            with suppress(FileNotFoundError):
                self._try(name, lambda name=name: self._fs.rm_file(self.key(name)))

    def _try(self, name: str, action: Callable[[], Result]) -> Result:
        """action(); what fsspec raises, as Passing or as DersError. FileNotFoundError stays one."""
        import aiohttp

        where = self.where(name) if name else self.address
        try:
            return action()
        except FileNotFoundError:
            raise
        except (PermissionError, *self.no_key()) as error:
            raise DersError(f"{where}: {line(error)}; expected credentials for it (docs/remote.md)") from None
        except (OSError, aiohttp.ClientError, asyncio.TimeoutError, *self.failures()) as error:
            raise Passing(line(error) or type(error).__name__) from None

    def no_key(self) -> tuple[type[Exception], ...]:
        """Raised for missing credentials."""
        return ()

    def failures(self) -> tuple[type[Exception], ...]:
        """Raised beside OSError for what may pass."""
        return ()


class S3Store(BucketStore):
    """s3://: every read asks for the ETag that the listing gave (If-Match), so other bytes never come."""

    def open(self) -> Any:
        import s3fs

        settings = {"connect_timeout": store.STALL, "read_timeout": store.STALL}
        settings["retries"] = {"total_max_attempts": 1, "mode": "standard"}  # `patiently` tries again
        fs = s3fs.S3FileSystem(config_kwargs=settings, use_listings_cache=False, skip_instance_cache=True)
        fs.retries = 1
        return fs

    def entry(self, info: dict[str, Any]) -> Entry:
        return Entry(info["size"], info["ETag"])

    def get(self, name: str, begin: int, end: int, entry: Entry) -> bytes:
        from fsspec.asyn import sync

        async def whole(stream: Any) -> bytes:
            data = bytearray()
            while len(data) <= end - begin and (chunk := await stream.read(end - begin + 1 - len(data))):
                data += chunk
            return bytes(data)  # one byte more than asked for, if the server gives more: then it is refused

        async def read(stream: Any) -> bytes:
            try:
                return await asyncio.wait_for(whole(stream), store.SLOWEST)
            finally:
                stream.close()  # else a broken body keeps its connection, and ten of them are all that there are

        def body() -> bytes:
            bucket, key, _ = self._fs.split_path(self.key(name))
            span = f"bytes={begin}-{end - 1}"
            answer = self._fs.call_s3("get_object", Bucket=bucket, Key=key, Range=span, IfMatch=entry.mark)
            data = sync(self._fs.loop, read, answer["Body"])
            if answer.get("ETag") != entry.mark:  # a server that does not know If-Match
                raise changed(self.where(name), "one ETag", "another")
            return data

        try:
            return self._try(name, body)
        except FileNotFoundError:
            raise changed(self.where(name), entry.mark, "nothing") from None

    def _try(self, name: str, action: Callable[[], Result]) -> Result:
        def once() -> Result:
            try:
                return action()
            except OSError as error:
                if _code(error) in ("PreconditionFailed", "412", "InvalidRange", "416"):
                    raise changed(self.where(name), "one ETag", "another") from None
                if _code(error) in ("301", "307", "400", "InvalidArgument", "AuthorizationHeaderMalformed"):
                    raise DersError(f"{self.where(name)}: {line(error)}; is the region right?") from None
                raise

        return super()._try(name, once)

    def no_key(self) -> tuple[type[Exception], ...]:
        from botocore import exceptions

        return (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.ProfileNotFound)

    def failures(self) -> tuple[type[Exception], ...]:
        from botocore.exceptions import BotoCoreError

        return (BotoCoreError,)

    def _send(self, path: str, key: str) -> None:
        piece = max(PIECE, -(-Path(path).stat().st_size // 9_999))
        self._fs.put_file(path, key, chunksize=piece, max_concurrency=AT_ONCE)  # aborts its parts if one fails

    def abort_unfinished(self) -> None:
        bucket, _, folder = self._path.partition("/")
        prefix = f"{folder}/"  # open_target (target.py) takes no whole bucket
        try:
            found = self._try("", lambda: self._fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix))
            for one in found.get("Uploads", ()):
                if not one["Key"].startswith(prefix) or "/" in one["Key"].removeprefix(prefix):
                    continue  # a folder below is another's
                where = {"Bucket": bucket, "Key": one["Key"], "UploadId": one["UploadId"]}
                self._try("", lambda where=where: self._fs.call_s3("abort_multipart_upload", **where))
        except (FileNotFoundError, DersError, Passing):
            pass  # not allowed to: a rule of the bucket may do it (docs/remote.md)


class GoogleStore(BucketStore):
    """gs://: every read names the generation that the listing gave."""

    def open(self) -> Any:
        import aiohttp
        import gcsfs

        limits = aiohttp.ClientTimeout(total=store.SLOWEST, sock_connect=store.STALL, sock_read=store.STALL)
        return gcsfs.GCSFileSystem(requests_timeout=limits, use_listings_cache=False, skip_instance_cache=True)

    def entry(self, info: dict[str, Any]) -> Entry:
        return Entry(info["size"], str(info["generation"]))

    def get(self, name: str, begin: int, end: int, entry: Entry) -> bytes:
        key = self.key(name)
        try:
            return self._try(name, lambda: self._fs.cat_file(key, begin, end, generation=entry.mark))
        except FileNotFoundError:
            raise changed(self.where(name), f"generation {entry.mark}", "another") from None

    def _try(self, name: str, action: Callable[[], Result]) -> Result:
        try:
            return super()._try(name, action)
        except ValueError as error:
            # gcsfs's own for what the server calls invalid, and for a requester-pays bucket
            raise DersError(f"{self.where(name) if name else self.address}: {line(error)}") from None

    def no_key(self) -> tuple[type[Exception], ...]:
        from google.auth.exceptions import GoogleAuthError

        return (GoogleAuthError,)

    def failures(self) -> tuple[type[Exception], ...]:
        from gcsfs.retry import HttpError

        return (HttpError,)

    def _send(self, path: str, key: str) -> None:
        self._fs.put_file(path, key, chunksize=PIECE)


def _code(error: OSError) -> str:
    """S3's own name for an error."""
    return (getattr(error.__cause__, "response", None) or {}).get("Error", {}).get("Code", "")
