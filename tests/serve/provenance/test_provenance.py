"""Where a file comes from: its content credentials say so, nothing is given out without them, and no prompt is in."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import c2pa
import httpx2
import pytest

from diagonal.errors import FieldError
from diagonal.media.encode import Pixels, read_mp4
from diagonal.media.watermark import Detection, SpreadSpectrum, payload_of
from diagonal.mp4 import boxes
from serve.provenance.content_credentials import (
    GENERATION,
    ContentCredentials,
    SigningError,
    prompt_hash,
    validation_state,
)
from serve.provenance.watermarks import Watermarks
from serve.records import LOCAL_CALLER, PutChunks, Status
from serve.settings import ServeSettings
from serve.store.finalizer import FileFinalizer
from serve.store.store import Store
from tests.serve.certificates import Signer, make_signer
from tests.serve.harness import CONFIG, VIDEO, Service, Until, chunks, http_client, put_video, shade

Make = Callable[..., Service]
PROMPT, LATER = "a heron that nobody else may know of", "and then a kingfisher, just as secret"


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return make_signer(tmp_path)


@pytest.fixture
def signing(make_service: Make, signer: Signer) -> Service:
    return make_service(c2pa_certificate=signer.certificate, c2pa_key=signer.key)


def manifest_in(data: bytes) -> tuple[str, dict[str, Any], set[str]]:
    """State, active manifest, and codes of what failed."""
    reader = c2pa.Reader("video/mp4", io.BytesIO(data))
    told = json.loads(reader.json())
    failures = told["validation_results"]["activeManifest"]["failure"]
    return str(reader.get_validation_state()), told["manifests"][told["active_manifest"]], {f["code"] for f in failures}


def finished(http: httpx2.Client, until: Until, **fields: Any) -> tuple[str, bytes]:
    video = http.post("/v1/videos", json={"prompt": PROMPT, "num_frames": 33, "seed": 11} | fields).json()["id"]
    until(lambda: http.get(f"/v1/videos/{video}").json()["status"] == "completed", "the file is there", 30)
    return video, http.get(f"/v1/videos/{video}/content").content


def test_a_finished_file_says_what_made_it_and_holds_no_prompt(signing: Service, until: Until) -> None:
    with http_client(signing.urls[0]) as http:
        video, data = finished(http, until)
        salt = http.get(f"/v1/videos/{video}/chain").json()["prompt_salt"]
        assert http.get("/v1/models").json()["provenance"]["content_credentials"] is True
    state, manifest, _ = manifest_in(data)
    assert state == "Valid" and manifest["claim_generator_info"][0]["name"] == "diagonal"
    assertions = {one["label"]: one["data"] for one in manifest["assertions"]}
    (action,) = assertions["c2pa.actions.v2"]["actions"]
    assert action["action"] == "c2pa.created" and action["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
    generation = assertions[GENERATION]
    assert (generation["release"], generation["seed"]) == ("fake-tiny", 11)
    assert generation["prompts"] == [{"pixel_frame": 0, "salted_sha256": prompt_hash(salt, PROMPT)}]
    assert len(salt) >= 32 and PROMPT.encode() not in data and salt.encode() not in data


def test_a_signed_file_plays_and_has_every_frame(signing: Service, until: Until, tmp_path: Path) -> None:
    with http_client(signing.urls[0]) as http:
        _, data = finished(http, until)
    with av.open(io.BytesIO(data), "r") as container:
        times = [int(frame.pts or 0) for frame in container.decode(video=0)]
    assert len(times) == 33 and times == sorted(set(times))
    if shutil.which("ffprobe"):
        path = tmp_path / "video.mp4"
        path.write_bytes(data)
        ask = ["ffprobe", "-v", "error", "-count_frames", "-show_entries", "stream=nb_read_frames", "-of", "csv=p=0"]
        told = subprocess.run([*ask, str(path)], capture_output=True, text=True, timeout=60, check=True).stdout
        assert told.strip().strip(",") == "33"


def test_one_flipped_byte_of_the_media_is_found(signing: Service, until: Until) -> None:
    with http_client(signing.urls[0]) as http:
        _, data = finished(http, until)
    spans = {name: (start, stop) for name, start, stop in boxes(data)}
    for name in ("moov", "mdat"):
        changed = bytearray(data)
        changed[sum(spans[name]) // 2] ^= 1
        state, _, failures = manifest_in(bytes(changed))
        assert state == "Invalid" and "assertion.bmffHash.mismatch" in failures, name


def test_prompt_changes_are_in_the_credentials_where_they_began(tmp_path: Path, signer: Signer) -> None:
    init, made = chunks()

    async def work(store: Store) -> None:
        from serve.records import Interaction

        await put_video(store, init)
        assert await store.add_interaction("video_1", Interaction("e1", LATER)) is True
        await store.put_chunks(PutChunks("video_1", 0, [made[0]]))
        await store.put_chunks(PutChunks("video_1", 0, [replace(made[1], applied_event_ids=("e1",))]))
        video, found = await store.get("video_1"), await store.content("video_1", 0, 1 << 20)
        assert video is not None and found is not None
        _, manifest, _ = manifest_in(found[1])
        assertions = {one["label"]: one["data"] for one in manifest["assertions"]}
        assert [tuple(one.values()) for one in assertions[GENERATION]["prompts"]] == [
            (0, prompt_hash(video.prompt_salt, VIDEO.prompt)),
            (9, prompt_hash(video.prompt_salt, LATER)),
        ]

    in_signing_store(tmp_path, signer, work)


def in_signing_store(tmp_path: Path, signer: Signer | None, work: Callable[[Store], Any]) -> Any:
    paths = (signer.certificate, signer.key) if signer else ("", "")
    settings = ServeSettings(data=str(tmp_path / "data"), c2pa_certificate=paths[0], c2pa_key=paths[1])

    async def run() -> Any:
        store = Store(settings, sweep_s=60.0)
        try:
            return await work(store)
        finally:
            await store.shut()

    return asyncio.run(run())


def test_a_file_that_cannot_be_signed_is_tried_again_and_then_fails_with_a_reason(
    tmp_path: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    init, made = chunks()
    tries: list[Path] = []

    def broken(self: ContentCredentials, source: Path, target: Path, manifest: dict[str, Any]) -> None:
        tries.append(target)
        target.write_bytes(source.read_bytes())  # whatever it left behind
        raise SigningError("the device that holds the key is away")

    async def work(store: Store) -> None:
        await put_video(store, init)
        monkeypatch.setattr(ContentCredentials, "sign", broken)
        for chunk in made:
            await store.put_chunks(PutChunks("video_1", 0, [chunk]))
        for tried in (1, 2):
            video = await store.get("video_1")
            assert video is not None and video.status is Status.IN_PROGRESS and len(tries) == tried
            assert await store.content("video_1", 0, 10) is None
            await store.sweep()
        video = await store.get("video_1")
        assert video is not None and (video.status, video.error_code) == (Status.FAILED, "signing_failed")
        assert await store.content("video_1", 0, 10) is None
        assert not list((tmp_path / "data").rglob("*.mp4*"))

    in_signing_store(tmp_path, signer, work)


def test_a_signing_that_works_again_completes_the_file(
    tmp_path: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    init, made = chunks()

    async def work(store: Store) -> None:
        await put_video(store, init)
        with monkeypatch.context() as patch:
            patch.setattr(ContentCredentials, "_signature", lambda self, data: b"")
            for chunk in made:
                await store.put_chunks(PutChunks("video_1", 0, [chunk]))
            video = await store.get("video_1")
            assert video is not None and video.status is Status.IN_PROGRESS
        await store.sweep()
        video, found = await store.get("video_1"), await store.content("video_1", 0, 1 << 20)
        assert video is not None and video.status is Status.COMPLETED
        assert found is not None and manifest_in(found[1])[0] == "Valid"

    in_signing_store(tmp_path, signer, work)


def test_a_file_made_before_files_were_signed_does_not_pass_for_a_signed_one(
    tmp_path: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ended between the file and its note in the database, and came back with a certificate."""
    init, made = chunks()

    async def unsigned(store: Store) -> None:
        await put_video(store, init)
        monkeypatch.setattr(store, "end", lambda *_: asyncio.sleep(0))
        for chunk in made:
            await store.put_chunks(PutChunks("video_1", 0, [chunk]))
        assert [validation_state(path) for path in (tmp_path / "data").rglob("*.mp4")] == ["unsigned"]

    async def signed(store: Store) -> None:
        await store.sweep()
        assert [validation_state(path) for path in (tmp_path / "data").rglob("*.mp4")] == ["Valid"]

    in_signing_store(tmp_path, None, unsigned)
    in_signing_store(tmp_path, signer, signed)


