"""Training of the embedded base model from nothing: linear codec, frozen text encoder, flow-matching teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from diagonal.config import Config
from diagonal.data.world import all_scenes, sample_clips, training_scenes, world_of
from diagonal.diffusion.flow import blend
from diagonal.diffusion.noise import generator, mixed_seed
from diagonal.model.dit import CausalWan
from diagonal.model.text import TextEncoder
from diagonal.model.vae import LinearCodec

Report = Callable[[int, Mapping[str, float]], None]
CLIPS_PER_DRAW = 256


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the world's captions; case is folded and unknown words become one token."""
    words = sorted({word for scene in all_scenes() for word in scene.caption.split()})
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def build_text_encoder(config: Config, vocabulary: int) -> UMT5EncoderModel:
    """A small umT5 encoder of random, frozen weights drawn from the seed."""
    width = config.network.text_dim
    layout = UMT5Config(
        vocab_size=vocabulary, d_model=width, d_kv=width // 4, d_ff=2 * width, num_layers=2, num_heads=4,
        dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mixed_seed(config.seed, "text"))
        return UMT5EncoderModel(layout).eval().requires_grad_(False)


def build_teacher(config: Config) -> CausalWan:
    """An untrained Wan network of the embedded size; its output layer starts at zero.

    It trains through our forward without a mask, which is diffusers' own function (a test) at half its CPU time.
    """
    network = config.network
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mixed_seed(config.seed, "teacher"))
        teacher = CausalWan(
            num_attention_heads=network.heads, attention_head_dim=network.head_dim, num_layers=network.layers,
            ffn_dim=network.ffn_dim, freq_dim=network.frequency_dim, text_dim=network.text_dim,
            in_channels=config.geometry.latent_channels, out_channels=config.geometry.latent_channels,
        )
    nn.init.zeros_(teacher.proj_out.weight)
    nn.init.zeros_(teacher.proj_out.bias)
    return teacher


def fit_codec(config: Config) -> LinearCodec:
    """The linear codec of the world's training clips."""
    seed = mixed_seed(config.seed, "codec") % 2**31
    _, clips = sample_clips(seed, config.pretrain.codec_clips, world_of(config), training_scenes())
    return LinearCodec.fit(torch.from_numpy(clips), config.geometry.latent_channels)


@dataclass(frozen=True)
class Corpus:
    """Encoded training clips `[n, c, f, h, w]`, the caption of each, and the embeddings of all captions."""

    latents: Tensor
    caption_ids: Tensor
    embeddings: Tensor
    empty: Tensor


def build_corpus(config: Config, codec: LinearCodec, text: TextEncoder) -> Corpus:
    """Render and encode the training clips, a draw at a time."""
    captions: list[str] = []
    latents: list[Tensor] = []
    while len(captions) < config.pretrain.clips:
        seed = mixed_seed(config.seed, "clips", len(captions)) % 2**31
        count = min(CLIPS_PER_DRAW, config.pretrain.clips - len(captions))
        drawn, clips = sample_clips(seed, count, world_of(config), training_scenes())
        captions += drawn
        latents.append(codec.encode(torch.from_numpy(clips)))
    known = [scene.caption for scene in all_scenes()]
    ids = torch.tensor([known.index(caption) for caption in captions])
    return Corpus(torch.cat(latents), ids, text.encode(known), text.encode([""])[0])


def train_teacher(config: Config, corpus: Corpus, report: Report) -> dict[str, Tensor]:
    """Flow matching with dropped captions; returns the averaged weights. `report(update, figures)` every update."""
    settings = config.pretrain
    teacher, draw = build_teacher(config), generator(config.seed, "pretrain")
    optimizers = _optimizers(teacher, settings.lr)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, _rate(settings.updates)) for o in optimizers]
    average = {name: parameter.detach().clone() for name, parameter in teacher.named_parameters()}
    for update in range(1, settings.updates + 1):
        loss = _flow_matching_loss(teacher, config, corpus, draw)
        loss.backward()
        nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        decay = min(settings.ema_decay, update / (update + 10))
        for name, parameter in teacher.named_parameters():
            average[name].lerp_(parameter.detach(), 1.0 - decay)
        report(update, {"loss": float(loss.detach())})
    return average


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
    layout = {key: value for key, value in network.config.items() if not key.startswith("_")}
    wan = WanTransformer3DModel(**layout)
    wan.load_state_dict(dict(state), strict=True)
    return wan
