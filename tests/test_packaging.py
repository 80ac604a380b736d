"""What is installed: the wheel holds the package and its embedded weights, the pins cover all, the commands exist."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

# The CUDA build of torch brings these; which of them depends on the machine, so none is pinned.
OF_A_GPU = re.compile(r"nvidia-|cuda-|triton$")
REGISTRY_HOSTS = re.compile(r"pypi\.org|pythonhosted\.org|download\.pytorch\.org")
EXTRAS = "model train serve serve-postgres provenance traces dashboards completion dev".split()
CLIENT = {"httpx2", "websockets", "cryptography"}


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    """The `project` table of pyproject.toml."""
    table = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert isinstance(table, dict)
    return table


@pytest.fixture(scope="module")
def pins(repository: Path) -> dict[str, Version]:
    """constraints.txt: version by name; every line is `name==version`, valid on every machine."""
    lines = [line for line in (repository / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    matches = {line: re.fullmatch(r"([A-Za-z0-9._-]+)==([^;\s]+)", line) for line in lines}
    assert all(matches.values()), [line for line, match in matches.items() if match is None]
    return {canonicalize_name(match[1]): Version(match[2]) for match in matches.values() if match is not None}


@pytest.fixture(scope="module")
def wheel_names(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names inside a wheel that the installed setuptools builds, without network, from a copy of the source."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(repository / "platform", source / "platform", ignore=shutil.ignore_patterns("*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, source)
    build = "from setuptools import build_meta; build_meta.build_wheel('out')"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def files_of(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not {"__pycache__", "diagonal.egg-info"} & set(path.parts)
    }


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(repository: Path, wheel_names: set[str]) -> None:
    expected = files_of(repository / "platform")
    assert {"diagonal/__init__.py", "diagonal/py.typed"} <= expected
    assert {name for name in wheel_names if ".dist-info/" not in name} == expected


def requirements(project: dict[str, Any]) -> list[Requirement]:
    """What the project and its extras ask for, but the extras that name others of them."""
    texts = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    return [one for one in map(Requirement, texts) if one.name != project["name"]]


def needed(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def closure(name: str, extras: set[str]) -> dict[str, str]:
    """Installed version of `name` with `extras` and of everything that it needs on this machine, by name."""
    found: dict[str, str] = {}
    waiting, seen = [(name, extra) for extra in extras | {""}], set()
    while waiting:
        current, extra = waiting.pop()
        if (current, extra) in seen:
            continue
        seen.add((current, extra))
        found[canonicalize_name(current)] = metadata.version(current)
        for text in metadata.requires(current) or []:
            requirement = Requirement(text)
            if needed(requirement, extra):
                waiting += [(requirement.name, wanted) for wanted in requirement.extras | {""}]
    return found


@pytest.mark.slow
def test_everything_that_is_installed_is_pinned_at_the_tested_version(
    project: dict[str, Any], pins: dict[str, Version]
) -> None:
    installed: dict[str, str] = {}
    for requirement in requirements(project):
        installed |= closure(requirement.name, requirement.extras)
    different = {
        name: (version, str(pins.get(name)))
        for name, version in installed.items()
        if not OF_A_GPU.match(name) and Version(version).public != str(pins.get(name))
    }
    assert different == {}
    assert len(installed) > 100


def test_the_pins_satisfy_what_the_project_asks_for(project: dict[str, Any], pins: dict[str, Version]) -> None:
    assert list(project["optional-dependencies"]) == EXTRAS
    for requirement in requirements(project):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_pins_choose_neither_the_cpu_build_nor_the_cuda_one(pins: dict[str, Version]) -> None:
    assert str(pins["torch"]) == "2.13.0"
    assert [name for name in pins if OF_A_GPU.match(name)] == []
    assert [name for name, version in pins.items() if version.local] == []


def locked(repository: Path) -> dict[str, tuple[Version, list[str]]]:
    """requirements.lock: version and hashes by name. A line that is neither a pin nor a hash of one is an error."""
    found: dict[str, tuple[Version, list[str]]] = {}
    name = ""
    for line in (repository / "requirements.lock").read_text().splitlines():
        if line.startswith("#"):
            continue
        if pin := re.fullmatch(r"([A-Za-z0-9._-]+)==([^;\s]+)( ; [^\\]+)? \\", line):
            name = canonicalize_name(pin[1])
            assert name not in found, name
            found[name] = (Version(pin[2]), [])
        else:
            digest = re.fullmatch(r"    --hash=sha256:([0-9a-f]{64})(?: \\)?", line)
            assert digest is not None and name, line
            found[name][1].append(digest[1])
    return found


def test_the_lock_holds_every_pin_but_torch_with_hashes(repository: Path, pins: dict[str, Version]) -> None:
    """What `make lock` writes: the same versions as the constraints, nothing that came from anywhere else."""
    lock = locked(repository)
    assert {name: version for name, (version, _) in lock.items()} == {
        name: version for name, version in pins.items() if name != "torch"
    }
    hashes = [one for _, found in lock.values() for one in found]
    assert all(found for _, found in lock.values()) and len(set(hashes)) == len(hashes)


def test_the_tested_versions_are_allowed_and_the_others_are_not(project: dict[str, Any]) -> None:
    allowed = Requirement("python" + project["requires-python"]).specifier
    assert [minor for minor in range(9, 17) if allowed.contains(f"3.{minor}")] == [11, 12, 13, 14]
    named = [line.rpartition(":: 3.")[2] for line in project["classifiers"] if ":: Python :: 3." in line]
    assert named == ["11", "12", "13", "14"]
    ranges = {one.name: one.specifier for one in requirements(project)}
    assert [minor for minor in range(9, 17) if ranges["torch"].contains(f"2.{minor}.0")] == [11, 12, 13, 14]


def test_the_client_alone_is_three_packages(project: dict[str, Any]) -> None:
    assert {Requirement(text).name for text in project["dependencies"]} == CLIENT


def test_the_client_and_its_command_line_start_with_those_three_alone(repository: Path) -> None:
    """Every package of an extra is hidden from the import, as where nothing but the client is installed."""
    table = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    hidden = {one.name.lower() for one in requirements(table)} - CLIENT
    code = f"""
