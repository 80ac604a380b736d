"""Training of the embedded base model from nothing: linear codec, frozen text encoder, flow-matching teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from diagonal.config import Config
from diagonal.data.embedded import EmbeddedWorld, embedded_world
from diagonal.diffusion.flow import blend
from diagonal.diffusion.noise import Salt, generator, mixed_seed
from diagonal.errors import require
from diagonal.model.architecture import constructor_settings
from diagonal.model.dit import CausalWan
from diagonal.model.text import TextEncoder
from diagonal.model.vae import LinearCodec

Report = Callable[[int, Mapping[str, float]], None]
CLIPS_PER_DRAW, CLIPS_PER_ENCODING = 256, 32


def build_tokenizer(world: EmbeddedWorld) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the world's captions; case is folded and unknown words become one token."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *sorted(world.words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def build_text_encoder(config: Config, vocabulary: int) -> UMT5EncoderModel:
    """A small umT5 encoder of random, frozen weights drawn from the seed."""
    width = config.network.text_dim
    layout = UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mixed_seed(config.seed, Salt.TEXT))
        return UMT5EncoderModel(layout).eval().requires_grad_(False)


def build_teacher(config: Config) -> CausalWan:
    """An untrained Wan network of the embedded size; its output layer starts at zero.

    It trains through our forward without a mask, which is diffusers' own function (a test) at half its CPU time.
    """
    network = config.network
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mixed_seed(config.seed, Salt.TEACHER))
        teacher = CausalWan(
            num_attention_heads=network.heads,
            attention_head_dim=network.head_dim,
            num_layers=network.layers,
            ffn_dim=network.ffn_dim,
            freq_dim=network.frequency_dim,
            text_dim=network.text_dim,
            in_channels=config.geometry.latent_channels,
            out_channels=config.geometry.latent_channels,
        )
    nn.init.zeros_(teacher.proj_out.weight)
    nn.init.zeros_(teacher.proj_out.bias)
    return teacher


def fit_codec(config: Config) -> LinearCodec:
    """The linear codec of the world's training clips."""
    seed = mixed_seed(config.seed, Salt.CODEC) % 2**31
    _, clips = embedded_world(config).sample(seed, config.pretrain.codec_clips)
    return LinearCodec.fit(torch.from_numpy(clips), config.geometry.latent_channels, config.pretrain.motion_channels)


@dataclass(frozen=True)
class Corpus:
    """Encoded training clips `[n, c, f, h, w]`, the caption of each, and the embeddings of all captions."""

    latents: Tensor
    caption_ids: Tensor
    embeddings: Tensor
    empty: Tensor


def build_corpus(config: Config, codec: LinearCodec, text: TextEncoder) -> Corpus:
    """Render and encode the training clips, a draw at a time; they stay in memory as latents."""
    world, count = embedded_world(config), config.pretrain.clips
    captions: list[str] = []
    latents = torch.empty(config.geometry.clip_shape(count))
    while len(captions) < count:
        seed = mixed_seed(config.seed, Salt.CLIPS, len(captions)) % 2**31
        drawn, clips = world.sample(seed, min(CLIPS_PER_DRAW, count - len(captions)))
        for part in torch.from_numpy(clips).split(CLIPS_PER_ENCODING):
            latents[len(captions) : len(captions) + len(part)] = codec.encode(part)
            captions, drawn = captions + drawn[: len(part)], drawn[len(part) :]
    known = {caption: place for place, caption in enumerate(dict.fromkeys(captions))}
    ids = torch.tensor([known[caption] for caption in captions])
    embeddings = torch.cat([text.encode(some) for some in batched(known, CLIPS_PER_DRAW)])
    return Corpus(latents, ids, embeddings, text.encode([""])[0])


def batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of up to that many items, in order."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


