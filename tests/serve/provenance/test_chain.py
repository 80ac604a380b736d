"""The signed chain of a live stream, over real sockets: it outlives replicas, gateways, and the store's process."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from diagonal.chain import public_key_of
from diagonal.cli import main
from diagonal.client.verify import Chain, verify
from diagonal.errors import FieldError
from diagonal.mp4 import PartReader
from serve.provenance.signing_key import signing_key
from tests.serve.harness import Cluster, Service, Until, http_client
from tests.serve.sockets import cut, viewer

FAST: dict[str, Any] = {"extra_params": {"pacing": "none"}}


def public_keys(http: httpx2.Client) -> set[str]:
    return {http.get("/v1/models").json()["provenance"]["chain_public_key"]}


def chain_of(http: httpx2.Client, video: str, **params: Any) -> Chain:
    return Chain.from_answer(http.get(f"/v1/videos/{video}/chain", params=params).raise_for_status().json())


def test_a_recorded_stream_is_proved_by_its_chain(http: httpx2.Client) -> None:
    video = http.post("/v1/videos", json={"prompt": "a red circle", "num_frames": 45}).json()["id"]
    data = http.get(f"/v1/videos/{video}/stream").content
    chain = chain_of(http, video)
    report = verify(data, chain, public_keys(http))
    assert report.ok and report.complete and report.chunks == 4
    init, *parts = PartReader().feed(data)
    swapped = verify(b"".join([init, parts[0], parts[2], parts[1], parts[3]]), chain, public_keys(http))
    assert [str(one) for one in swapped.findings] == ["chunk 1 is moved", "chunk 2 is moved"]
    assert chain_of(http, video, start_chunk=1, limit=2).links == chain.links[1:3]
    assert http.get(f"/v1/videos/{video}/chain", params={"limit": 2}).json()["has_more"] is True


def test_a_viewer_on_the_socket_is_told_each_link_with_its_chunk(service: Service, http: httpx2.Client) -> None:
    with viewer(service.urls[0]) as one:
        one.start(num_frames=45, **FAST)
        one.until("session.done")
    chain = Chain.from_answer({"video_id": one.request_id, "links": [told["chunk_link"] for told in one.chunks]})
    report = verify(bytes(one.video), chain, public_keys(http))
    assert report.ok and report.complete and chain == chain_of(http, one.request_id)


def test_the_command_line_proves_a_recording(
    service: Service, http: httpx2.Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, path, chain = service.urls[0], tmp_path / "stream.mp4", tmp_path / "chain.json"
    video = http.post("/v1/videos", json={"prompt": "a red circle", "num_frames": 45}).json()["id"]
    init, *parts = PartReader().feed(http.get(f"/v1/videos/{video}/stream").content)
    path.write_bytes(b"".join([init, *parts]))
    chain.write_bytes(http.get(f"/v1/videos/{video}/chain").content)
    for source in (video, f"{url}/v1/videos/{video}/chain", str(chain)):
        assert main(["verify", str(path), "--chain", source, "--url", url]) == 0
        assert "4 chunks" in capsys.readouterr().err
    assert main(["verify", str(path), "--chain", str(chain), "--url", url, "--public-key", "00" * 32]) == 5
    path.write_bytes(b"".join([init, parts[0], parts[2], parts[3]]))
    assert main(["verify", str(path), "--chain", str(chain), "--url", url]) == 5
    assert "chunk 1 is missing" in capsys.readouterr().err
    for nothing in ("../secrets", str(path), f"http://127.0.0.2:1/v1/videos/{video}/chain"):
        assert main(["verify", str(path), "--chain", nothing, "--url", url]) == 2


def test_another_keys_chain_is_not_there(http: httpx2.Client) -> None:
    assert http.get("/v1/videos/video_none/chain").status_code == 404
    assert http.get("/v1/videos/video_none/chain", params={"limit": 0}).status_code == 422


@pytest.mark.slow
def test_it_goes_on_over_a_replica_a_gateway_and_a_store_that_die(
    make_cluster: Callable[..., Cluster], until: Until
) -> None:
    cluster = make_cluster()
    with http_client(cluster.urls[0]) as http:
        keys = public_keys(http)
        with viewer(cluster.urls[0]) as one:
            one.start(num_frames=81, seed=3, **FAST)
            one.read(2)
            cluster.kill_holder(one.request_id)
            one.read(1)
            cut(one)
        cluster.run(cluster.kill_store())
        cluster.run(cluster.restart_store())
        with viewer(cluster.urls[1]) as other:
            other.start(resume_token=one.resume_token)
            other.until("session.done")
        assert one.indices + other.indices == list(range(7))
        chain = chain_of(http, one.request_id)
        assert public_keys(http) == keys
        report = verify(bytes(one.video + other.video), chain, keys)
        assert report.ok and report.complete and report.chunks == 7
        stream = http.get(f"/v1/videos/{one.request_id}/stream").content
        assert verify(stream, chain, keys).complete


def test_of_an_endless_stream_whatever_was_recorded_can_be_proved(service: Service, http: httpx2.Client) -> None:
    """Its oldest chunks are gone, their links stay; who came later has the beginning of the stream, not its chunks."""
    with viewer(service.urls[0]) as one:
        one.start(num_frames=81, **FAST)
        one.until("session.done")
    service.run(service.store._run(service.store._database.forget_chunks, one.request_id, 3))
    chain, keys = chain_of(http, one.request_id), public_keys(http)
    assert [link.chunk for link in chain.links] == list(range(7))
    init, *parts = PartReader().feed(bytes(one.video))
    assert verify(bytes(one.video), chain, keys).complete
    assert verify(b"".join([init, *parts[3:]]), chain, keys, part=True).ok
    findings = verify(b"".join([init, parts[3], *parts[5:]]), chain, keys, part=True).findings
    assert [(found.chunk, found.fault) for found in findings] == [(4, "missing")]


def test_the_key_is_made_once_and_is_its_owners_alone(tmp_path: Path) -> None:
    first, again = (public_key_of(signing_key("", tmp_path)) for _ in range(2))
    (path,) = tmp_path.iterdir()
    assert first == again and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert public_key_of(signing_key(str(path), tmp_path / "elsewhere")) == first


@pytest.mark.parametrize("content", [b"", b"no key", "another kind", None])
def test_what_is_no_key_is_refused(tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "key.pem"
    if content == "another kind":
        own = generate_private_key(SECP256R1())
        path.write_bytes(own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(FieldError, match="signing_key"):
        signing_key(str(path), tmp_path)
    assert not (tmp_path / "signing_key.pem").exists()
