"""Where a checkpoint stands, as the command line says it: a path, file://, http(s)://, hf://, s3://, gs://."""

import os
import re
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..errors import UsageError
from .store import Store

REMOTE = ("http", "https", "hf", "s3", "gs")
NEEDED = {  # modules that a scheme uses
    **dict.fromkeys(("http", "https"), ("requests",)),
    "hf": ("requests", "huggingface_hub"),
    "s3": ("fsspec", "s3fs"),
    "gs": ("fsspec", "gcsfs"),
}
HUBS = ("huggingface.co", "hf.co", "www.huggingface.co")


def _scheme(location: str | Path) -> str:
    """ "s3" of "s3://...", "" of a path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", location) if isinstance(location, str) else None
    return match[1].lower() if match else ""


def is_remote(location: str | Path) -> bool:
    """It is an address and not a path. Raises UsageError for an address that ders does not know."""
    scheme = _scheme(location)
    if scheme not in ("", "file", *REMOTE):
        raise UsageError(f"{location}: expected a folder, or an address with {', '.join(f'{s}://' for s in REMOTE)}")
    return scheme in REMOTE


def local_path(location: str | Path) -> Path:
    """A path as such, and that of file:///..."""
    if _scheme(location) != "file":
        return Path(location)
    parts = urlsplit(str(location))
    if parts.netloc not in ("", "localhost"):
        raise UsageError(f"{location}: expected file:///path, found another host {parts.netloc!r}")
    return Path(unquote(parts.path))


def open_store(address: str) -> Store:
    """The store for an address; nothing is asked of it yet. UsageError if it is none, or if the extra is missing."""
    store = _store(address)
    if store.name in ("", ".", "..") or "\0" in store.name:
        store.name = "model"
    return store


def name_of(address: str) -> str:
    """The name of the checkpoint at an address."""
    return open_store(address).name


def _store(address: str) -> Store:
    scheme = _scheme(address)
    missing = [module for module in NEEDED[scheme] if find_spec(module) is None]
    if missing:
        raise UsageError(f"{address}: needs {' and '.join(missing)}: pip install 'ders-cli[remote]'")
    if scheme == "hf":
        return _hub(address)
    if scheme in ("http", "https"):
        return _web(address)
    from .bucket import GoogleStore, S3Store

    path = address.partition("://")[2].strip("/")
    if not path or "//" in path or any(part in (".", "..") for part in path.split("/")):
        raise UsageError(f"{address}: expected {scheme}://bucket/folder")
    return (S3Store if scheme == "s3" else GoogleStore)(address, path)


def _web(address: str) -> Store:
    from .web import WebStore

    parts = urlsplit(address)
    if not parts.hostname or parts.query or parts.fragment:
        raise UsageError(f"{address}: expected {parts.scheme}://host/folder, without ? and #")
    if parts.hostname in HUBS:
        raise UsageError(f"{address}: a model on the Hub is hf://{'/'.join(parts.path.strip('/').split('/')[:2])}")
    return WebStore(address)


def _hub(address: str) -> Store:
    from .web import HubStore

    repo, _, revision = address.partition("://")[2].strip("/").partition("@")
    repo = repo.removeprefix("models/")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo) or repo.startswith(("datasets/", "spaces/", "buckets/")):
        raise UsageError(f"{address}: expected hf://organisation/model or hf://organisation/model@revision")
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return HubStore(address, repo, revision or "main", endpoint)
