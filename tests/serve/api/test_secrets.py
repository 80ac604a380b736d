"""Threat 14: with everything on and much going wrong, no secret is in a log, a metric, an answer, a file, a traceback.

Prompts are in the database, which answers their owner, and nowhere else; with their video they are gone from there too.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
import pytest
from websockets.exceptions import ConnectionClosed

from serve.settings import ServeSettings
from tests.s3 import SECRET_KEY
from tests.serve.certificates import make_signer
from tests.serve.harness import FakeEngine, Service, Until, http_client
from tests.serve.sockets import viewer

if TYPE_CHECKING:
    from tests.s3 import FaultyProxy

PROMPT, LISTED = "CANARYPROMPT of a heron", "CANARYLISTED"
WATERMARK_KEY = "CANARYWATERMARK of sixteen bytes"
OF_THE_TEST = ("httpx2", "httpcore", "websockets.client")


def body_of(path: Path) -> str:
    """The secret part of a PEM file, without its line ends."""
    return "".join(path.read_text().splitlines()[1:-1])[10:60]


def everything_on(tmp_path: Path, bucket: str) -> dict[str, str]:
    signer = make_signer(tmp_path)
    (tmp_path / "watermark.key").write_text(WATERMARK_KEY)
    (tmp_path / "list").write_text(f"{LISTED}\n")
    return {
        "auth": "keys",
        "files": f"s3://{bucket}/videos",
        "c2pa_certificate": signer.certificate,
        "c2pa_key": signer.key,
        "watermark": "spread-spectrum",
        "watermark_key": str(tmp_path / "watermark.key"),
        "prompt_policy": f"deny-list:{tmp_path / 'list'}",
    }


def logged(caplog: pytest.LogCaptureFixture) -> str:
    """What the service logged, tracebacks included; not what the test's own clients did."""
    ours = [record for record in caplog.records if not record.name.startswith(OF_THE_TEST)]
    return "\n".join(logging.Formatter().format(record) for record in ours)


def refusals(http: httpx2.Client, headers: dict[str, str], secret: str, video: str) -> str:
    """Bodies and headers of many kinds of error."""
    change = {"interaction": {"event": {"prompt": LISTED}}}
    asked = [
        http.post("/v1/videos", json={"prompt": PROMPT * 99}, headers=headers),
        http.post("/v1/videos", json={"prompt": LISTED}, headers=headers),
        http.post("/v1/videos", content=b"{" + PROMPT.encode(), headers=headers),
        http.post("/v1/videos", json={"prompt": PROMPT, "seed": "x"}, headers=headers),
        http.post("/v1/videos", json={"prompt": PROMPT}),
        http.post(f"/v1/videos/{video}/interactions", json=change, headers=headers),
        http.get("/v1/videos/video_none", headers=headers),
        http.get("/v1/models", headers={"Authorization": f"Bearer {secret[:-1]}x"}),
    ]
    assert [answer.status_code for answer in asked] == [422, 422, 400, 422, 401, 422, 404, 401]
    return "".join(answer.text + str(answer.headers) for answer in asked)


@pytest.mark.slow
def test_14_no_secret_is_told_whatever_goes_wrong(
    make_service: Callable[..., Service],
    engine: FakeEngine,
    faulty_s3: FaultyProxy,
    bucket: str,
    until: Until,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    service = make_service({"sweep_s": 0.3}, **everything_on(tmp_path, bucket))
    shown = service.store._credentials.create_key("somebody", 0, 0, now=time.time())
    headers = {"Authorization": f"Bearer {shown}"}
    with http_client(service.urls[0]) as http:
        faulty_s3.fail(403, "AccessDenied", method="PUT")
        asked = {"prompt": PROMPT, "num_frames": 33}
        video = http.post("/v1/videos", json=asked, headers=headers).raise_for_status().json()["id"]
        until(lambda: "its file waits for the storage" in logged(caplog), "the storage is asked in vain", 30)
        told = refusals(http, headers, shown, _running(http, headers, engine))
        faulty_s3.mend()
        done = f"/v1/videos/{video}"
        until(lambda: http.get(done, headers=headers).json()["status"] == "completed", "completed", 30)
        told += json.dumps(http.get("/v1/models", headers=headers).json())
        told += http.get(f"{done}/chain", headers=headers).text
        file = http.get(f"{done}/content", headers=headers).content
        engine.fail_at = 1
        engine.allow(float("inf"))
        with viewer(service.urls[0], headers) as one, pytest.raises(ConnectionClosed):
            one.start(prompt=PROMPT, num_frames=81)
            while True:
                told += json.dumps(one.next() | {"resume_token": ""})
    told += logged(caplog) + "".join(capfd.readouterr()) + str(service.metrics.records) + str(service.settings)
    data = Path(service.settings.data)
    own = [body_of(data / "signing_key.pem"), body_of(tmp_path / "key.pem")]
    secrets = [shown.split("_", 2)[2], SECRET_KEY, WATERMARK_KEY, *own]
    for secret in [*secrets, PROMPT, LISTED, one.resume_token]:
        assert secret not in told, secret[:12]
        assert secret.encode() not in file
    for path in (path for path in data.rglob("*") if path.is_file() and path.name != "signing_key.pem"):
        kept = path.read_bytes()
        assert not [secret[:12] for secret in secrets if secret.encode() in kept], path.name
        assert path.name.startswith("store.sqlite") or PROMPT.encode() not in kept, path.name
    assert shown.split("_")[1] in told  # the key's public id may be there


def _running(http: httpx2.Client, headers: dict[str, str], engine: FakeEngine) -> str:
    """A video that takes prompt changes for as long as it is wanted to."""
    engine.allow(1)
    asked = {"prompt": PROMPT, "num_frames": 81}
    video = str(http.post("/v1/videos", json=asked, headers=headers).raise_for_status().json()["id"])
    engine_held = http.get(f"/v1/videos/{video}", headers=headers).json()["status"]
    assert engine_held == "in_progress"
    return video


def test_14_a_deleted_videos_prompt_is_gone_from_the_database(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    service = make_service()
    with http_client(service.urls[0]) as http:
        video = http.post("/v1/videos", json={"prompt": PROMPT, "num_frames": 33}).json()["id"]
        change = {"interaction": {"event": {"prompt": f"{PROMPT} and another"}}}
        http.post(f"/v1/videos/{video}/interactions", json=change)
        database = Path(service.settings.data) / "store.sqlite"
        assert PROMPT.encode() in b"".join(path.read_bytes() for path in database.parent.glob("store.sqlite*"))
        assert http.delete(f"/v1/videos/{video}").status_code == 200
    service.run(service.kill_store())  # its last connection brings the journal into the file
    assert PROMPT.encode() not in b"".join(path.read_bytes() for path in database.parent.glob("store.sqlite*"))


def test_14_the_settings_hold_paths_and_never_what_lies_there(tmp_path: Path) -> None:
    settings = ServeSettings(**everything_on(tmp_path, "bucket"))  # type: ignore[arg-type]
    assert WATERMARK_KEY not in repr(settings) and body_of(tmp_path / "key.pem") not in repr(settings)
