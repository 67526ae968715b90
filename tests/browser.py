"""A headless Chromium, driven over the DevTools protocol's pipe: no driver, no further package.

Debian's package `chromium`; tools/chromium.py finds or installs it and says what to do.
"""

from __future__ import annotations

import base64
import fcntl
import importlib
import itertools
import json
import os
import select
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--hide-scrollbars",
    "--no-first-run",
    "--force-device-scale-factor=1",
    "--remote-debugging-pipe",
)


def executable() -> str:
    """Chromium's path; RuntimeError with what to do where there is none."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        chromium = importlib.import_module("chromium")
    finally:
        sys.path.pop(0)
    found: str | None = chromium.find()
    if found is None:
        raise RuntimeError(f"no Chromium: {chromium.ADVICE}")
    return found


class Browser:
    """One process with one page; everything it asked for or complained of is kept."""

    def __init__(self, timeout: float = 60.0) -> None:
        self.timeout, self.numbers = timeout, itertools.count(1)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.loaded = False
        self.home = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        ends = [*os.pipe(), *os.pipe()]
        # Chromium reads commands from descriptor 3 and answers on 4; ours must not be in the way.
        safe = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
        for end in ends:
            os.close(end)
        commands, self.write, self.read, answers = safe
        arguments = [executable(), *FLAGS, f"--user-data-dir={self.home.name}", "about:blank"]
        log = os.path.join(self.home.name, "log")
        self.process = os.posix_spawn(
            arguments[0],
            arguments,
            {**os.environ, "HOME": self.home.name},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 2, log, os.O_WRONLY | os.O_CREAT, 0o600),
                (os.POSIX_SPAWN_DUP2, 2, 1),
                (os.POSIX_SPAWN_DUP2, commands, 3),
                (os.POSIX_SPAWN_DUP2, answers, 4),
            ],
            setpgroup=0,
        )
        os.close(commands)
        os.close(answers)
        self.buffer = b""
        self.session: str | None = None
        pages = self.call("Target.getTargets")["targetInfos"]
        (page,) = (target for target in pages if target["type"] == "page")
        attached = {"targetId": page["targetId"], "flatten": True}
        self.session = self.call("Target.attachToTarget", **attached)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *raised: object) -> None:
        os.killpg(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self.write)
        os.close(self.read)
        self.home.cleanup()

    def _message(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"Chromium said nothing for {self.timeout:g} s")
            part = os.read(self.read, 1 << 20)
            if not part:
                log = Path(self.home.name, "log").read_text(errors="replace")
                raise RuntimeError(f"Chromium ended: {log[-2000:]}")
            self.buffer += part
        said, self.buffer = self.buffer.split(b"\0", 1)
        found: dict[str, Any] = json.loads(said)
        return found

    def _heard(self, message: dict[str, Any]) -> None:
        said = message.get("params", {})
        method = message.get("method")
        if method == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = said["exceptionDetails"]
            self.complaints.append(details.get("exception", details).get("description", "error"))
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(f"console.{said['type']}: {json.dumps(said['args'])}")
        elif method == "Log.entryAdded":
            self.complaints.append(said["entry"]["text"])
        elif method == "Page.loadEventFired":
            self.loaded = True

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol and its result."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + self.timeout
        while True:
            heard = self._message(deadline)
            if heard.get("id") == number:
                if "error" in heard:
                    raise RuntimeError(f"{method}: {heard['error']['message']}")
                result: dict[str, Any] = heard["result"]
                return result
            self._heard(heard)

    def open(self, page: Path, width: int, height: int, scheme: str = "light") -> None:
        """Loads a file in a window of that size for that preferred colour scheme."""
        self.requests.clear()
        self.complaints.clear()
        self.loaded = False
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        wish = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=wish)
        self.call("Page.navigate", url=page.resolve().as_uri())
        deadline = time.monotonic() + self.timeout
        while not self.loaded:
            self._heard(self._message(deadline))

    def js(self, expression: str) -> Any:
        """The value of an expression in the page; raises what it throws."""
        asked = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", **asked)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]["exception"].get("description")))
        return answer["result"].get("value")

    def press(self, key: str, code: str, number: int, text: str = "") -> None:
        """A key of the keyboard, down and up."""
        known = {"key": key, "code": code, "windowsVirtualKeyCode": number}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **known)
        self.call("Input.dispatchKeyEvent", type="keyUp", **known)

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """The page as PNG, all of it or what the window shows."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
