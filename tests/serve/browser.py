"""A headless Chromium, driven over its own DevTools protocol; no driver program, no selenium."""

from __future__ import annotations

import base64
import itertools
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
from websockets.sync.client import ClientConnection, connect

_KEYS = {
    "Enter": (13, "Enter", "\r"),
    "Escape": (27, "Escape", ""),
    "Tab": (9, "Tab", ""),
    " ": (32, "Space", " "),
    "p": (80, "KeyP", "p"),
}
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --mute-audio --window-size=1200,800 --remote-debugging-port=0"
)


Open = Callable[[str], "Browser"]
"""The fixture `open_page`: opens an address in a browser of its own."""


class Browser:
    """One window. `start` opens it on an address; `stop` ends the process that `start` began."""

    def __init__(self, program: str, profile: Path) -> None:
        self._program, self._profile = program, profile
        self._numbers = itertools.count(1)
        self.console: list[str] = []

    def start(self, url: str, timeout_s: float = 60.0) -> None:
        command = [self._program, *_FLAGS.split(), f"--user-data-dir={self._profile}", url]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._socket = self._attach(time.monotonic() + timeout_s)
            self.call("Runtime.enable")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        if hasattr(self, "_socket"):
            self._socket.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its result."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=30))
            if message.get("id") == number:
                assert "error" not in message, message
                return dict(message["result"])
            if message.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                self.console.append(json.dumps(message["params"])[:500])

    def run(self, script: str) -> Any:
        """Value of a JavaScript expression; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def text(self, element_id: str) -> str:
        return str(self.run(f"document.getElementById('{element_id}')?.textContent ?? ''"))

    def press(self, key: str, alt: bool = False) -> None:
        """Press and release one key, as a person does."""
        code, name, text = _KEYS[key]
        pressed = {"key": key, "code": name, "windowsVirtualKeyCode": code, "modifiers": int(alt)}
        self.call("Input.dispatchKeyEvent", type="keyDown", **pressed, **({"text": text} if text and not alt else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def tab_to(self, element_id: str) -> None:
        """Move the focus by the keyboard alone."""
        for _ in range(60):
            if self.run("document.activeElement.id") == element_id:
                return
            self.press("Tab")
        raise AssertionError(f"#{element_id} is not reached by Tab")

    def type(self, text: str) -> None:
        """Replace what is in the focused field."""
        self.run("document.activeElement.select()")
        self.call("Input.insertText", text=text)

    def look(self, width: int, height: int, scheme: str) -> None:
        """Be a window of that size, for somebody who wants that colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def save_into(self, folder: Path) -> None:
        """Let downloads go there without asking."""
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _attach(self, deadline: float) -> ClientConnection:
        port_file = self._profile / "DevToolsActivePort"
        while time.monotonic() < deadline:
            assert self._process.poll() is None, "Chromium ended at once"
            if port_file.exists() and (lines := port_file.read_text().splitlines()):
                pages = httpx2.get(f"http://127.0.0.1:{lines[0]}/json", timeout=10).json()
                found = [page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page"]
                if found:
                    return connect(found[0], max_size=1 << 26, open_timeout=10)
            time.sleep(0.1)
        raise TimeoutError("Chromium did not open its debugging port")
