"""A folder on a web server, read by range requests. Nothing is written there.

HTTP has no listing: the names come from the server's index page if it shows one, else from the checkpoint's own index,
from ders.json, and from the names that tokenizers and licences usually have.
"""

import json
import re
import time
from contextlib import suppress
from html import unescape
from threading import local as thread_local
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from ..checkpoint.manifest import MANIFEST
from ..checkpoint.reader import INDEX, MAX_JSON_BYTES
from ..errors import CheckpointError, DersError, UnsupportedError
from . import store
from .store import Entry, Passing, Store, changed, each, is_plain, line, patiently

USUAL = (
    *("config.json", INDEX, MANIFEST, "model.safetensors", "generation_config.json", "README.md"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "preprocessor_config.json"),
    *("processor_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"),
)
MAY_PASS = (408, 425, 429)  # and every 5xx
ABSENT = (401, 403, 404, 410)  # of a file that need not be there; buckets answer 403 where nobody may list them
LARGEST_PAGE = 4 << 20


class WebStore(Store):
    def __init__(self, address: str):
        self.address = self._root = address
        self.name = unquote(urlsplit(self._root).path).rsplit("/", 1)[-1] or urlsplit(self._root).hostname
        self._sessions = thread_local()
        self._kept: dict[str, bytes] = {}  # what the listing had to read

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_sessions"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._sessions = thread_local()

    def listing(self) -> dict[str, Entry | None]:
        linked = self._linked()
        found = self._heads(linked if "config.json" in linked else USUAL)
        named = set()
        if index := found.get(INDEX):
            named |= _strings(self._json(INDEX, index).get("weight_map"), values=True)
        if manifest := found.get(MANIFEST):
            named |= _strings(self._json(MANIFEST, manifest).get("files"))
        return found | self._heads(named - found.keys())

    def get(self, name: str, begin: int, end: int, entry: Entry) -> bytes:
        if name in self._kept:
            return self._kept[name][begin:end]
        with self._ask("GET", self.url(name), {"Range": f"bytes={begin}-{end - 1}"}) as response:
            if response.status_code == 416 or self.mark(response) not in ("", entry.mark):
                raise changed(self.where(name), entry.mark or f"{entry.size} bytes", _said(response))
            if response.status_code == 200 and (begin, end) != (0, entry.size):
                raise UnsupportedError(
                    f"{self.where(name)}: this server gives whole files only; download the model first"
                )
            if response.status_code not in (200, 206):
                raise DersError(f"{self.where(name)}: HTTP {response.status_code}")
            if (coding := response.headers.get("Content-Encoding", "identity")) != "identity":
                raise UnsupportedError(f"{self.where(name)}: comes as {line(coding)}, not as it is; download it first")
            if response.status_code == 206:
                self._check_range(name, begin, end, entry, response.headers.get("Content-Range", ""))
            data = self._body(response, end - begin + 1)
            if response.status_code == 200 and len(data) > entry.size:
                raise changed(self.where(name), f"{entry.size} bytes", "more")
            return data

    def _check_range(self, name: str, begin: int, end: int, entry: Entry, found: str) -> None:
        """That the bytes which come are those asked for: "bytes 0-99/1000" are the first hundred."""
        place = re.fullmatch(r"bytes ([0-9]+-[0-9]+)/([0-9]+|\*)", found)
        if not place:
            raise UnsupportedError(
                f"{self.where(name)}: expected Content-Range: bytes {begin}-{end - 1}/{entry.size}, found "
                f"{line(found)!r}; download the model first"
            )
        if place[2] not in ("*", str(entry.size)):
            raise changed(self.where(name), f"{entry.size} bytes", f"{place[2]} bytes")
        if place[1] != f"{begin}-{end - 1}":
            raise Passing(f"bytes {begin}-{end - 1} asked for, {place[1]} came")

    def url(self, name: str) -> str:
        """Where a file is got."""
        return f"{self._root}/{quote(name)}"

    def headers(self) -> dict[str, str]:
        """Of every request: bytes as they are, without compression."""
        return {"Accept-Encoding": "identity"}

    def mark(self, response: Any) -> str:
        """What of a response says whether a file is still the same."""
        return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""

    def _linked(self) -> set[str]:
        """Files that the server's index page links to, if it has one."""

        def once() -> str:
            with self._ask("GET", self._root + "/") as response:
                if response.status_code != 200 or "text/html" not in response.headers.get("Content-Type", ""):
                    return ""
                return self._body(response, LARGEST_PAGE).decode(errors="replace")

        page = patiently(once, self.address)
        links = (
            unquote(unescape(link)).removeprefix("./") for link in re.findall(r"""href=["']([^"'?#]+)["']""", page)
        )
        return {link for link in links if is_plain(link)}

    def _heads(self, names: Any) -> dict[str, Entry]:
        """Size and mark of those names that are there, and have a size or are needed."""
        entries = each(lambda name, stop: patiently(lambda: self._head(name), self.where(name), stop), sorted(names))
        return {name: entry for name, entry in zip(sorted(names), entries, strict=True) if entry}

    def _head(self, name: str) -> Entry | None:
        with self._ask("HEAD", self.url(name)) as response:
            if response.status_code in ABSENT:
                return None
            size = _number(response.headers.get("Content-Length", ""))
            if response.status_code == 200 and size is not None:
                return Entry(size, self.mark(response))
            if name.endswith(".safetensors") or name in ("config.json", INDEX, MANIFEST):
                raise DersError(f"{self.where(name)}: expected its size, found {_said(response)}")
            return None  # a link of the page's own, as to a search or a login

    def _json(self, name: str, entry: Entry) -> dict[str, Any]:
        """A JSON object, {} for anything else: the reader's own checks say what is wrong with it."""
        if entry.size > MAX_JSON_BYTES:
            return {}
        self._kept[name] = store.fetch(self, name, 0, entry.size, entry)
        try:
            found = json.loads(self._kept[name])
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _ask(self, method: str, url: str, more: dict[str, str] | None = None) -> Any:
        """A response whose body is still to come. Raises Passing for what may pass, DersError for what will not."""
        import requests

        if not hasattr(self._sessions, "session"):
            self._sessions.session = requests.Session()
        headers = self.headers() | (more or {})
        try:
            response = self._sessions.session.request(
                method, url, headers=headers, stream=True, timeout=store.STALL, allow_redirects=True
            )
        except (requests.ConnectionError, requests.Timeout) as error:
            raise Passing(_reason(error)) from None
        except requests.RequestException as error:
            raise DersError(f"{self.address}: {_reason(error)}") from None
        if response.status_code in MAY_PASS or response.status_code >= 500:
            wait = _number(response.headers.get("Retry-After", ""))
            response.close()
            raise Passing(f"HTTP {response.status_code}", float(wait or 0))
        return response

    def _body(self, response: Any, size: int) -> bytes:
        """At most `size` bytes of a response; Passing if they crawl, or fewer come than it announced."""
        from urllib3.exceptions import HTTPError

        data, began = bytearray(), time.monotonic()
        try:
            while len(data) < size and (chunk := response.raw.read1(1 << 18)):
                data += chunk
                if len(data) < size and time.monotonic() - began > store.SLOWEST:
                    raise Passing(f"{len(data)} of {size} bytes in {store.SLOWEST:g} seconds")
        except (HTTPError, OSError) as error:
            raise Passing(f"{_reason(error)} after {len(data)} of {size} bytes") from None
        return bytes(data[:size])


