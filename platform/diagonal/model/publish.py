"""A release on the hub: its own files, with a card that says licence, base model and kind, in one commit."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from huggingface_hub import ModelCard

from diagonal.errors import FieldError
from diagonal.model.manifest import MANIFEST, ReleaseError
from diagonal.model.model_card import CARD
from diagonal.model.release import Release
from diagonal.storage.hub import Place, upload
from diagonal.storage.remote import HUB, StorageError, location


def push(options: argparse.Namespace) -> None:
    """`diagonal push RELEASE org/name`: check the release, upload it, print where it is; `FieldError` when refused."""
    try:
        print(push_release(options.release, options.name, options.licence, options.base_model))
    except (ReleaseError, StorageError) as error:
        raise FieldError("push", options.release, f"a whole release, and a hub that answers ({error})") from error


def push_release(release: str, name: str, licence: str, base_model: str = "") -> str:
    """Upload a release as the model repository `name` (org/name); returns the URL of the commit.

    The card gets `license` and `base_model` (the one that the release's configuration names on the hub, where none is
    given), and the manifest the card's new hash. Errors are those of `Release.load` and of the hub.
    """
    found = Release.load(release)
    place = Place.of(f"{HUB}{name}")
    if place.path or place.revision or place.kind != "model":
        raise FieldError("push", name, "org/name of a model repository")
    card = ModelCard((found.folder / CARD).read_text()) if CARD in found.manifest["files"] else ModelCard("---\n---\n")
    base = base_model or _on_hub(found.config.model.path)
    about = {"license": licence, "pipeline_tag": "text-to-video", **({"base_model": base} if base else {})}
    for field, value in about.items():
        card.data[field] = value
    text = str(card).encode()
    said = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    manifest = {**found.manifest, "files": {**found.manifest["files"], CARD: said}}
    files: dict[str, Path | bytes] = {each: found.folder / each for each in found.manifest["files"]}
    files |= {CARD: text, MANIFEST: json.dumps(manifest, indent=2, ensure_ascii=False, sort_keys=True).encode()}
    return upload(files, place.repo)


def _on_hub(path: str) -> str:
    """The repository that a configuration's base model is, if it is one."""
    uri = location(path)
    return Place.of(uri).repo if uri.startswith(HUB) else ""
