"""Chromium without a window, driven over the DevTools protocol (https://chromedevtools.github.io/devtools-protocol/).

Commands and events are JSON between NUL bytes on two pipes (--remote-debugging-pipe), so no port and no library are needed. Every
request of a page other than for the page itself is refused and noted.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe --window-size=1200,900"
).split()
PATIENCE = 120.0  # seconds for whatever is waited for, before a test gives up


class Browser:
    """One page in a browser of its own. `errors`: what its console said; `requests`: what it asked for beside itself."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        self._process = subprocess.Popen(
            # the browser reads from descriptor 3 and writes to 4
            ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", CHROMIUM, *FLAGS]
            + [f"--user-data-dir={self._profile.name}", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._number, self._buffer, self._session, self._page = 0, b"", None, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Performance.enable", timeDomain="threadTicks")
        self.call("Fetch.enable", patterns=[{"urlPattern": "*"}])

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its result."""
        number = self._send(method, parameters)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            message = self._next()
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self._noted(message)
        raise TimeoutError(method)

    def _send(self, method: str, parameters: dict[str, Any]) -> int:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        return self._number

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._in, 1 << 20)
            if not data:
                raise RuntimeError("the browser ended")
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(text)

    def _noted(self, message: dict[str, Any]) -> None:
        method, found = message.get("method"), message.get("params", {})
        if method == "Fetch.requestPaused":
            url = found["request"]["url"]
            if url == self._page:
                self._send("Fetch.continueRequest", {"requestId": found["requestId"]})
            else:
                self.requests.append(url)
                self._send("Fetch.failRequest", {"requestId": found["requestId"], "errorReason": "BlockedByClient"})
        elif method == "Network.requestWillBeSent":
            url = found["request"]["url"]
            if url != self._page and not url.startswith(("data:", "blob:", "about:")):
                self.requests.append(url)
        elif method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(found["exceptionDetails"])[:600])
        elif method == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(found["args"])[:600])
        elif method == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
            self.errors.append(found["entry"]["text"])

    def open(self, page: Path) -> float:
        """Navigate to a file and wait until it says that all is drawn; seconds from navigation to there, by the page's own clock."""
        self._page = page.resolve().as_uri()
        self.call("Page.navigate", url=self._page)
        drawn = "(document.documentElement?.dataset.drawn || document.getElementById('trouble')?.textContent)"
        self.wait(f"location.href === {json.dumps(self._page)} && {drawn}")
        return float(self.run("performance.getEntriesByName('drawn')[0]?.startTime ?? NaN")) / 1000

    def busy(self) -> float:
        """CPU seconds of the page's main thread since its browser started, which other programs on this machine do not lengthen."""
        metrics = self.call("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    def wait(self, expression: str) -> None:
        """Until a JavaScript expression is true."""
        deadline = time.monotonic() + PATIENCE
        while not self.run(f"Boolean({expression})"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{expression}: {self.errors}")

    def run(self, expression: str) -> Any:
        """What a JavaScript expression gives, a promise's value for a promise."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"])[:600])
        return found["result"].get("value")

    def look(self, dark: bool = False, width: int = 1200) -> None:
        """Light or dark, as a reader's system has it, and the window's width."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def print(self, path: Path) -> None:
        """The page as it prints, A4."""
        data = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True)["data"]
        path.write_bytes(base64.b64decode(data))
