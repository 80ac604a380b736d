"""A release as a diffusers pipeline: prompts to frames by the engine, in this process, without Ray or a server."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, Self
from uuid import uuid4

import numpy as np
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils.pil_utils import numpy_to_pil
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from diagonal.config import Config
from diagonal.engine.chunk_maker import SessionError
from diagonal.engine.engine import Engine
from diagonal.engine.specs import MAX_SEED, PromptChange, SessionSpec
from diagonal.errors import require
from diagonal.model.architecture import constructor_settings
from diagonal.model.dit import CausalWan
from diagonal.model.fast_decoder import FastDecoder
from diagonal.model.release import Release, decoder_for
from diagonal.model.taehv import TaehvDecoder
from diagonal.model.text import TextEncoder
from diagonal.model.vae import Decoder, LinearCodec

OutputType = Literal["np", "pil", "pt", "latent"]
OUTPUT_TYPES = ("np", "pil", "pt", "latent")
Generator = torch.Generator | int | None


@dataclass(frozen=True)
class _Parts:
    """A pipeline's networks as an engine asks for them; they are on their device already."""

    config: Config
    network: CausalWan
    encoder: TextEncoder
    codec: Decoder
    name: str
    manifest: Mapping[str, Any] = field(default_factory=lambda: {"files": {}})

    def generator(self, device: torch.device | str = "cpu") -> CausalWan:
        return self.network

    def text(self, device: torch.device | str = "cpu") -> TextEncoder:
        return self.encoder

    def decoder(self, device: torch.device | str = "cpu") -> Decoder:
        return self.codec