def test_without_a_certificate_files_are_not_signed_and_the_service_says_so(
    idle_http: httpx2.Client, tmp_path: Path
) -> None:
    told = idle_http.get("/v1/models").json()["provenance"]
    assert told["content_credentials"] is False and told["watermark"] is None and len(told["chain_public_key"]) == 64
    init, made = chunks()

    async def work(store: Store) -> None:
        assert await store.admit(VIDEO, LOCAL_CALLER, None) is None
        assert await store.opened(VIDEO.id, "replica-1", "video/mp4", init)
        for chunk in made:
            await store.put_chunks(PutChunks("video_1", 0, [chunk]))
        assert [validation_state(path) for path in (tmp_path / "data").rglob("*.mp4")] == ["unsigned"]

    in_signing_store(tmp_path, None, work)


@pytest.mark.parametrize("broken", ["expired", "no usage", "other key", "no key", "no certificate", "absent"])
def test_a_certificate_that_cannot_sign_is_refused_when_the_service_starts(tmp_path: Path, broken: str) -> None:
    signer = make_signer(tmp_path, days=-1 if broken == "expired" else 30, usage=broken != "no usage")
    if broken == "other key":
        (tmp_path / "other").mkdir()
        signer = replace(signer, key=make_signer(tmp_path / "other").key)
    elif broken == "absent":
        Path(signer.key).unlink()
    elif broken.startswith("no ") and broken != "no usage":
        Path(signer.key if broken == "no key" else signer.certificate).write_text("something else")
    with pytest.raises(FieldError) as caught:
        ContentCredentials.from_files(signer.certificate, signer.key)
    assert caught.value.field in ("c2pa_certificate", "c2pa_key")
    assert "PRIVATE" not in str(caught.value)