import sys
from diagonal.cli import main
import diagonal.client
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
of_extras = {hidden | {"PIL", "google", "numpy", "pydantic", "yaml"}!r} & set(sys.modules)
assert not of_extras, of_extras
"""
    environment = os.environ | {"PYTHONPATH": str(repository / "platform")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "generate" in done.stdout, done.stderr


def test_the_console_script_leads_to_a_function(project: dict[str, Any]) -> None:
    module, _, function = project["scripts"]["diagonal"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_no_file_names_a_package_registry(repository: Path) -> None:
    tops = ("platform", "jobs", "serve", "infra", "tests", "docs", ".ci")
    paths = [path for top in tops for path in (repository / top).rglob("*") if path.is_file()]
    paths += [path for path in repository.iterdir() if path.is_file()]
    texts = {path: path.read_bytes().decode(errors="ignore") for path in paths if "__pycache__" not in path.parts}
    assert len(texts) > 50
    assert [path for path, text in texts.items() if REGISTRY_HOSTS.search(text)] == []


def test_no_message_tells_to_install_the_package_of_a_stranger(repository: Path) -> None:
    """The name on the public index is not this project's."""
    tops = ("platform", "jobs", "serve", "infra", "docs")
    paths = [path for top in tops for path in (repository / top).rglob("*.*") if path.suffix in (".py", ".md", ".yaml")]
    paths += [repository / "README.md"]
    assert [path for path in paths if re.search(r"pip install ['\"]?diagonal", path.read_text())] == []


def test_make_alone_lists_every_command_and_variable(repository: Path) -> None:
    done = subprocess.run(["make"], cwd=repository, capture_output=True, text=True, timeout=30, check=True)
    for word in ("help", "env", "demo", "stop", "test", "check", "lint", "clean"):
        assert re.search(rf"^  {word} ", done.stdout, re.MULTILINE), word
    for variable in ("PYTHON", "VENV", "TORCH_INDEX_URL", "KEEP", "FROM_SCRATCH", "PYTEST_ARGS"):
        assert f"  {variable}=" in done.stdout


def test_an_unsupported_interpreter_is_refused_with_the_allowed_versions(repository: Path, tmp_path: Path) -> None:
    arguments = ["make", "env", f"VENV={tmp_path / 'venv'}", "PYTHON=false"]
    done = subprocess.run(arguments, cwd=repository, capture_output=True, text=True, timeout=30)
    assert done.returncode != 0
    assert "Python 3.11 to 3.14 is needed" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_what_ci_runs_is_executable(repository: Path) -> None:
    assert os.access(repository / ".ci" / "run", os.X_OK)
