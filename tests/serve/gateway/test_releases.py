"""Several releases side by side: their names, their shares of new videos, and that a video keeps its own for life."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from diagonal.engine.engine import Engine
from diagonal.errors import FieldError
from diagonal.model.base_model import embedded
from diagonal.model.manifest import ReleaseError
from diagonal.model.release import Release
from diagonal.storage import Folder
from serve.gateway.fleet import Fleet
from serve.policies.traffic import Canaries, Shares
from serve.records import OpenSession, Refused
from serve.replica.loading import Loaded, load_engine
from serve.replica.replica import Replica
from serve.settings import NAME, ReleaseSettings, ServeSettings, parse_releases
from tests.networks import small_release
from tests.recorded_metrics import RecordedMetrics
from tests.serve.harness import FakeEngine, SideBySide, Until, http_client
from tests.serve.sockets import viewer

PROMPT = "a red circle moves left"
NAMES = ("stable", "next")
WRONG_NAMES = (
    "../stable",
    "..%2fstable",
    "%2e%2e",
    "/etc/passwd",
    "stable\x00",
    "stable/",
    "\\stable",
    "Stable",
    "",
    ".",
    "..",
    "s3://bucket/x",
    "file:///etc/passwd",
    "stable\n",
    " stable",
    "x" * 65,
    "ѕtable",
)


# What a file or a command line says of them.


def test_a_file_and_a_command_line_name_the_same_releases() -> None:
    text = ServeSettings.from_arguments({"releases": "stable=s3://b/r1, next=runs/x/release"})
    listed = [{"name": "stable", "release": "s3://b/r1"}, {"name": "next", "release": "runs/x/release"}]
    assert text == ServeSettings.from_arguments({"releases": listed})
    assert ServeSettings.from_arguments(text.to_arguments()) == text
    assert list(text.served()) == list(NAMES)


def test_each_release_has_its_own_limits_and_else_those_of_the_service() -> None:
    own = {"name": "next", "release": "r", "replicas": "1", "replica_gpus": "0.5", "allow_unpromoted": "true"}
    settings = ServeSettings.from_arguments(
        {"releases": [{"name": "stable"}, own], "replicas": 2, "max_replicas": 4, "replica_gpus": 1}
    )
    stable, following = settings.served().values()
    assert (stable.release, stable.model, stable.replicas, stable.replica_gpus) == ("", "stable", 2, 1.0)
    assert (following.release, following.model, following.replicas, following.replica_gpus) == ("r", "next", 1, 0.5)
    assert following.allow_unpromoted and not stable.allow_unpromoted and following.max_replicas == 4


def test_one_release_may_have_a_name_or_its_own() -> None:
    assert list(ServeSettings(release="r").served()) == [""]
    assert list(ServeSettings(release="r", model="stable").served()) == ["stable"]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"releases": [{"release": "r"}]}, "releases"),
        ({"releases": 3}, "releases"),
        ({"releases": ["a"]}, "releases"),
        ({"releases": "a=r,a=s"}, "releases"),
        ({"releases": "a=r", "release": "s"}, "releases"),
        ({"releases": "a=r", "model": "b"}, "releases"),
        ({"releases": [{"name": "a", "weight": 5}]}, "releases.weight"),
        ({"releases": [{"name": "a", "replicas": "two"}]}, "releases.replicas"),
        ({"releases": [{"name": "a", "replicas": 0}]}, "replicas"),
        ({"releases": [{"name": "a", "max_replicas": 1, "replicas": 2}]}, "max_replicas"),
        ({"releases": [{"name": "a", "allow_unpromoted": "perhaps"}]}, "releases.allow_unpromoted"),
        ({"model": "A"}, "model"),
        ({"max_replicas": 1, "replicas": 2}, "max_replicas"),
        ({"max_gateways": -1}, "max_gateways"),
        ({"headroom": 1}, "headroom"),
        ({"scale_up_delay_s": -1}, "scale_up_delay_s"),
        ({"gateway_connections": 0}, "gateway_connections"),
        ({"allow_unpromoted": 2}, "allow_unpromoted"),
    ],
)
def test_what_is_wrong_with_releases_is_named(arguments: dict[str, object], field: str) -> None:
    with pytest.raises(FieldError) as caught:
        ServeSettings.from_arguments(arguments)
    assert caught.value.field == field


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_no_release_has_a_name_that_could_be_a_path(name: str) -> None:
    with pytest.raises(FieldError, match="releases.name"):
        ReleaseSettings(name)


@given(st.text(max_size=70))
def test_a_name_is_allowed_exactly_when_it_is_plain(name: str) -> None:
    plain = 1 <= len(name) <= 64 and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-") and set(name) != {"."}
    try:
        parse_releases([{"name": name}])
    except FieldError:
        assert not plain
    else:
        assert plain and NAME.fullmatch(name)


def test_the_configuration_file_says_how() -> None:
    text = (Path(__file__).parents[3] / "serve" / "config.yaml").read_text()
    arguments = yaml.safe_load(text)["applications"][0]["args"]
    ServeSettings.from_arguments(arguments)
    start = text.index("# Several releases")
    end, after = text.index("#\n", start), text.index("#   - name: canary")
    example, canary = (
        yaml.safe_load("\n".join(line.removeprefix("# ") for line in part.splitlines() if line.startswith("# ")))
        for part in (text[text.index("\n", start) : end], text[after : text.index("#\n", after)])
    )
    settings = ServeSettings.from_arguments(example["args"])
    (gateway,) = example["deployments"]
    assert gateway["name"] == "Gateway"
    Shares.parse(list(settings.served()), gateway["user_config"]["weights"])
    assert canary[0]["import_path"] == "serve.app:build_release"
    assert list(ServeSettings.from_arguments(canary[0]["args"]).served()) == ["next"]
    told = yaml.safe_load(text[text.index("{name: Gateway,") :])
    wanted = Canaries.parse(told["user_config"])
    assert wanted.applications == {"next": canary[0]["name"]}
    Shares.parse(["stable", *wanted.applications], wanted.weights)


# Shares.


@pytest.mark.slow
def test_shares_are_as_the_weights_say() -> None:
    ids = [f"video_{number}" for number in range(20_000)]
    found = Counter(Shares.parse(["a", "b", "c"], {"a": 90, "b": 10}).ranked(one)[0] for one in ids)
    assert found["c"] == 0 and abs(found["b"] / len(ids) - 0.1) < 0.01
    even = Counter(Shares.parse(["a", "b", "c"], {"a": 1, "b": 1, "c": 1}).ranked(one)[0] for one in ids)
    assert all(abs(count / len(ids) - 1 / 3) < 0.015 for count in even.values())


@given(st.integers(0, 10**9), st.integers(1, 99))
def test_two_gateways_share_alike_and_a_larger_weight_only_wins(number: int, weight: int) -> None:
    video = f"video_{number:032x}"
    one = Shares.parse(["a", "b"], {"a": 100 - weight, "b": weight}).ranked(video)
    other = Shares.parse(["b", "a"], {"b": weight, "a": 100 - weight}).ranked(video)
    assert one == other
    if one[0] == "b":  # a canary that grows keeps what it had
        assert Shares.parse(["a", "b"], {"a": 99 - weight, "b": weight + 1}).ranked(video)[0] == "b"


def test_without_weights_the_first_release_makes_all() -> None:
    assert Shares.parse(NAMES).ranked("video_1") == ["stable"]


@pytest.mark.parametrize(
    "weights",
    [
        {"other": 1},
        {"stable": -1},
        {"stable": True},
        {"stable": "1"},
        {"stable": float("nan")},
        {"stable": float("inf")},
        {"stable": 0},
        {},
        [1, 2],
        5,
    ],
)
def test_weights_that_are_none_are_refused_and_change_nothing(weights: object) -> None:
    fleet = Fleet(dict.fromkeys(NAMES))
    fleet.share({"next": 1})
    with pytest.raises(FieldError, match="weights"):
        fleet.share(weights)
    assert fleet._shares.ranked("video_1") == ["next"]


@pytest.mark.parametrize(
    "told",
    [
        {"weight": {}},
        {"applications": ["a"]},
        {"applications": {"a": 1}},
        {"applications": {"../a": "x"}},
        {"applications": {"a": ""}},
    ],
)
def test_a_configuration_of_gateways_that_is_none_is_refused(told: dict[str, Any]) -> None:
    with pytest.raises(FieldError, match="applications|user_config"):
        Canaries.parse(told)


def test_a_release_of_another_application_comes_and_goes() -> None:
    fleet = Fleet({"stable": object()})
    fleet.share({"stable": 0, "next": 1}, {"next": object()})
    assert fleet._shares.ranked("video_1") == ["next"]
    for weights, others in (({"next": 1}, {}), ({"stable": 1}, {"stable": object()})):
        with pytest.raises(FieldError):
            fleet.share(weights, others)
        assert fleet._shares.ranked("video_1") == ["next"] and set(fleet._replicas) == set(NAMES)
    fleet.share(None)
    assert fleet._shares.ranked("video_1") == ["stable"] and set(fleet._replicas) == {"stable"}


# A running service.


@pytest.fixture
def service(tmp_path: Path) -> Iterator[SideBySide]:
    made = SideBySide(ServeSettings(data=str(tmp_path / "data"), gateways=2), FakeEngine())
    made.start()
    yield made
    made.stop()


@pytest.fixture
def http(service: SideBySide) -> Iterator[httpx2.Client]:
    with http_client(service.urls[0]) as client:
        yield client


def start(http: httpx2.Client, **fields: Any) -> dict[str, Any]:
    body = {"prompt": PROMPT, "num_frames": 33, "seed": 3} | fields
    told: dict[str, Any] = http.post("/v1/videos", json=body).raise_for_status().json()
    return told


def test_both_releases_are_listed_with_their_limits(http: httpx2.Client) -> None:
    models = http.get("/v1/models").json()["data"]
    assert [(model["id"], model["promoted"]) for model in models] == [("stable", True), ("next", False)]
    assert all(model["limits"]["max_frames"] > 0 for model in models)


@pytest.mark.slow
def test_a_request_names_its_release_or_the_weights_do(service: SideBySide, http: httpx2.Client) -> None:
    assert start(http)["model"] == "stable" and start(http, model="next")["model"] == "next"
    service.share(next=1)
    videos = [start(http, num_frames=9) for _ in range(3)] + [start(http, num_frames=9, model="stable")]
    assert [video["model"] for video in videos] == ["next"] * 3 + ["stable"]
    assert [service.holder(video["id"])[:-2] for video in videos] == ["next"] * 3 + ["stable"]
    with viewer(service.urls[1]) as one:
        one.start(prompt=PROMPT, model="stable", num_frames=9)
        assert service.run(service.store.get(one.request_id)).model == "stable"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WRONG_NAMES if name.isprintable()] + ["other"])
def test_a_model_that_is_not_there_is_404_whatever_its_name(name: str, http: httpx2.Client) -> None:
    answer = http.post("/v1/videos", json={"prompt": PROMPT, "model": name})
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
    assert "'next' or 'stable'" in answer.json()["detail"]
    assert http.post("/v1/videos", json={"prompt": PROMPT, "model": "stable\x00"}).status_code in (404, 422)


@pytest.mark.slow
def test_a_video_keeps_its_release_when_weights_change_or_its_replica_dies(
    service: SideBySide, http: httpx2.Client, until: Until
) -> None:
    video = start(http, num_frames=309)["id"]
    service.share(next=1)
    until(lambda: http.get(f"/v1/videos/{video}").json()["chunks_done"] >= 2, "two chunks")
    first = service.holder(video)
    service.run(service.kill_replica(first))
    until(lambda: http.get(f"/v1/videos/{video}").json()["status"] == "completed", "completed", 60)
    assert {first, service.holder(video)} == {"stable-1", "stable-2"}
    assert http.get(f"/v1/videos/{video}").json()["model"] == "stable"


@pytest.mark.slow
def test_a_session_never_goes_to_another_release(
    service: SideBySide, http: httpx2.Client, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PATIENCE_S", "UNWATCHED_PATIENCE_S"):
        monkeypatch.setattr(f"serve.gateway.driver.{name}", 1.0)
    video = start(http, num_frames=105)["id"]
    until(lambda: http.get(f"/v1/videos/{video}").json()["chunks_done"] >= 2, "two chunks")
    for name in ("stable-1", "stable-2"):
        service.run(service.kill_replica(name))
    told = until(lambda: (v := http.get(f"/v1/videos/{video}").json())["status"] == "failed" and v, "failed", 60)
    assert told["error"]["code"] == "session_lost" and service.replicas["next-1"]._slots == {}
    assert start(http, model="next", num_frames=9)["model"] == "next", "the other release goes on"


@pytest.mark.slow
def test_a_release_that_does_not_answer_gives_way_to_the_next(service: SideBySide, http: httpx2.Client) -> None:
    service.share(stable=1, next=1)
    service.run(service.kill_replica("next-1"))
    assert {start(http, num_frames=9)["model"] for _ in range(6)} == {"stable"}
    assert http.get("/health/ready").status_code == 200
    for name in ("stable-1", "stable-2"):
        service.run(service.kill_replica(name))
    assert http.get("/health/ready").status_code == 503


@pytest.mark.slow
def test_a_video_whose_release_is_gone_ends_and_what_was_made_stays(
    service: SideBySide, http: httpx2.Client, until: Until
) -> None:
    done = start(http, model="next", num_frames=9)["id"]
    until(lambda: http.get(f"/v1/videos/{done}").json()["status"] == "completed", "completed")
    video = start(http, model="next", num_frames=105, extra={"pacing": "realtime"})["id"]

    async def withdraw() -> None:  # as a gateway that starts without the release, which takes the video over
        for gateway in service.gateways:
            gateway._fleet._replicas.pop("next")
            gateway._fleet._shares = Shares.parse(["stable"])
        await service.gateways[0]._drivers.let_go()
        await service.gateways[1]._drivers.adopt(await service.store.get(video))

    service.run(withdraw())
    told = until(lambda: (v := http.get(f"/v1/videos/{video}").json())["status"] == "failed" and v, "failed")
    assert told["error"]["code"] == "release_gone"
    assert http.get(f"/v1/videos/{done}/content").status_code == 200
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["stable"]


def test_a_snapshot_of_another_release_is_refused(tmp_path: Path) -> None:
    async def work() -> None:
        made, settings = list[Replica](), ServeSettings(data=str(tmp_path))
        for name, digest in (("stable", "a"), ("next", "a"), ("stable", "b")):
            release = replace(small_release(), name=name, manifest={"files": {"w.safetensors": {"sha256": digest}}})
            loaded = Loaded(name, release.config, Engine(release))
            made.append(Replica(settings, lambda *_, loaded=loaded: loaded, RecordedMetrics(), f"r{len(made)}"))
        try:
            await made[0].open(OpenSession("v", PROMPT, 3, 81, 1))
            first = await made[0].pull("v", 0, 0, -1)
            assert isinstance(first, tuple) and first[0].snapshot
            for other, part in ((made[1], "release"), (made[2], "content")):
                refused = await other.restore([first[0].snapshot], 1)
                assert isinstance(refused, Refused) and refused.code == "snapshot_refused"
                assert f"snapshot.identity.{part}" in refused.message
        finally:
            for replica in made:
                await replica.shut()

    asyncio.run(asyncio.wait_for(work(), 60))


# Loading.


class WarmEngine:
    """Stands for an engine: says when it was warmed up."""

    def __init__(self, release: Any, **_: Any) -> None:
        self.release, self.warm = release, False

    def warm_up(self) -> None:
        self.warm = True


def judged(folder: Path, **manifest: Any) -> str:
    """A copy of the embedded release whose manifest says something else."""
    shutil.copytree(embedded("release"), folder)
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "name": folder.name, **manifest}))
    return str(folder)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Loaded]:
    """What a replica loads, by these settings."""
    monkeypatch.setattr("serve.replica.loading.Engine", WarmEngine)
    return lambda **settings: load_engine(ServeSettings(**settings), RecordedMetrics())


def test_the_embedded_release_is_served_and_warm_before_anybody_is_told(load: Callable[..., Loaded]) -> None:
    loaded = load()
    assert loaded.promoted and loaded.model == Release.load().name
    assert isinstance(loaded.engine, WarmEngine) and loaded.engine.warm
    assert load(model="stable").model == "stable"


@pytest.mark.parametrize("promoted", [False, None, "true", 1])
def test_a_release_that_was_not_promoted_is_served_only_when_asked(
    promoted: object, load: Callable[..., Loaded], tmp_path: Path
) -> None:
    uri = judged(tmp_path / "r1", promoted=promoted, promotion_reasons=["colours fade"])
    with pytest.raises(ReleaseError, match="release r1 in .*/r1 is not promoted: colours fade.*allow_unpromoted: true"):
        load(release=uri)
    loaded = load(release=uri, allow_unpromoted=True)
    assert loaded.model == "r1" and not loaded.promoted


@pytest.mark.slow
def test_a_release_on_s3_is_checked_like_one_on_disk(
    load: Callable[..., Loaded], bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIAGONAL_CACHE", str(tmp_path / "cache"))
    folder = Path(judged(tmp_path / "r1"))
    network = next(folder.glob("transformer/*.safetensors"))
    flipped = bytes([network.read_bytes()[0] ^ 1]) + network.read_bytes()[1:]
    for name, changed in (("good", ""), ("flipped", f"transformer/{network.name}"), ("pickled", "vae/x.bin")):
        for path in folder.rglob("*.*"):
            Folder(f"s3://{bucket}/{name}").put(path, str(path.relative_to(folder)))
        if changed:
            Folder(f"s3://{bucket}/{name}").write(changed, flipped)
    assert load(release=f"s3://{bucket}/good").promoted
    with pytest.raises(ReleaseError, match="safetensors is missing or differs from its sha256"):
        load(release=f"s3://{bucket}/flipped")
    with pytest.raises(ReleaseError, match="'vae/x.bin' could run code"):
        load(release=f"s3://{bucket}/pickled")
    with pytest.raises(FieldError, match="an s3:// folder that exists"):
        load(release=f"s3://{bucket}/../{bucket}/nothing")


def test_a_video_that_is_being_made_is_streamed_though_its_release_is_taken_away(
    service: SideBySide, http: httpx2.Client
) -> None:
    video = start(http, model="next", num_frames=33, extra={"pacing": "realtime"})["id"]
    for gateway in service.gateways:  # as one whose configuration no longer names the release
        gateway._fleet._replicas.pop("next")
        gateway._fleet._shares = Shares.parse(["stable"])
    for url in service.urls:
        streamed = httpx2.get(f"{url}/v1/videos/{video}/stream", timeout=60)
        assert streamed.status_code == 200 and streamed.content
    assert http.get(f"/v1/videos/{video}").json()["status"] == "completed"
