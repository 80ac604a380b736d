"""What tests of threats share: keys, videos, and what this process holds."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import httpx2

from tests.serve.harness import Service


def new_key(
    service: Service, name: str = "somebody", sessions: int = 0, frames_per_minute: int = 0, account: str = ""
) -> dict[str, str]:
    """A new key of the service, as the headers that show it."""
    limits = {"sessions": sessions, "frames_per_minute": frames_per_minute}
    text = service.store._credentials.create_key(name, **limits, now=time.time(), account=account)
    return {"Authorization": f"Bearer {text}"}


def start(http: httpx2.Client, headers: dict[str, str] | None = None, pacing: str = "none", **fields: Any) -> str:
    body = {"prompt": "a red circle", "num_frames": 21, "extra": {"pacing": pacing}} | fields
    return str(http.post("/v1/videos", json=body, headers=headers).raise_for_status().json()["id"])


def told(http: httpx2.Client, video: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
    return dict(http.get(f"/v1/videos/{video}", headers=headers).json())


def memory_bytes() -> int:
    """What this process has in memory, the service included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    """Files and sockets that this process holds."""
    return len(os.listdir("/proc/self/fd"))
