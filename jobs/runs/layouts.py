"""The configurations of a run's networks, as their folders have them, checked before anything is loaded."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import PreTrainedTokenizerBase, UMT5Config

from diagonal.config import Config
from diagonal.errors import FieldError, require
from diagonal.model.architecture import TransformerLayout
from diagonal.model.base_check import check_base, check_kind, stray_files
from diagonal.model.base_model import base_uri, check_transformer
from diagonal.model.import_checkpoints import check_student_file
from diagonal.model.stored_weights import check_weights
from diagonal.storage import Folder
from diagonal.storage.remote import location
from jobs.runs.run import Run

PARTS = ("transformer", "vae", "text_encoder", "tokenizer")


@dataclass(frozen=True)
class Layouts:
    """The configurations of a run's networks, as their folders have them."""

    student: Mapping[str, Any]
    teacher: Mapping[str, Any]
    text: Mapping[str, Any] | None
    codec: Mapping[str, Any] | None


class StoredBase(NamedTuple):
    """Of a base model that can be loaded: its tokenizer, and the files that no release takes."""

    tokenizer: PreTrainedTokenizerBase
    stray_files: list[str]


def read_layouts(run: Run) -> Layouts:
    """The configurations of all networks of a run, checked against its geometry and one another."""
    config = run.config
    if run.from_scratch and not run.folder.has("base/transformer/config.json"):
        network = config.network
        layout = {
            "num_layers": network.layers,
            "num_attention_heads": network.heads,
            "attention_head_dim": network.head_dim,
            "ffn_dim": network.ffn_dim,
            "text_dim": network.text_dim,
            "freq_dim": network.frequency_dim,
            "in_channels": config.geometry.latent_channels,
            "out_channels": config.geometry.latent_channels,
            "patch_size": [1, config.geometry.patch_height, config.geometry.patch_width],
        }
        return Layouts(layout, layout, None, None)
    require(
        bool(config.model.path) or config.is_embedded,
        "model.path",
        config.model.path,
        "a folder of the base model in diffusers' layout, local or s3:// (embedded presets have their own)",
    )
    base = Folder(base_uri(config), config.train.storage_patience_s)
    for part in PARTS:
        require((base / part).exists(), "model.path", str(base), f"a folder in diffusers' layout, with {part}/")
    student = _network(config, "model.path", base, base)
    given = config.distill.teacher
    teacher = _network(config, "distill.teacher", Folder(location(given)), base) if given else student
    _check_init(run, base)
    codec, text = (base.read_json(f"{part}/config.json") for part in ("vae", "text_encoder"))
    if codec.get("_class_name") == "AutoencoderKLWan":
        codec = {**_defaults(AutoencoderKLWan), **codec}
    return Layouts(student, teacher, {**UMT5Config().to_dict(), **text}, codec)


def check_stored_weights(run: Run) -> StoredBase | None:
    """`FieldError` unless all that a run reads can be loaded; reads the headers of weights alone.

    Returns what the plan tells of the base model; None where the run trains its own.
    """
    config, patience_s = run.config, run.config.train.storage_patience_s
    if run.from_scratch and not run.folder.has("base/transformer/config.json"):
        return None
    base = Folder(base_uri(config), patience_s)
    with _named("model.path"):
        tokenizer = check_base(base, config)
    for field, uri in (("distill.teacher", config.distill.teacher), ("distill.init", config.distill.init)):
        if uri and not uri.endswith(".pt"):
            with _named(field):
                check_kind(Folder(location(uri), patience_s))
                check_weights(Folder(location(uri), patience_s), "transformer")
    return StoredBase(tokenizer, stray_files(base))


@contextmanager
def _named(setting: str) -> Iterator[None]:
    """Errors of what a setting names begin with the setting."""
    try:
        yield
    except FieldError as error:
        raise FieldError(f"{setting}: {error.field}", error.value, error.allowed) from error


def _defaults(kind: type) -> dict[str, Any]:
    """What a diffusers class takes for keys that its config.json leaves out."""
    parameters = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def _network(config: Config, field: str, folder: Folder, base: Folder) -> Mapping[str, Any]:
    """The layout of the network in `folder`, checked as the job will, beside the base model's text encoder."""
    require(folder.has("transformer/config.json"), field, str(folder), "a folder that holds transformer/config.json")
    with _configurations((folder, "transformer"), (base, "text_encoder")) as local, _named(field):
        check_transformer(local, config)
    layout: Mapping[str, Any] = {**_defaults(WanTransformer3DModel), **folder.read_json("transformer/config.json")}
    TransformerLayout.of(layout)
    return layout


@contextmanager
def _configurations(*parts: tuple[Folder, str]) -> Iterator[Path]:
    """A local folder with the config.json of each part."""
    with tempfile.TemporaryDirectory(prefix="diagonal-plan-") as name:
        for source, part in parts:
            source.get(f"{part}/config.json", Path(name) / part / "config.json")
        yield Path(name)


def _check_init(run: Run, base: Folder) -> None:
    given = location(run.config.distill.init)
    if given.endswith(".pt"):
        file = Folder(given)
        require(file.parent.has(file.name), "distill.init", given, "a .pt file that exists")
        if file.is_local:  # another is opened when it was fetched
            with _configurations((base, "transformer"), (base, "text_encoder")) as folder:
                check_student_file(file.path, folder, run.config)
    elif given:
        _network(run.config, "distill.init", Folder(given), base)
