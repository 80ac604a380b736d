"""Names of the hub: read through huggingface_hub's own client from a small hub on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diagonal import cli
from diagonal.errors import FieldError
from diagonal.model.base_model import embedded
from diagonal.model.manifest import ReleaseError
from diagonal.model.release import Release
from diagonal.storage import Folder, StorageError
from diagonal.storage.fetch import fetch, fetch_file
from diagonal.storage.remote import location, meaning
from tests.hub import TOKEN, SmallHub
from tests.model.folders import files_of

FILES = {
    "model_index.json": b"{}",
    "README.md": b"# a card",
    "transformer/config.json": b'{"num_layers": 3}',
    "transformer/diffusion_pytorch_model.safetensors": b"weights" * 1000,
    "transformer/pytorch_model.bin": b"a pickle",
    "examples/clip.mp4": b"a video",
    "checkpoints/student.pt": b"a student",
}
SAFE = {name: data for name, data in FILES.items() if not name.endswith((".bin", ".mp4", ".pt"))}


def test_what_a_name_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert location("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") == "hf://Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert location("org/name@v1.0") == "hf://org/name@v1.0"
    assert location("org/prompts", "datasets") == "hf://datasets/org/prompts"
    assert location("runs/mine") == "runs/mine"  # it is here
    assert location("~/wan") == str(tmp_path / "home" / "wan")
    assert location("file:///data/p.txt") == "/data/p.txt"
    for path in ("wan", "./org/name", "../org/name", "/org/name", "a/b/c", "lists/p.txt", "students/x.pt", ""):
        assert location(path) == path
    for uri in ("s3://bucket/a", "hf://org/name/sub/file.pt"):
        assert location(uri) == uri
    assert meaning("org/name") == "org/name is on the hub, as hf://org/name"
    assert meaning("runs/mine") == f"runs/mine is a path, {tmp_path}/runs/mine"
    assert meaning("s3://bucket/a") == "s3://bucket/a is on S3"


def test_a_repository_comes_without_files_that_nobody_reads_and_only_once(hub: SmallHub) -> None:
    hub.add("org/model", FILES)
    folder = fetch("org/model")
    assert files_of(folder) == SAFE
    assert fetch("hf://org/model") == folder and len(hub.downloads()) == len(SAFE)


def test_a_new_commit_is_fetched_and_a_revision_stays(hub: SmallHub) -> None:
    hub.add("org/model", FILES)
    hub.add("org/model", {**FILES, "README.md": b"# older"}, revision="v1")
    assert (fetch("org/model@v1") / "README.md").read_bytes() == b"# older"
    assert (fetch("org/model") / "README.md").read_bytes() == b"# a card"
    hub.add("org/model", {**FILES, "README.md": b"# newer"})
    assert (fetch("org/model") / "README.md").read_bytes() == b"# newer"
    assert (fetch("org/model@v1") / "README.md").read_bytes() == b"# older"


def test_a_folder_or_a_file_inside_is_named_by_its_uri(hub: SmallHub) -> None:
    hub.add("org/model", FILES)
    assert files_of(fetch("hf://org/model/transformer")).keys() == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    assert fetch_file("hf://org/model@main/checkpoints/student.pt").read_bytes() == b"a student"
    hub.add("datasets/org/prompts", {"train.txt": b"a cat"})
    assert fetch_file("hf://datasets/org/prompts/train.txt").read_bytes() == b"a cat"


def test_a_folder_of_the_hub_is_read_without_a_download_and_never_written(hub: SmallHub) -> None:
    hub.add("org/model", FILES)
    folder = Folder("hf://org/model")
    assert folder.children() == ["README.md", "checkpoints", "examples", "model_index.json", "transformer"]
    assert folder.files() == {name: len(data) for name, data in sorted(FILES.items())}
    assert (folder / "transformer").read_json("config.json") == {"num_layers": 3}
    assert folder.has("README.md") and not folder.has("absent") and (folder / "transformer").exists()
    with (folder / "transformer").open("diffusion_pytorch_model.safetensors") as file:
        assert file.size() == 7000 and file.read(14) == b"weightsweights"
    with pytest.raises(FieldError, match=r"hf://org/model/absent.*a file that exists"):
        folder.read("absent")
    with pytest.raises(FieldError, match="the hub is read only"):
        folder.write("a.txt", b"a")
    with pytest.raises(FieldError, match="the hub is read only"):
        folder.check_writable()


def test_what_the_hub_has_not_is_refused_by_name(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", FILES)
    hub.add("org/secret", FILES)
    hub.private.add("org/secret")
    for name in ("org/absent", "org/secret", "org/model@absent", "hf://org/model/absent", "hf://org"):
        with pytest.raises(FieldError, match=r"hub = 'hf://org.*of a repository that exists"):
            fetch(name)
    with pytest.raises(FieldError, match="hub = .*absent.pt"):
        fetch_file("hf://org/model/absent.pt")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert files_of(fetch("org/secret")) == SAFE


def test_a_hub_that_is_gone_is_told_unless_a_copy_is_here(hub: SmallHub) -> None:
    hub.add("org/model", FILES)
    folder = fetch("org/model")
    hub.close()
    assert fetch("org/model") == folder
    with pytest.raises(StorageError, match="no answer for hf://org/other"):
        fetch("org/other")


def test_a_release_is_pushed_with_its_card_and_opens_from_there(
    hub: SmallHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    source = embedded("release")
    command = ["push", str(source), "me/mine", "--base-model", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]
    assert cli.main([*command, "--licence", "apache-2.0"]) == 0
    assert capsys.readouterr().out.startswith(f"{hub.url}/me/mine/commit/")
    release = Release.load("me/mine")
    card = (release.folder / "README.md").read_text()
    for line in ("license: apache-2.0", "base_model: Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "pipeline_tag: text-to-video"):
        assert line in card.splitlines()
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (release.folder / weights).read_bytes() == (source / weights).read_bytes()
    assert release.name == Release.load(str(source)).name
    hub.repos["me/mine"]["main"][weights] += b"x"
    with pytest.raises(ReleaseError, match="differs from its sha256"):
        Release.load("me/mine")
    for wrong in ("mine", "me/mine@v1", "datasets/me/mine"):
        assert cli.main(["push", str(source), wrong, "--licence", "mit"]) == 2


@pytest.mark.slow
def test_the_environment_leads_to_a_hub_and_offline_mode_reads_the_cache_alone(hub: SmallHub, tmp_path: Path) -> None:
    hub.add("org/model", FILES)
    program = "import sys; from diagonal.storage.fetch import fetch; from diagonal.storage import Folder\n"
    program += "print(fetch(sys.argv[1])); print(len(Folder('hf://' + sys.argv[1]).files()))"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": "platform"}

    def run(name: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, name]
        return subprocess.run(command, env={**environment, **more}, capture_output=True, text=True, timeout=120)

    first = run("org/model")
    assert first.returncode == 0, first.stderr
    assert files_of(Path(first.stdout.split()[0])) == SAFE
    asked = len(hub.asked)
    offline = run("org/model", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert offline.stdout.split() == [first.stdout.split()[0], str(len(SAFE))] and len(hub.asked) == asked
    assert "no answer for hf://org/other" in run("org/other", HF_HUB_OFFLINE="1").stderr
