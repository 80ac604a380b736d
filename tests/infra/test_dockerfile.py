"""The image: a linter's rules, what is copied exists, nobody is root, nothing is inside that should not be."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

TARGETS = ("cpu", "gpu")


@pytest.fixture(scope="module")
def instructions(repository: Path) -> list[tuple[str, str]]:
    """(instruction, its argument) of each line, continued ones joined, comments gone."""
    lines = (repository / "infra" / "Dockerfile").read_text().splitlines()
    joined = re.sub(r"\\\n\s*", " ", "\n".join(line for line in lines if not line.startswith("#")))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


@pytest.fixture(scope="module")
def stages(instructions: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage by its name, `FROM` among them."""
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions:
        if word == "FROM":
            found[rest.split()[-1]] = []
        if found:
            found[list(found)[-1]].append((word, rest))
    return found


def lint(path: Path) -> str:
    """What hadolint says; empty when nothing."""
    program = Path(sys.executable).with_name("hadolint")
    return subprocess.run([program, path], capture_output=True, text=True, timeout=60).stdout


def test_the_linter_has_nothing_to_say(repository: Path) -> None:
    assert lint(repository / "infra" / "Dockerfile") == ""


@pytest.mark.parametrize(
    ("before", "after", "rule"),
    [
        ("WORKDIR /opt/diagonal", "WORKDIR diagonal", "DL3000"),
        ("COPY serve serve", "COPY --from=nothing serve serve", "DL3022"),
        ("uv==0.13.9", "uv", "DL3013"),
        ("USER 1000:1000\n\n# gcc", "USER root\n\n# gcc", ""),
        ("HEALTHCHECK", "HEALTCHECK", ""),
        ('"--block"', "'--block'", "DL3025"),
    ],
)
def test_the_linter_refuses_a_spoiled_copy(
    repository: Path, tmp_path: Path, before: str, after: str, rule: str
) -> None:
    text = (repository / "infra" / "Dockerfile").read_text()
    assert before in text
    spoiled = tmp_path / "Dockerfile"
    spoiled.write_text(text.replace(before, after) + ("USER root\n" if "USER root" in after else ""))
    assert rule in lint(spoiled) and lint(spoiled)


def sources(stage: list[tuple[str, str]]) -> list[str]:
    """What a stage copies out of the repository."""
    copies = [rest.split() for word, rest in stage if word == "COPY" and not rest.startswith("--from")]
    return [name for words in copies for name in words[:-1]]


def test_every_file_that_is_copied_exists_and_is_let_through(
    repository: Path, stages: dict[str, list[tuple[str, str]]]
) -> None:
    rules = (repository / ".dockerignore").read_text().splitlines()
    names = {name for stage in stages.values() for name in sources(stage)}
    assert names and all((repository / name).exists() for name in names)
    assert rules.index("*") < min(rules.index(f"!{name}") for name in names), "nothing else comes in"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == names


def test_both_targets_hold_the_same_code_and_are_nobody(stages: dict[str, list[tuple[str, str]]]) -> None:
    assert sources(stages["cpu"]) == sources(stages["gpu"])
    assert {"platform", "jobs", "serve"} <= set(sources(stages["gpu"]))
    for target in TARGETS:
        users = [rest for word, rest in stages[target] if word == "USER"]
        assert users == ["1000:1000"] and stages[target][-1] == ("USER", users[-1])


def test_every_base_is_a_stage_of_this_file_or_the_pinned_image(instructions: list[tuple[str, str]]) -> None:
    known = {"${PYTHON_IMAGE}"}
    for word, rest in instructions:
        if word == "FROM":
            base, _, name = rest.split()
            assert base in known, base
            known.add(name)
        if word == "COPY" and rest.startswith("--from="):
            assert rest.split()[0].removeprefix("--from=") in known
    (image,) = (rest.removeprefix("PYTHON_IMAGE=") for word, rest in instructions if word == "ARG")
    assert re.fullmatch(r"python:3\.1[1-4](\.\d+)?-slim-[a-z]+(@sha256:[0-9a-f]{64})?", image)


def test_packages_come_by_the_lock_with_the_extras_that_the_project_has(
    repository: Path, stages: dict[str, list[tuple[str, str]]]
) -> None:
    extras = set(tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    environment = " ".join(rest for word, rest in stages["build"] if word == "ENV")
    assert 'UV_CONSTRAINT="constraints.txt requirements.lock"' in environment
    for target in TARGETS:
        (command,) = (rest for word, rest in stages[f"build-{target}"] if word == "RUN")
        asked = set(re.findall(r"--extra (\S+)", command))
        assert {"train", "serve"} <= asked <= extras - {"dev", "completion", "dashboards"}
        assert ("--torch-backend cpu" in command) == (target == "cpu")


def test_what_it_starts_and_asks_for_its_health_is_inside(
    repository: Path, stages: dict[str, list[tuple[str, str]]]
) -> None:
    runtime = dict(stages["runtime"])
    command, health = json.loads(runtime["CMD"]), json.loads(runtime["HEALTHCHECK"].partition("CMD ")[2])
    assert command[0] == "ray" and (Path(sys.executable).parent / "ray").exists()
    assert f" {health[0]} " in next(rest for word, rest in stages["runtime"] if word == "RUN")
    environment = " ".join(rest for word, rest in stages["runtime"] if word == "ENV")
    assert "RAY_AUTH_MODE=token" in environment and "--dashboard-host=127.0.0.1" in command
    (folder,) = (rest for word, rest in stages["base"] if word == "WORKDIR")
    assert f"PYTHONPATH={folder}/platform:{folder}" in environment, "it starts in the repository's root"


def test_no_secret_run_or_weight_gets_into_the_image(repository: Path) -> None:
    rules = (repository / ".dockerignore").read_text().splitlines()
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    for name in (".diagonal/run.json", "runs/a/release/x.safetensors", ".git/config", ".env", "auth_token"):
        assert not any(fnmatch.fnmatch(name, rule) or name.startswith(f"{rule}/") for rule in allowed), name
    heavy = [path for name in allowed for path in (repository / name).rglob("*.safetensors")]
    assert sum(path.stat().st_size for path in heavy) < 40e6, "only the embedded model"
