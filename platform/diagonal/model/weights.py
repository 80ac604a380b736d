"""Weights on disk: base models and students in diffusers' layout, local or s3://, and the Release that is served."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, ModelMixin, WanTransformer3DModel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

import diagonal
from diagonal.config import Config
from diagonal.errors import FieldError, require
from diagonal.jsonfile import read_json, write_json
from diagonal.model.dit import CausalWan
from diagonal.model.fast_decoder import FastDecoder, StreamingFastDecoder
from diagonal.model.fp8 import use_fp8_linears
from diagonal.model.manifest import FORMAT_VERSION, check_files, check_promoted, read_manifest
from diagonal.model.manifest import MANIFEST as MANIFEST
from diagonal.model.manifest import ReleaseError as ReleaseError
from diagonal.model.manifest import file_hash as file_hash
from diagonal.model.model_card import CARD, statement_of, write_card
from diagonal.model.text import TextEncoder
from diagonal.model.vae import Decoder, LinearCodec, decoder_of, laid_out
from diagonal.storage import Folder

Model = TypeVar("Model", bound=ModelMixin)

CONFIG, LINEAGE = "config.json", "lineage.json"
SHARED_FOLDERS = ("vae", "text_encoder", "tokenizer", "scheduler")
FAST_DECODER = "decoder"  # of a release that has one


def embedded(name: str, model: str = "tiny") -> Path:
    """A folder of an embedded model: `base`, `ode_init`, `release`; of `textured` also `stage1`."""
    return Path(diagonal.__file__).parent / "assets" / model / name


def lineage_name(folder: Path) -> str:
    """How lineage names a folder: by its parent and itself (`tiny/base`, `RUN/stage1`), on whatever machine it lies."""
    return f"{folder.absolute().parent.name}/{folder.name}"


def base_uri(config: Config) -> str:
    """Folder or s3:// URI of the base model that a configuration names; an empty path is the embedded one."""
    return config.model.path or str(embedded("base", config.embedded_model))


def base_folder(config: Config) -> Path:
    """A local folder of the base model that a configuration names; raises as `fetch` does."""
    return fetch(base_uri(config))


