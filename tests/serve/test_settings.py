"""Arguments of the application: text from a command line, values from a file, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from diagonal import cli
from diagonal.config.describe import page, rows_of
from diagonal.errors import FieldError
from diagonal.metrics import NullBackend
from diagonal.model.release import Release
from serve.app import build
from serve.replica import loading
from serve.settings import ServeSettings


def test_text_and_values_say_the_same() -> None:
    text = ServeSettings.from_arguments({"replicas": "2", "replica_gpus": "0.5", "codec": "vp9"})
    assert text == ServeSettings.from_arguments({"replicas": 2, "replica_gpus": 0.5, "codec": "vp9"})
    assert (text.replicas, text.replica_gpus) == (2, 0.5)


def test_arguments_come_back_as_they_went_in() -> None:
    settings = ServeSettings(release="runs/release", gateways=3)
    assert ServeSettings.from_arguments(settings.to_arguments()) == settings


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"nothing": "x"}, "nothing"),
        ({"releases": "x"}, "releases"),
        ({"replicas": "two"}, "replicas"),
        ({"replicas": 0}, "replicas"),
        ({"replicas": True}, "replicas"),
        ({"codec": "mpeg2"}, "codec"),
        ({"replica_gpus": -1}, "replica_gpus"),
        ({"session_idle_timeout_s": 0}, "session_idle_timeout_s"),
        ({"data": ""}, "data"),
        ({"options": "decoder=small"}, "serve.decoder"),
        ({"options": "decoder=fast,nothing=1"}, "setting"),
        ({"c2pa_certificate": "chain.pem"}, "c2pa_key"),
        ({"watermark": "spread-spectrum"}, "watermark_key"),
        ({"watermark": "something", "watermark_key": "key"}, "watermark"),
        ({"prompt_policy": "deny-list:"}, "prompt_policy"),
        ({"prompt_policy": "a/module.py"}, "prompt_policy"),
        ({"prompt_policy_timeout_s": 0}, "prompt_policy_timeout_s"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, object], field: str) -> None:
    with pytest.raises(FieldError) as caught:
        ServeSettings.from_arguments(arguments)
    assert caught.value.field == field


def test_an_unknown_argument_is_refused_with_the_one_that_is_near() -> None:
    with pytest.raises(FieldError, match=r"no such argument, did you mean replicas\?"):
        ServeSettings.from_arguments({"replikas": 2})
    with pytest.raises(FieldError, match=r"releases\.relase = .*no such field, did you mean release\?"):
        ServeSettings.from_arguments({"releases": [{"name": "a", "relase": "r"}]})


def test_every_setting_of_the_service_has_a_meaning_and_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert [row.name for row in rows_of(ServeSettings()) if not row.meaning.endswith(".") or not row.allowed] == []
    assert cli.main(["config", "service", "--json"]) == 0
    printed = {row["name"]: row["default"] for row in json.loads(capsys.readouterr().out)}
    assert printed == json.loads(json.dumps(ServeSettings().to_arguments()))
    assert cli.main(["config", "service"]) == 0
    assert "drain_s = 600.0 s\n" in capsys.readouterr().out


def test_the_page_of_the_configuration_is_what_the_code_makes(repository: Path) -> None:
    remedy = "run `python -m serve.describe docs/configuration.md`"
    assert (repository / "docs" / "configuration.md").read_text(encoding="utf-8") == page(ServeSettings()), remedy


def test_options_are_settings_of_the_releases_own_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, taken = ServeSettings(options="decoder=full, cache_dtype=fp8"), list[Release]()
    assert settings.release_settings == ("serve.decoder=full", "serve.cache_dtype=fp8")

    def engine(release: Release, **parts: object) -> Mock:
        taken.append(release)
        return Mock()

    monkeypatch.setattr(loading, "Engine", engine)
    loaded = loading.load_engine(settings, NullBackend())
    assert loaded.count_tokens is not None and loaded.count_tokens("a &amp; red circle") == 5  # with the end mark
    assert loaded.config == taken[0].config == Release.load().config.with_settings(["serve.cache_dtype=fp8"])


@pytest.mark.parametrize(("settings", "encoding"), [({}, "TEXT"), ({"log_format": "json"}, "JSON")])
def test_every_part_writes_its_logs_in_the_format_that_is_asked_for(settings: dict[str, str], encoding: str) -> None:
    gateway: Any = build({"release": "", **settings})._bound_deployment
    _, store, replicas = gateway.init_args
    parts = [gateway, store._bound_deployment, *(one._bound_deployment for one in replicas.values())]
    assert len(parts) == 3 and {part._deployment_config.logging_config["encoding"] for part in parts} == {encoding}
