"""The release, the only thing that is served: weights, configuration, lineage and scores, checked by hash."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler

import diagonal
from diagonal.config import Config
from diagonal.errors import FieldError, require
from diagonal.files import file_hash
from diagonal.jsonfile import read_json, write_json
from diagonal.model.adapters import merge_adapter
from diagonal.model.base_check import NETWORKS, goes_into_a_release
from diagonal.model.base_model import (
    CONFIG,
    FAST_DECODER,
    LINEAGE,
    embedded,
    load_causal,
    load_codec,
    load_fast_decoder,
    load_text,
    load_text_parts,
    part_folder,
)
from diagonal.model.dit import CausalWan
from diagonal.model.fast_decoder import FastDecoder, StreamingFastDecoder
from diagonal.model.fp8 import use_fp8_linears
from diagonal.model.manifest import FORMAT_VERSION, MANIFEST, PIPELINE, check_files, check_promoted, read_manifest
from diagonal.model.model_card import CARD, author_notes_of, write_card
from diagonal.model.pipeline_index import kept_settings, write_pipeline_index
from diagonal.model.stored_weights import check_weights
from diagonal.model.taehv import TaehvDecoder
from diagonal.model.text import TextEncoder, load_tokenizer
from diagonal.model.vae import Decoder, LinearCodec, decoder_of, laid_out
from diagonal.storage import Folder
from diagonal.storage.fetch import NO_PROGRAMS, fetch, fetch_file

SHARED_FOLDERS = ("vae", "text_encoder", "tokenizer", "scheduler")


@dataclass(frozen=True)
class Release:
    """The only thing serving loads: weights, configuration, lineage and measured quality, checked by hash."""

    folder: Path
    config: Config
    manifest: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def promoted(self) -> bool:
        """Whether somebody judged it and found it good: only what its manifest says counts."""
        return self.manifest.get("promoted") is True

    def check_promoted(self) -> None:
        """`ReleaseError`, with the reasons that its manifest gives, unless it was promoted."""
        check_promoted(self.manifest, str(self.folder))

    @classmethod
    def load(cls, uri: str | os.PathLike[str] | None = None) -> Release:
        """Open a release (None is the embedded one) by its path, s3:// or hf:// URI, or org/name on the hub.

        `ReleaseError` when it is not whole, not as its manifest says, or holds files that could run code.
        """
        folder = fetch(str(uri), patterns=(*NO_PROGRAMS, PIPELINE)) if uri else embedded("release")
        manifest = read_manifest(folder)
        check_files(folder, manifest["files"])
        return cls(folder, Config.load(folder / CONFIG), manifest)

    def generator(self, device: torch.device | str = "cpu") -> CausalWan:
        """The causal generator in the configured compute type, its blocks' linear layers in `serve.linear_dtype`, with
        `model.adapters` merged into it; `FieldError` for one that does not fit."""
        network = load_causal(self.folder, self.config, self._dtype)
        for name in self.config.model.adapters:
            merge_adapter(network, fetch_file(name))
        network = network.to(device).requires_grad_(False)
        if self.config.serve.linear_dtype == "fp8":
            network.fuse()  # before they are 8 bits, which are joined no more
            use_fp8_linears(network, network.blocks)
        return network

    def text(self, device: torch.device | str = "cpu") -> TextEncoder:
        """The text encoder in the configured compute type."""
        return load_text(self.folder, self.config, self._dtype).to(device)

    def decoder(self, device: torch.device | str = "cpu") -> Decoder:
        """The streaming decoder that `serve.decoder` names, in the configured compute type and `serve.decoder_layout`.

        `FieldError` for a fast one that the release has not.
        """
        fast = self.config.serve.decoder == "fast"
        network = self._fast_decoder() if fast else load_codec(self.folder, self.config, self._dtype)
        return decoder_for(network.to(device), self.config)

    def components(self) -> dict[str, Any]:
        """What `diagonal.pipeline.DiagonalPipeline` is made of: its networks on the CPU, and what it keeps of this."""
        tokenizer, encoder = load_text_parts(self.folder, self._dtype)
        scheduler = self.folder / "scheduler"
        return {
            "tokenizer": tokenizer,
            "text_encoder": encoder,
            "transformer": self.generator(),
            "vae": load_codec(self.folder, self.config, self._dtype),
            "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(scheduler) if scheduler.is_dir() else None,
            "decoder": self._fast_decoder() if (self.folder / FAST_DECODER).is_dir() else None,
            "diagonal": kept_settings(self.name, self.config),
        }

    @property
    def _dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.config.model.compute_dtype)
        return found

    def _fast_decoder(self) -> FastDecoder | TaehvDecoder:
        return load_fast_decoder(self.folder, self.config, self._dtype)

    def with_settings(self, settings: Iterable[str]) -> Release:
        """The same release under other settings, such as `serve.decoder=fast`."""
        return replace(self, config=self.config.with_settings(settings))


def decoder_for(network: AutoencoderKLWan | LinearCodec | FastDecoder | TaehvDecoder, config: Config) -> Decoder:
    """The streaming decoder over a network, in `serve.decoder_layout`."""
    placed = laid_out(network, config.serve.decoder_layout)
    return StreamingFastDecoder(placed) if isinstance(placed, FastDecoder | TaehvDecoder) else decoder_of(placed)


def write_release(
    target: Path,
    *,
    name: str,
    student: Path,
    base: Path,
    lineage: Mapping[str, Any],
    scores: Mapping[str, Any],
    author_notes: str = "",
) -> Release:
    """Write a release from a student folder and its base model's codec and text; whole or not at all.

    `author_notes` goes into its card (`diagonal.model.model_card`). Raises `FieldError` when `target` already exists.
    """
    if target.exists():
        raise FieldError("release folder", str(target), "a folder that does not exist yet")
    with Folder(str(target)).replaced(last=MANIFEST) as temporary:
        shutil.copytree(part_folder(student, "transformer"), temporary / "transformer")
        for folder in SHARED_FOLDERS:
            if (base / folder).is_dir():
                shutil.copytree(base / folder, temporary / folder, ignore=_stray)
        if (student / FAST_DECODER).is_dir():
            shutil.copytree(student / FAST_DECODER, temporary / FAST_DECODER)
        shutil.copyfile(student / CONFIG, temporary / CONFIG)
        write_card(temporary, name, Config.load(student / CONFIG), lineage, author_notes)
        write_pipeline_index(temporary, name, Config.load(student / CONFIG))
        check_loadable(temporary)
        _write_manifest(temporary, {"name": name, "lineage": dict(lineage), "scores": dict(scores)})
    return Release.load(target)


def check_loadable(folder: Path) -> None:
    """`FieldError` unless the weights of every network in a release's folder fill it, and its tokenizer opens."""
    for part in NETWORKS:
        check_weights(Folder(str(folder)), part)
    load_tokenizer(folder / "tokenizer")


