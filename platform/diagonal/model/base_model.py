"""Base models and students on disk, in diffusers' layout: checked as they are loaded, written whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, UMT5EncoderModel

import diagonal
from diagonal.config import Config
from diagonal.errors import require
from diagonal.files import file_hash
from diagonal.jsonfile import read_json, write_json
from diagonal.model.architecture import constructor_settings
from diagonal.model.dit import CausalWan
from diagonal.model.fast_decoder import FastDecoder
from diagonal.model.stored_weights import CODECS, refuse_differences, stored_shapes, stored_variant
from diagonal.model.stored_weights import CONFIG as CONFIG
from diagonal.model.taehv import TaehvDecoder
from diagonal.model.text import TextEncoder, load_tokenizer
from diagonal.model.vae import Decoder, LinearCodec, decoder_of
from diagonal.storage import Folder
from diagonal.storage.fetch import NO_PROGRAMS, fetch
from diagonal.storage.remote import location

LINEAGE, SHA256 = "lineage.json", "sha256"  # the latter: hashes of a student's weights, in its lineage
FAST_DECODER = "decoder"  # of a release that has one
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")  # of a base model
BASE_FILES = tuple(f"{part}/{kind}" for part in PARTS for kind in NO_PROGRAMS)


def embedded(name: str, model: str = "tiny") -> Path:
    """A folder of an embedded model: `base`, `ode_init`, `release`."""
    return Path(diagonal.__file__).parent / "assets" / model / name


def lineage_name(folder: Path) -> str:
    """How lineage names a folder: by its parent and itself (`tiny/base`, `RUN/stage1`), on whatever machine it lies."""
    return f"{folder.absolute().parent.name}/{folder.name}"


def base_uri(config: Config) -> str:
    """Folder, s3:// or hf:// URI of the base model that a configuration names; an empty path is the embedded one."""
    return location(config.model.path) or str(embedded("base", config.embedded_model))


def base_folder(config: Config) -> Path:
    """A local folder of the base model that a configuration names; raises as `fetch` does."""
    return fetch(base_uri(config), patterns=BASE_FILES)


def part_folder(folder: Path, name: str) -> Path:
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


def _load_whole(kind: type[Any], path: Path, dtype: torch.dtype) -> Any:
    """A model whose weights and config agree: the libraries alone would draw a missing layer at random."""
    stored_shapes(Folder(str(path)))
    network, report = kind.from_pretrained(
        path,
        use_safetensors=True,
        variant=stored_variant(Folder(str(path))),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # the report names them
        **{"dtype" if issubclass(kind, PreTrainedModel) else "torch_dtype": dtype},
    )
    refuse_differences(report, path.name, str(path))
    return network


def check_transformer(folder: Path, config: Config) -> None:
    """Refuse a network in `folder/transformer` that does not fit the geometry or the text encoder beside it.

    Reads the configurations alone, so that a job can ask before it starts a worker.
    """
    layout, geometry = read_json(part_folder(folder, "transformer") / CONFIG), config.geometry
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
    return TextEncoder(*load_text_parts(folder, dtype), config.model.text_tokens)


def load_text_parts(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedTokenizerBase, UMT5EncoderModel]:
    """Tokenizer and umT5 encoder from `folder`, as the libraries' own; not trainable."""
    encoder: UMT5EncoderModel = _load_whole(UMT5EncoderModel, part_folder(folder, "text_encoder"), dtype)
    return load_tokenizer(part_folder(folder, "tokenizer")), encoder.requires_grad_(False)


def load_codec(folder: Path, config: Config, dtype: torch.dtype = torch.float32) -> AutoencoderKLWan | LinearCodec:
    """The codec in `folder/vae`, by the class its config names, checked against the geometry."""
    path = part_folder(folder, "vae")
    name = read_json(path / CONFIG).get("_class_name")
    require(name in CODECS, "vae._class_name", name, f"one of {sorted(CODECS)}")
    codec: AutoencoderKLWan | LinearCodec = _load_whole(CODECS[name], path, dtype)
    check_codec(codec, config)
    return codec.eval().requires_grad_(False)


def check_codec(codec: AutoencoderKLWan | LinearCodec, config: Config) -> None:
    """`FieldError` unless a codec's channels and strides are the geometry's."""
    for field, value in _codec_layout(codec).items():
        wanted = getattr(config.geometry, field)
        require(value == wanted, f"vae {field}", value, f"geometry.{field} = {wanted}")


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


def load_fast_decoder(folder: Path, config: Config, dtype: torch.dtype = torch.float32) -> FastDecoder | TaehvDecoder:
    """The fast decoder in `folder/decoder`, checked against the geometry; `FieldError` when there is none."""
    path = folder / FAST_DECODER
    require(
        (path / CONFIG).is_file(),
        "serve.decoder",
        "fast",
        f"full: {folder} has no {FAST_DECODER}/, which jobs/distill_decoder.py or import_student.py --decoder makes",
    )
    kind = TaehvDecoder if read_json(path / CONFIG).get("_class_name") == "TaehvDecoder" else FastDecoder
    network: FastDecoder | TaehvDecoder = _load_whole(kind, path, dtype)
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
        network = WanTransformer3DModel(**constructor_settings(WanTransformer3DModel, layout))
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
    files = {str(path.relative_to(folder)): file_hash(path) for path in sorted((folder / "transformer").iterdir())}
    write_json(folder / LINEAGE, {**lineage, SHA256: files})


def check_student(folder: Path) -> None:
    """`FieldError` names a file of a student that is not as it was written, by the hashes in its lineage, if any."""
    lineage = read_json(folder / LINEAGE) if (folder / LINEAGE).is_file() else {}
    for name, expected in lineage.get(SHA256, {}).items():
        whole = (folder / name).is_file() and file_hash(folder / name) == expected
        require(
            whole,
            "student",
            str(folder / name),
            f"the file whose sha256 stands in {LINEAGE}; delete the folder and resume, and its stage writes it again",
        )


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