class DiagonalPipeline(DiffusionPipeline, WanLoraLoaderMixin):
    """Text to video by a release's student, chunk by chunk, as any pipeline of diffusers is called.

    One video is made at a time: a new call or stream ends the one before. `diagonal` holds the release's name and the
    settings that decide its frames.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["scheduler", "decoder"]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: UMT5EncoderModel,
        transformer: WanTransformer3DModel,
        vae: AutoencoderKLWan | LinearCodec,
        scheduler: FlowMatchEulerDiscreteScheduler | None = None,
        decoder: FastDecoder | TaehvDecoder | None = None,
        diagonal: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        require(diagonal is not None, "model_index.json", "diagonal", "a release's settings: load one")
        assert diagonal is not None
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            transformer=causal(transformer),
            vae=vae,
            scheduler=scheduler,
            decoder=decoder,
        )
        self.register_to_config(diagonal=dict(diagonal))
        self._engine: Engine | None = None
        self._current = ""

    @classmethod
    def from_pretrained(
        cls,
        release: str | os.PathLike[str] | None = None,
        *,
        torch_dtype: torch.dtype | None = None,
        settings: Iterable[str] = (),
    ) -> Self:
        """The pipeline of a release (None is the embedded one), wherever `Release.load` reads it from.

        `torch_dtype` is that of the release where it is None; `settings` are as `serve.decoder=fast`. Raises as
        `Release.load`, `FieldError` for a type that is neither float32 nor bfloat16.
        """
        loaded = Release.load(release).with_settings(settings)
        if torch_dtype is not None:
            loaded = loaded.with_settings([f"model.compute_dtype={_name_of(torch_dtype)}"])
        return cls(**loaded.components())

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As diffusers' own; the video that is being made ends."""
        self._forget_engine()
        return super().to(*args, **kwargs)

    def load_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers' own: files of diffusers, of peft, and under Wan's own or kohya's names.

        The video that is being made ends, with the other calls on adapters too. `FieldError` for 8-bit layers.
        """
        layer = self.transformer.blocks[0].ffn.net[2]
        full = isinstance(layer, torch.nn.Linear | BaseTunerLayer)
        require(full, "adapter", type(layer).__name__, "a pipeline whose weights are not 8-bit (serve.linear_dtype)")
        self._forget_engine()
        self.transformer.unfuse()
        super().load_lora_weights(*args, **kwargs)

    def set_adapters(self, *args: Any, **kwargs: Any) -> None:
        self._forget_engine()
        super().set_adapters(*args, **kwargs)

    def unload_lora_weights(self) -> None:
        self._forget_engine()
        super().unload_lora_weights()

    def fuse_lora(self, components: Sequence[str] = ("transformer",), **kwargs: Any) -> None:
        self._forget_engine()
        super().fuse_lora(list(components), **kwargs)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_frames: int | None = None,
        generator: Generator | Sequence[Generator] = None,
        output_type: OutputType = "np",
        return_dict: bool = True,
        callback_on_chunk: Callable[[Self, int, Any], None] | None = None,
    ) -> Any:
        """Videos of one prompt or several, one after the other: a `WanPipelineOutput` whose `.frames` holds one entry a
        prompt, or a tuple of those frames without `return_dict`.

        `num_frames` are pixel frames (None is the release's clip). A generator stands for its seed alone, so that equal
        seeds give the frames that the service gives; None draws one. Entries are "np": `[f, h, w, 3]` in [0, 1], "pt":
        `[f, 3, h, w]`, "pil": a list of images, "latent": `[c, f, h, w]`, whole chunks. `callback_on_chunk(pipe, chunk,
        frames)` gets each chunk in the same form. `FieldError` on a wrong argument, `SessionError` when a chunk fails.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        given = list(generator) if isinstance(generator, Sequence) else [generator] * len(prompts)
        require(len(given) == len(prompts), "generator", len(given), f"one, or one for each of {len(prompts)} prompts")
        frames = num_frames or self.settings.geometry.clip_pixel_frames
        chunks = self.settings.geometry.chunks_for(frames)
        videos = []
        with self.progress_bar(total=chunks * len(prompts)) as bar:
            for one, seed in zip(prompts, given, strict=True):
                parts = []
                for number, part in enumerate(self.stream(one, frames, generator=seed, output_type=output_type)):
                    parts.append(part)
                    bar.update()
                    if callback_on_chunk is not None:
                        callback_on_chunk(self, number, part)
                videos.append(_joined(parts, output_type))
        self.maybe_free_model_hooks()
        shown = _stacked(videos, output_type)
        return WanPipelineOutput(frames=shown) if return_dict else (shown,)

    def stream(
        self, prompt: str, num_frames: int | None = None, *, generator: Generator = None, output_type: OutputType = "np"
    ) -> Iterator[Any]:
        """The chunks of one video as they are made, in the forms of `__call__`; `num_frames` None is an endless one.

        `change_prompt` steers it. Raises as `__call__`; a wrong argument at once.
        """
        require(output_type in OUTPUT_TYPES, "output_type", output_type, f"one of {OUTPUT_TYPES}")
        spec = SessionSpec(uuid4().hex, prompt, _seed(generator), num_frames, paced=False)
        engine = self._ready_engine()
        engine.close(self._current)
        while engine.table.sessions:  # its last chunk may be under way
            engine.step()
        engine.open(spec)
        self._current = spec.session_id
        return self._chunks(engine, spec.session_id, output_type)

    def change_prompt(self, prompt: str, transition_chunks: int = 0) -> None:
        """Steer the video that is being made from its next chunk on, at once or over so many chunks.

        `FieldError` when none is being made, or on a wrong argument.
        """
        require(self._engine is not None and self._current != "", "stream", None, "a stream that is being made")
        assert self._engine is not None
        self._engine.interact(self._current, PromptChange(uuid4().hex, prompt, transition_chunks))

    @property
    def settings(self) -> Config:
        """The release's settings, in the number format that the network has."""
        config = Config.from_dict(self.config.diagonal["config"])
        return config.with_settings(
            [f"model.compute_dtype={_name_of(self.transformer.patch_embedding.weight.dtype)}", "serve.max_sessions=1"]
        )

    def _ready_engine(self) -> Engine:
        if self._engine is None:
            config = self.settings
            parts = _Parts(
                config,
                self.transformer.requires_grad_(False),
                TextEncoder(self.tokenizer, self.text_encoder, config.model.text_tokens),
                decoder_for(self.decoder if config.serve.decoder == "fast" else self.vae, config),
                str(self.config.diagonal["name"]),
            )
            self._engine = Engine(parts, device=self.device)
        return self._engine

    def _forget_engine(self) -> None:
        """Let go of the engine: what its network is made of is about to change."""
        self._engine, self._current = None, ""

    def _chunks(self, engine: Engine, session_id: str, output_type: OutputType) -> Iterator[Any]:
        """Ask for chunk after chunk of a session; it ends with the last one, or when nobody wants the next."""
        try:
            for number in count():
                require(self._current == session_id, "stream", number, "one that no later video ended")
                engine.request(session_id, number)
                while not (results := engine.step()):
                    pass  # it is decoded beside the next one's forwards
                (result,) = results
                if result.error is not None:
                    raise SessionError(result.code or "", f"chunk {number}: {result.error}")
                latents = engine.latents(session_id)[:, -self.settings.geometry.chunk_frames :]
                yield latents if output_type == "latent" else shown_as(result.pixels, output_type)
                if result.last:
                    return
        finally:
            engine.close(session_id)
            if self._current == session_id:
                self._current = ""


def causal(network: WanTransformer3DModel) -> CausalWan:
    """The causal network over the weights of diffusers' own, which are not copied."""
    if isinstance(network, CausalWan):
        return network
    with torch.device("meta"):
        student = CausalWan(**constructor_settings(CausalWan, network.config))
    student.load_state_dict(network.state_dict(), assign=True)
    student.rope = network.rope
    return student.eval()


def shown_as(pixels: Tensor, output_type: OutputType) -> Any:
    """Pixels `[f, h, w, 3]` uint8 in one of diffusers' forms of a video."""
    if output_type == "pt":
        return pixels.permute(0, 3, 1, 2).float() / 255.0
    shown = pixels.float().numpy() / 255.0
    return numpy_to_pil(shown) if output_type == "pil" else shown


def _stacked(videos: Sequence[Any], output_type: OutputType) -> Any:
    """The videos of a call as diffusers gives them: one array or tensor, or a list of lists of images."""
    if output_type == "pil":
        return list(videos)
    return np.stack(videos) if output_type == "np" else torch.stack(list(videos))


def _joined(chunks: Sequence[Any], output_type: OutputType) -> Any:
    """A video's chunks as one."""
    if output_type == "pil":
        return [image for chunk in chunks for image in chunk]
    if output_type == "np":
        return np.concatenate(chunks)
    return torch.cat(list(chunks), dim=1 if output_type == "latent" else 0)


def _seed(generator: Generator) -> int:
    """The seed that a generator was made with."""
    if generator is None:
        return secrets.randbelow(MAX_SEED + 1)
    return generator if isinstance(generator, int) else generator.initial_seed() % (MAX_SEED + 1)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
