"""Serve's configurations, of this machine and of the cluster, say what Serve and the app take as it is meant."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serve.settings import ServeSettings
from tests.infra.manifests import Document, load, manifests
from tests.infra.serve_files import check


@pytest.fixture(scope="module")
def files(repository: Path) -> dict[str, Document]:
    (local,) = load((repository / "serve" / "config.yaml").read_text())
    (cluster,) = load(manifests()["RayService/diagonal"]["spec"]["serveConfigV2"])
    return {"local": local, "cluster": cluster}


@pytest.mark.parametrize("name", ["local", "cluster"])
def test_serve_and_the_app_take_every_key(files: dict[str, Document], name: str) -> None:
    schema = check(files[name])
    assert [one.name for one in schema.applications] == ["diagonal"]


def test_only_behind_a_network_policy_does_serve_listen_to_others(files: dict[str, Document]) -> None:
    local, cluster = files["local"], files["cluster"]
    assert local["http_options"]["host"] == "127.0.0.1"
    assert cluster["http_options"]["host"] == "0.0.0.0" and _settings(cluster).auth == "keys"


def test_the_examples_in_the_comments_are_taken_too(repository: Path) -> None:
    """Each commented line of `args` in serve/config.yaml is a field, and the canary an application that builds."""
    text = (repository / "serve" / "config.yaml").read_text()
    examples = [line.split("# ", 1)[1] for line in text.splitlines() if line.startswith("      # ")]
    fields = [next(iter(load(line)[0])) for line in examples]
    assert len(fields) >= 8 and set(fields) <= set(ServeSettings().to_arguments())
    canary = [line[2:] for line in text.splitlines() if line.startswith(("#   - name: canary", "#     "))]
    listed: Any = load("\n".join(canary[canary.index("  - name: canary") :]))[0]
    (one,) = listed
    check({"applications": [one | {"args": one["args"] | {"release": "", "device": "cpu"}}]})


def _settings(document: Document) -> ServeSettings:
    return ServeSettings.from_arguments(document["applications"][0]["args"])


def _application(document: Document) -> Document:
    found: Document = document["applications"][0]
    return found


def _misspelled_top(document: Document) -> None:
    document["proxy_locations"] = document.pop("proxy_location")


def _misspelled_option(document: Document) -> None:
    document["http_options"]["prot"] = document["http_options"].pop("port")


def _misspelled_deployment_key(document: Document) -> None:
    _application(document)["deployments"] = [{"name": "Gateway", "num_replica": 2}]


def _misspelled_deployment(document: Document) -> None:
    _application(document)["deployments"] = [{"name": "Gatway", "num_replicas": 2}]


def _misspelled_actor_option(document: Document) -> None:
    _application(document)["deployments"] = [{"name": "Gateway", "ray_actor_options": {"num_cpu": 2}}]


def _misspelled_argument(document: Document) -> None:
    _application(document)["args"]["relase"] = "x"


def _wrong_argument(document: Document) -> None:
    _application(document)["args"]["replicas"] = "two"


def _fewer_at_most_than_at_least(document: Document) -> None:
    _application(document)["args"] |= {"replicas": 3, "max_replicas": 2}


def _wrong_port(document: Document) -> None:
    document["http_options"]["port"] = "eight thousand"


def _absent_function(document: Document) -> None:
    _application(document)["import_path"] = "serve.app:built"


@pytest.mark.parametrize("name", ["local", "cluster"])
@pytest.mark.parametrize(
    "spoil",
    [
        _misspelled_top,
        _misspelled_option,
        _misspelled_deployment_key,
        _misspelled_deployment,
        _absent_function,
        _misspelled_actor_option,
        _misspelled_argument,
        _wrong_argument,
        _fewer_at_most_than_at_least,
        _wrong_port,
    ],
)
def test_a_spoiled_configuration_is_refused(
    files: dict[str, Document], name: str, spoil: Callable[[Document], None]
) -> None:
    document = copy.deepcopy(files[name])
    spoil(document)
    with pytest.raises(ValueError):
        check(document)