class HubStore(WebStore):
    """A model on the Hugging Face Hub, at the commit that its revision had when it was opened."""

    def __init__(self, address: str, repo: str, revision: str, endpoint: str):
        super().__init__(address)
        self.name = repo.rsplit("/", 1)[-1]
        self._repo, self._revision, self._endpoint = repo, revision, endpoint.rstrip("/")
        self._commit = ""  # once it is known

    def listing(self) -> dict[str, Entry | None]:
        answer = patiently(self._ask_hub, self.address)
        self._commit = str(answer["sha"])
        found: dict[str, Entry | None] = {}
        for file in answer["siblings"]:
            name, _, below = file["rfilename"].partition("/")
            lfs = file.get("lfs")
            mark = (isinstance(lfs, dict) and lfs.get("sha256")) or file.get("blobId") or self._commit
            found[name] = None if below else Entry(file["size"], str(mark))
        return found

    def _ask_hub(self) -> dict[str, Any]:
        revision = quote(self._commit or self._revision, safe="")
        with self._ask("GET", f"{self._endpoint}/api/models/{self._repo}/revision/{revision}?blobs=true") as response:
            if response.status_code in (401, 403, 404):
                why = line(response.headers.get("X-Error-Message", "")) or f"HTTP {response.status_code}"
                raise UnsupportedError(
                    f"{self.address}: {why}; does it exist? If it is private or gated: `hf auth login`"
                )
            body = self._body(response, MAX_JSON_BYTES)
            with suppress(ValueError, KeyError, TypeError):
                answer = json.loads(body)
                files = [(file["rfilename"], file["size"]) for file in answer["siblings"]]
                right = all(isinstance(name, str) and isinstance(size, int) and size >= 0 for name, size in files)
                if response.status_code == 200 and answer["sha"] and right:
                    return answer
            raise CheckpointError(f"{self.address}: expected a model's files from the Hub, found {_said(response)}")

    def url(self, name: str) -> str:
        return f"{self._endpoint}/{self._repo}/resolve/{self._commit}/{quote(name)}"

    def headers(self) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers

        return build_hf_headers(library_name="ders-cli") | super().headers()

    def mark(self, response: Any) -> str:
        return ""  # a commit's files do not change, and its mirrors have ETags of their own


def _strings(found: Any, values: bool = False) -> set[str]:
    """Plain file names among a JSON object's keys, or among its values."""
    listed = (found.values() if values else found) if isinstance(found, dict) else ()
    return {name for name in listed if isinstance(name, str) and is_plain(name)}


def _number(text: str) -> int | None:
    """A number in a header."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def _said(response: Any) -> str:
    return f"HTTP {response.status_code}, {line(response.headers.get('Content-Type', 'no type'))}"


def _reason(error: Exception) -> str:
    """An error's innermost reason, in one line."""
    reason = getattr(error.args[0], "reason", error.args[0]) if error.args else error
    return line(reason) or type(error).__name__
