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


def normal(location: str | Path) -> str:
    """One text for one place: an address with its scheme and host in small letters, without spare slashes; a whole path.

    Without what is no part of the place and may be a secret, a password or a signed query: as it may be printed.
    """
    scheme = _scheme(location)
    if scheme in ("", "file"):
        return str(local_path(location).resolve())
    inside = re.split("[?#]", str(location).partition("://")[2])[0]
    host, *folders = [part for part in inside.split("/") if part] or [""]
    if scheme != "hf" or ":" in host:  # hf://model@revision has no host
        host = host.rpartition("@")[2]
    return "/".join([f"{scheme}:/", host.lower() if scheme in ("http", "https") else host, *folders])


def is_remote(location: str | Path) -> bool:
    """It is an address and not a path. Raises UsageError for an address that ders does not know."""
    scheme = _scheme(location)
    if scheme not in ("", "file", *REMOTE):
        raise UsageError(
            f"{normal(location)}: expected a folder, or an address with {', '.join(f'{s}://' for s in REMOTE)}"
        )
    return scheme in REMOTE


def local_path(location: str | Path) -> Path:
    """A path as such, and that of file:///..."""
    if _scheme(location) != "file":
        return Path(location)
    parts = urlsplit(str(location))
    if parts.netloc not in ("", "localhost"):
        raise UsageError("file://: expected file:///path, found another host in it")
    return Path(unquote(parts.path))


def open_store(address: str) -> Store:
    """The store for an address; nothing is asked of it yet. UsageError if it is none, or if the extra is missing."""
    _refuse_secrets(address)
    store = _store(normal(address))
    if store.name in ("", ".", "..") or "\0" in store.name:
        store.name = "model"
    return store


def name_of(address: str) -> str:
    """The name of the checkpoint at an address."""
    return open_store(address).name


def _refuse_secrets(address: str) -> None:
    """UsageError for what would be a secret wherever the address is printed, and what is no part of a folder's name."""
    shown, inside = normal(address), address.partition("://")[2]
    if re.search("[?#]", inside):
        raise UsageError(f"{shown}: expected a folder's address, without ? and # and what follows them")
    host = inside.partition("/")[0]
    if "@" in host and (_scheme(address) != "hf" or ":" in host):
        raise UsageError(f"{shown}: expected an address without user and password; credentials: docs/remote.md")


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

    path = address.partition("://")[2]
    if not path or any(part in (".", "..") for part in path.split("/")):
        raise UsageError(f"{address}: expected {scheme}://bucket/folder")
    return (S3Store if scheme == "s3" else GoogleStore)(address, path)


def _web(address: str) -> Store:
    from .web import WebStore

    parts = urlsplit(address)
    if not parts.hostname:
        raise UsageError(f"{address}: expected {parts.scheme}://host/folder")
    if parts.hostname in HUBS:
        raise UsageError(f"{address}: a model on the Hub is hf://{'/'.join(parts.path.strip('/').split('/')[:2])}")
    return WebStore(address)


def _hub(address: str) -> Store:
    from .web import HubStore

    repo, _, revision = address.partition("://")[2].partition("@")
    repo = repo.removeprefix("models/")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo) or repo.startswith(("datasets/", "spaces/", "buckets/")):
        raise UsageError(f"{address}: expected hf://organisation/model or hf://organisation/model@revision")
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return HubStore(address, repo, revision or "main", endpoint)
