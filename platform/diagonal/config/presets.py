"""The presets: the paper's model, and two that are trained from nothing on a laptop, as the settings that make them."""

from __future__ import annotations

from diagonal.config import Config

_TINY = """
    geometry.latent_height=4 geometry.latent_width=4
    model.text_tokens=12 model.negative_prompt= model.compute_dtype=float32
    pairs.count=1536 pairs.solver_steps=20 pairs.guidance=1.5 pairs.batch_size=32 pairs.rows_per_shard=64
    ode_init.updates=2000 ode_init.batch_size=16 ode_init.micro_batch_size=16 ode_init.lr=7e-4
    distill.stage1_updates=150 distill.stage2_updates=150 distill.batch_size=16 distill.micro_batch_size=16
    distill.guidance=1.5 distill.ema_start=20 distill.checkpoint_every=50 distill.lr=2e-4 distill.critic_lr=4e-4
    decoder.widths=[64,48,24] decoder.blocks=[1,1,1] decoder.clips=192 decoder.crop_latents=0 decoder.frames=6
    decoder.updates=1500 decoder.batch_size=4 decoder.lr=2e-3 decoder.checkpoint_every=100
    train.workers=2 train.gpus_per_worker=0 train.checkpoint_activations=false
    serve.pixel_scale=8
"""
# The textured world at 48x48: nine tokens a latent frame, and channels for what its textures need. Its codec is the
# linear one itself: a network in its place would only learn the same latents. docs/log.md has the figures behind these:
# - pairs.guidance: at 1.5 the teacher draws fewer shapes, and paler.
# - pairs.kept_raw, ode_init.states: what this recipe and Self Forcing visit, so that both begin from one student.
# - schedule: rows that end at raw 250 instead of the paper's 100, a clean sink, and a clean newest frame of each chunk:
#   18 forwards a clip to Self Forcing's 35.
# - distill: so few updates need a critic that keeps up and an average that remembers some thirty of the generator's.
_TEXTURED = """
    geometry.latent_channels=24 geometry.latent_height=6 geometry.latent_width=6 model.text_tokens=16
    pretrain.world=textured pretrain.clips=8192 pretrain.updates=14000 pretrain.codec_updates=0
    pretrain.motion_channels=8 pretrain.text_updates=400 pretrain.score_every=1000
    pairs.count=4096 pairs.guidance=3 pairs.kept_raw=[1000,750,500,250,0]
    ode_init.updates=4000 ode_init.sink_positions=window ode_init.states=even ode_init.ema_decay=0.999
    schedule.steps=3222222@250 schedule.sink_context=0.0 schedule.clean_newest=true distill.stage1_steps=4@250
    distill.guidance=3 distill.lr=4e-4 distill.critic_lr=1e-3 distill.ema_decay=0.95
    distill.critic_warmup_updates=20 distill.stage1_updates=300 distill.stage2_updates=300 distill.loss.gamma=0.25
    serve.pixel_scale=6
"""
_SETTINGS = {
    "tiny": _TINY,
    "tiny-textured": _TINY + _TEXTURED,
    "wan-1.3b": "ode_init.sink_positions=window distill.critic_warmup_updates=20 train.workers=8 "
    "serve.compile=true serve.overlap_decode=true serve.attention=auto",
}
PRESETS = {name: Config().with_settings([f"preset={name}", *text.split()]) for name, text in _SETTINGS.items()}