class TeacherTraining:
    """Flow matching with dropped captions: the network, its optimizers, its averaged weights and the draws so far."""

    def __init__(self, config: Config, corpus: Corpus) -> None:
        settings = config.pretrain
        self.update = 0
        self.teacher = build_teacher(config)
        self.average = {name: parameter.detach().clone() for name, parameter in self.teacher.named_parameters()}
        self._config, self._corpus, self._draw = config, corpus, generator(config.seed, Salt.PRETRAIN)
        self._optimizers = _optimizers(self.teacher, settings.lr)
        self._schedulers = [torch.optim.lr_scheduler.LambdaLR(o, _rate(settings.updates)) for o in self._optimizers]

    def advance(self) -> float:
        """One update; returns its loss."""
        self.update += 1
        loss = _flow_matching_loss(self.teacher, self._config, self._corpus, self._draw)
        loss.backward()
        nn.utils.clip_grad_norm_(self.teacher.parameters(), 1.0)
        for optimizer, scheduler in zip(self._optimizers, self._schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        decay = min(self._config.pretrain.ema_decay, self.update / (self.update + 10))
        for name, parameter in self.teacher.named_parameters():
            self.average[name].lerp_(parameter.detach(), 1.0 - decay)
        return float(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next update but configuration and corpus, which follow from the seed."""
        return {
            "update": self.update,
            "planned": self._config.pretrain.updates,
            "teacher": self.teacher.state_dict(),
            "average": self.average,
            "optimizers": [one.state_dict() for one in self._optimizers],
            "schedulers": [one.state_dict() for one in self._schedulers],
            "draw": self._draw.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of the same configuration: what follows is the same as without a break.

        Another number of updates is taken as long as the learning rate falls in neither plan yet, else `FieldError`.
        """
        planned, updates = state["planned"], self._config.pretrain.updates
        require(
            updates == planned or 2 * state["update"] <= min(planned, updates),
            "pretrain.updates",
            updates,
            f"{planned}, as planned, or at least {2 * state['update']} where the rate does not fall yet",
        )
        self.update = state["update"]
        self.teacher.load_state_dict(state["teacher"])
        self.average = dict(state["average"])
        for part in ("optimizers", "schedulers"):
            for one, saved in zip(getattr(self, f"_{part}"), state[part], strict=True):
                one.load_state_dict(saved)
        self._draw.set_state(state["draw"])


def train_teacher(
    config: Config, training: TeacherTraining, report: Report, after: Callable[[TeacherTraining], None] | None = None
) -> dict[str, Tensor]:
    """Train to the last update; returns the averaged weights. `report(update, figures)`, then `after`, every update."""
    while training.update < config.pretrain.updates:
        loss = training.advance()
        report(training.update, {"loss": loss})
        if after:
            after(training)
    return training.average


def _flow_matching_loss(teacher: CausalWan, config: Config, corpus: Corpus, draw: torch.Generator) -> Tensor:
    settings, batch = config.pretrain, config.pretrain.batch_size
    index = torch.randint(len(corpus.latents), (batch,), generator=draw)
    clean = corpus.latents[index]
    text = corpus.embeddings[corpus.caption_ids[index]]
    dropped = torch.rand(batch, generator=draw) < settings.caption_drop
    text = torch.where(dropped[:, None, None], corpus.empty, text)
    uniform = (torch.arange(batch) + torch.rand(batch, generator=draw)) / batch
    level = settings.level_shift * uniform / (1 + (settings.level_shift - 1) * uniform)
    noise = torch.randn(clean.shape, generator=draw)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = teacher(blend(clean, noise, level), level[:, None].expand(-1, clean.shape[2]), text)
    return (velocity - (noise - clean)).square().mean()


def _optimizers(teacher: CausalWan, lr: float) -> Sequence[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest (docs/log.md has the comparison)."""
    matrices = [p for p in teacher.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in teacher.parameters() if id(p) not in chosen]
    return (
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    )


def _rate(updates: int) -> Callable[[int], float]:
    """Warm-up over 2 %, constant, then a linear fall over the last half."""
    warmup, fall = max(1, updates // 50), max(1, updates // 2)
    return lambda update: min(1.0, (update + 1) / warmup, max(0.02, (updates - update) / fall))


def as_wan(state: Mapping[str, Tensor], network: CausalWan) -> WanTransformer3DModel:
    """The same weights as diffusers' own class, for saving."""
    wan = WanTransformer3DModel(**constructor_settings(WanTransformer3DModel, network.config))
    wan.load_state_dict(dict(state), strict=True)
    return wan