def fetch(uri: str, cache: str | os.PathLike[str] | None = None) -> Path:
    """A local folder with the files of `uri`: itself when local, else a whole copy of an s3:// folder.

    One process downloads, others wait for it; the copy stays, so what lies under one URI must not change. `FieldError`
    when there is no such folder, `StorageError` when the storage does not answer.
    """
    source = Folder(uri)
    if source.is_local:
        require(source.path.is_dir(), "path", uri, "an existing folder or an s3:// URI")
        return Path(uri)
    root = Path(cache or os.environ.get("DIAGONAL_CACHE") or Path.home() / ".cache" / "diagonal")
    root.mkdir(parents=True, exist_ok=True)
    target = root / hashlib.sha256(source.uri.encode()).hexdigest()[:16]
    with (root / f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            files = source.files()
            require(bool(files), "path", uri, "an s3:// folder that exists")
            with Folder(str(target)).replaced(last=min(files)) as folder:
                for name in files:
                    source.get(name, folder / name)
    return target


def _part(folder: Path, name: str) -> Path:
    require((folder / name).is_dir(), f"{name} folder", str(folder / name), "an existing folder (diffusers' layout)")
    return folder / name


def load_teacher(folder: Path, config: Config, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    """diffusers' own network from `folder/transformer`, checked against the geometry; not trainable."""
    check_transformer(folder, config)
    return _load_whole(WanTransformer3DModel, folder / "transformer", dtype).eval().requires_grad_(False)


def load_causal(folder: Path, config: Config, dtype: torch.dtype = torch.float32) -> CausalWan:
    """The causal generator over the weights in `folder/transformer`, checked against the geometry."""
    check_transformer(folder, config)
    return _load_whole(CausalWan, folder / "transformer", dtype).eval()


def _load_whole(kind: type[Model], path: Path, dtype: torch.dtype = torch.float32) -> Model:
    """A diffusers model whose weights and config agree: diffusers alone would draw a missing layer at random."""
    network, found = kind.from_pretrained(path, torch_dtype=dtype, use_safetensors=True, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys"):
        keys = sorted(found[problem])
        require(not keys, f"{path.name} {problem}", keys[:3], f"none: weights and {CONFIG} of one network, in {path}")
    return network


def check_transformer(folder: Path, config: Config) -> None:
    """Refuse a network in `folder/transformer` that does not fit the geometry or the text encoder beside it.

    Reads the configurations alone, so that a job can ask before it starts a worker.
    """
    layout, geometry = read_json(_part(folder, "transformer") / CONFIG), config.geometry
    patch = [1, geometry.patch_height, geometry.patch_width]
    require(
        layout.get("in_channels") == geometry.latent_channels,
        "transformer.in_channels",
        layout.get("in_channels"),
        f"geometry.latent_channels = {geometry.latent_channels}",
    )
    require(
        layout.get("patch_size") == patch,
        "transformer.patch_size",
        layout.get("patch_size"),
        f"{patch}, as the geometry has it",
    )
    encoder = folder / "text_encoder" / CONFIG
    if encoder.is_file():
        width = read_json(encoder)["d_model"]
        require(
            layout.get("text_dim") == width,
            "transformer.text_dim",
            layout.get("text_dim"),
            f"the text encoder's d_model = {width}",
        )


def load_text(folder: Path, config: Config, dtype: torch.dtype = torch.float32) -> TextEncoder:
    """Tokenizer and umT5 encoder from `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(_part(folder, "tokenizer"))
    encoder = UMT5EncoderModel.from_pretrained(_part(folder, "text_encoder"), dtype=dtype, use_safetensors=True)
    return TextEncoder(tokenizer, encoder.requires_grad_(False), config.model.text_tokens)


def load_codec(folder: Path, config: Config, dtype: torch.dtype = torch.float32) -> AutoencoderKLWan | LinearCodec:
    """The codec in `folder/vae`, by the class its config names, checked against the geometry."""
    path = _part(folder, "vae")
    name = read_json(path / CONFIG).get("_class_name")
    known = {"AutoencoderKLWan": AutoencoderKLWan, "LinearCodec": LinearCodec}
    require(name in known, "vae._class_name", name, f"one of {sorted(known)}")
    codec: AutoencoderKLWan | LinearCodec = _load_whole(known[name], path, dtype)
    for field, value in _codec_layout(codec).items():
        wanted = getattr(config.geometry, field)
        require(value == wanted, f"vae {field}", value, f"geometry.{field} = {wanted}")
    return codec.eval().requires_grad_(False)


def _codec_layout(codec: AutoencoderKLWan | LinearCodec) -> dict[str, int]:
    """A codec's channels and strides under the geometry's names."""
    layout = codec.config
    if isinstance(codec, LinearCodec):
        return {name: layout[name] for name in ("latent_channels", "temporal_stride", "spatial_stride")}
    return {
        "latent_channels": layout.z_dim,
        "temporal_stride": layout.scale_factor_temporal,
        "spatial_stride": layout.scale_factor_spatial,
    }


def load_decoder(folder: Path, config: Config) -> Decoder:
    """The streaming decoder of the codec in `folder/vae`."""
    return decoder_of(load_codec(folder, config))


def load_fast_decoder(folder: Path, config: Config, dtype: torch.dtype = torch.float32) -> FastDecoder:
    """The fast decoder in `folder/decoder`, checked against the geometry; `FieldError` when there is none."""
    path = folder / FAST_DECODER
    require(
        (path / CONFIG).is_file(),
        "serve.decoder",
        "fast",
        f"full: {folder} has no {FAST_DECODER}/, which jobs/distill_decoder.py makes",
    )
    network: FastDecoder = _load_whole(FastDecoder, path, dtype)
    for field in ("latent_channels", "temporal_stride", "spatial_stride"):
        wanted = getattr(config.geometry, field)
        require(
            network.config[field] == wanted, f"decoder {field}", network.config[field], f"geometry.{field} = {wanted}"
        )
    return network.eval().requires_grad_(False)


def save_transformer(folder: Path, layout: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write `folder/transformer` so that diffusers' `WanTransformer3DModel.from_pretrained` loads it; not atomic.

    `layout` is the network's config. Tensors are stored as `dtype`, but for those that Wan keeps in float32.
    """
    with torch.device("meta"):  # neither memory nor random numbers for weights that are given
        network = WanTransformer3DModel(**{k: v for k, v in layout.items() if not k.startswith("_")})
    network.load_state_dict({k: v.detach().cpu() for k, v in state.items()}, assign=True)
    for parameter_name, parameter in network.named_parameters():
        if not any(kept in parameter_name for kept in network._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    network.save_pretrained(folder / "transformer")


def save_student(
    folder: Path, config: Config, layout: Mapping[str, Any], state: Mapping[str, Tensor], lineage: Mapping[str, Any]
) -> None:
    """Write a trained generator: `transformer/` in bfloat16, its config, and `lineage.json` (stage, parent, seed).

    The folder is replaced, whole or not at all.
    """
    with Folder(str(folder)).replaced(last=LINEAGE) as temporary:
        _write_student(temporary, config, layout, state, lineage)


def _write_student(
    folder: Path, config: Config, layout: Mapping[str, Any], state: Mapping[str, Tensor], lineage: Mapping[str, Any]
) -> None:
    save_transformer(folder, layout, state, torch.bfloat16)
    config.save(folder / CONFIG)
    write_json(folder / LINEAGE, dict(lineage))


def save_base(
    folder: Path,
    config: Config,
    teacher: WanTransformer3DModel,
    codec: AutoencoderKLWan | LinearCodec,
    tokenizer: PreTrainedTokenizerBase,
    encoder: UMT5EncoderModel,
    lineage: Mapping[str, Any],
) -> None:
    """Write a base model in diffusers' layout, with its config and `lineage.json` (command, seed, figures).

    The folder is replaced, whole or not at all.
    """
    with Folder(str(folder)).replaced(last=LINEAGE) as temporary:
        _write_student(temporary, config, teacher.config, teacher.state_dict(), lineage)
        if isinstance(codec, AutoencoderKLWan):
            codec = codec.to(torch.bfloat16)
        codec.save_pretrained(temporary / "vae")
        tokenizer.save_pretrained(temporary / "tokenizer")
        encoder.save_pretrained(temporary / "text_encoder")
        FlowMatchEulerDiscreteScheduler(shift=config.schedule.shift).save_pretrained(temporary / "scheduler")


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
        """Open a release (None is the embedded one), local or s3://.

        `ReleaseError` when it is not whole, not as its manifest says, or holds files that could run code.
        """
        folder = fetch(str(uri)) if uri else embedded("release")
        manifest = read_manifest(folder, str(uri or ""))
        check_files(folder, manifest["files"])
        return cls(folder, Config.load(folder / CONFIG), manifest)

    def generator(self, device: torch.device | str = "cpu") -> CausalWan:
        """The causal generator in the configured compute type, its blocks' linear layers in `serve.linear_dtype`."""
        dtype = getattr(torch, self.config.model.compute_dtype)
        network = load_causal(self.folder, self.config, dtype).to(device).requires_grad_(False)
        if self.config.serve.linear_dtype == "fp8":
            network.fuse()  # before they are 8 bits, which are joined no more
            use_fp8_linears(network, network.blocks)
        return network

    def text(self, device: torch.device | str = "cpu") -> TextEncoder:
        """The text encoder in the configured compute type."""
        return load_text(self.folder, self.config, getattr(torch, self.config.model.compute_dtype)).to(device)

    def decoder(self, device: torch.device | str = "cpu") -> Decoder:
        """The streaming decoder that `serve.decoder` names, in the configured compute type and `serve.decoder_layout`.

        `FieldError` for a fast one that the release has not.
        """
        dtype, serve = getattr(torch, self.config.model.compute_dtype), self.config.serve
        if serve.decoder == "fast":
            network = load_fast_decoder(self.folder, self.config, dtype).to(device)
            return StreamingFastDecoder(laid_out(network, serve.decoder_layout))
        return decoder_of(laid_out(load_codec(self.folder, self.config, dtype).to(device), serve.decoder_layout))

    @property
    def has_fast_decoder(self) -> bool:
        return f"{FAST_DECODER}/{CONFIG}" in self.manifest["files"]

    def with_settings(self, settings: Iterable[str]) -> Release:
        """The same release under other settings, such as `serve.decoder=fast`."""
        return replace(self, config=self.config.with_settings(settings))


def write_release(
    target: Path,
    *,
    name: str,
    student: Path,
    base: Path,
    lineage: Mapping[str, Any],
    scores: Mapping[str, Any],
    statement: str = "",
) -> Release:
    """Write a release from a student folder and its base model's codec and text; whole or not at all.

    `statement` goes into its card (`diagonal.model.model_card`). Raises `FieldError` when `target` already exists.
    """
    if target.exists():
        raise FieldError("release folder", str(target), "a folder that does not exist yet")
    with Folder(str(target)).replaced(last=MANIFEST) as temporary:
        shutil.copytree(_part(student, "transformer"), temporary / "transformer")
        for folder in SHARED_FOLDERS:
            if (base / folder).is_dir():
                shutil.copytree(base / folder, temporary / folder)
        shutil.copyfile(student / CONFIG, temporary / CONFIG)
        write_card(temporary, name, Config.load(student / CONFIG), lineage, statement)
        _write_manifest(temporary, {"name": name, "lineage": dict(lineage), "scores": dict(scores)})
    return Release.load(target)


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
        write_card(temporary, name, config, lineage, statement_of(card.read_text()) if card.is_file() else "")
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