def _stray(folder: str, names: Iterable[str]) -> set[str]:
    """Of a folder's content, the files that no release takes."""
    return {name for name in names if not (Path(folder) / name).is_dir() and not goes_into_a_release(name)}


def write_release_with_decoder(target: Path, release: Release, decoder: Path, config: Config) -> Release:
    """Write a release anew with the fast decoder in the folder `decoder`, and that configuration; whole or not at all.

    Scores are the release's own: its student and its full decoder are the same. `FieldError` when `target` exists.
    """
    require(not target.exists(), "release folder", str(target), "a folder that does not exist yet")
    with Folder(str(target)).replaced(last=MANIFEST) as temporary:
        for name in release.manifest["files"]:
            if not name.startswith(f"{FAST_DECODER}/"):
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(release.folder / name, temporary / name)
        shutil.copytree(decoder, temporary / FAST_DECODER)
        config.save(temporary / CONFIG)
        lineage = {**release.manifest["lineage"], FAST_DECODER: read_json(decoder / LINEAGE)}
        name, card = f"{release.name}-fast", release.folder / CARD
        write_card(temporary, name, config, lineage, author_notes_of(card.read_text()) if card.is_file() else "")
        write_pipeline_index(temporary, name, config)
        _write_manifest(temporary, {"name": name, "lineage": lineage, "scores": release.manifest["scores"]})
    return Release.load(target)


def _write_manifest(folder: Path, says: Mapping[str, Any]) -> None:
    """The manifest of a folder that is otherwise complete, with the hash of every file."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_json(
        folder / MANIFEST,
        {
            "format_version": FORMAT_VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "diagonal": diagonal.__version__,
            **says,
            "files": files,
        },
    )