def test_the_reader_trusts_a_file_whose_root_it_knows(tmp_path: Path, signer: Signer) -> None:
    init, made = chunks()

    async def work(store: Store) -> bytes:
        await put_video(store, init)
        for chunk in made:
            await store.put_chunks(PutChunks("video_1", 0, [chunk]))
        found = await store.content("video_1", 0, 1 << 20)
        assert found is not None and isinstance(store._finalizer, FileFinalizer)
        return found[1]

    data = in_signing_store(tmp_path, signer, work)
    knows = {"version": 1, "trust": {"user_anchors": signer.root}, "verify": {"verify_trust": True}}
    context = c2pa.Context(c2pa.Settings.from_json(json.dumps(knows)))
    assert str(c2pa.Reader("video/mp4", io.BytesIO(data), context=context).get_validation_state()) == "Trusted"


def test_a_watermark_of_the_videos_id_is_in_every_file_and_small_sizes_are_not_offered(
    make_service: Make, until: Until, tmp_path: Path
) -> None:
    key = tmp_path / "watermark.key"
    key.write_bytes(b"a secret of the operator's own")
    marking = make_service(watermark="spread-spectrum", watermark_key=str(key))
    with http_client(marking.urls[0]) as http:
        told = http.get("/v1/models").json()
        assert told["provenance"]["watermark"] == "spread-spectrum" and told["data"][0]["sizes"] == ["256x256"]
        refused = http.post("/v1/videos", json={"prompt": PROMPT, "size": "32x32"})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "size"
        video, data = finished(http, until)
        stream = http.get(f"/v1/videos/{video}/stream").content
    for file in (data, stream):
        found = SpreadSpectrum(256, 256, key.read_bytes()).detect(read_mp4(file))
        assert found.found and found.bits == payload_of(video)[:16]
        assert not SpreadSpectrum(256, 256, b"another key, not the operator's").detect(read_mp4(file)).found


class Inverted:
    """A plug-in of the operator's."""

    def __init__(self, session_id: str, height: int, width: int, scale: int, key: bytes) -> None:
        assert (height, width, key) == (32, 32, b"key")

    def embed(self, pixels: Pixels, first_pixel_frame: int) -> Pixels:
        return 255 - pixels

    def detect(self, pixels: Pixels) -> Detection:
        raise NotImplementedError


@pytest.mark.slow
def test_another_watermark_may_be_plugged_in(make_service: Make, until: Until, tmp_path: Path) -> None:
    key = tmp_path / "watermark.key"
    key.write_bytes(b"key")
    marking = make_service(watermark=f"{__name__}:Inverted", watermark_key=str(key))
    with http_client(marking.urls[0]) as http:
        _, data = finished(http, until)
    assert abs(float(read_mp4(data).mean()) - (255 - shade(PROMPT))) < 2


def test_a_watermark_whose_key_or_code_is_missing_keeps_the_replica_from_starting(tmp_path: Path) -> None:
    key = tmp_path / "watermark.key"
    for watermark in ("spread-spectrum", "no.such.module:mark"):
        with pytest.raises(FieldError, match="watermark"):
            Watermarks.from_settings(ServeSettings(watermark=watermark, watermark_key=str(key)), CONFIG.geometry)
        key.write_bytes(b"short")
    settings = ServeSettings(watermark="spread-spectrum", watermark_key=str(key))
    short = Watermarks.from_settings(settings, CONFIG.geometry)
    with pytest.raises(FieldError, match="watermark_key"):
        short.scales((8, 1))
