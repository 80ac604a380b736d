"""The fast decoder: a release's own decoder, distilled on what its student generates, in one process; resumable.

Writes `decoder/` of the run, then `release-fast/`: the release once more, with the fast decoder in it. What serves by
default there is `serve.decoder` of the run.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from runs.start import start

    start(__file__, __doc__)

import io
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from diagonal.errors import require
from diagonal.evaluate.quality.serving_options import psnr_db
from diagonal.jsonfile import write_json
from diagonal.model.base_model import FAST_DECODER, LINEAGE
from diagonal.model.fast_decoder import FastDecoder, StreamingFastDecoder, frame_flops
from diagonal.model.manifest import MANIFEST
from diagonal.model.release import Release, write_release_with_decoder
from diagonal.storage import Folder
from diagonal.training.fast_decoder import DecodedClips, DecoderTraining, decoded_clips, train_fast_decoder
from jobs.runs import arguments
from jobs.runs.artefacts import local_copy
from jobs.runs.console import Progress
from jobs.runs.prompts import training_prompts
from jobs.runs.run import Run, opened, say

CHECKPOINT = "train/decoder/state.pt"
FAST_RELEASE = "release-fast"
UNSEEN_CLIPS = 24


def source_of(run: Run, given: str | None) -> Release:
    """The release whose decoder is distilled: the one given, else the run's own, else the embedded one."""
    if given:
        return Release.load(given)
    if run.has_release:
        return Release.load(local_copy(run, "release", MANIFEST))
    require(run.config.preset == "tiny", "--release", None, "a release: the run has none of its own")
    return Release.load()


def distil_decoder(run: Run, release: Release) -> Folder:
    """Train the fast decoder unless the run has it, and write the release with it; returns that release's folder."""
    if not (run.folder / FAST_DECODER).has(LINEAGE):
        _train(run, release)
    if not run.folder.has(f"{FAST_RELEASE}/{MANIFEST}"):
        serve = f"serve.decoder={run.config.serve.decoder}"
        with (run.folder / FAST_RELEASE).replaced(last=MANIFEST, check=run.check_lease) as folder:
            folder.rmdir()
            write_release_with_decoder(
                folder, release, local_copy(run, FAST_DECODER), release.config.with_settings([serve])
            )
    return run.folder / FAST_RELEASE


def _train(run: Run, release: Release) -> None:
    config = run.config
    device = "cuda" if torch.cuda.is_available() and config.train.gpus_per_worker else "cpu"
    known = training_prompts(run)
    prompts = [str(prompt) for _, prompt in known.take(range(min(config.decoder.clips, len(known))))]
    made = partial(
        decoded_clips,
        release.generator(device),
        release.text(device),
        release.with_settings(["serve.decoder=full"]).decoder(device),
    )
    say(f"decoder: drawing and decoding {config.decoder.clips} clips of {release.name}")
    clips = made(config, prompts)
    training = DecoderTraining.new(config, device)
    if run.folder.has(CHECKPOINT):
        training.load(torch.load(io.BytesIO(run.folder.read(CHECKPOINT)), map_location=device, weights_only=True))
        say(f"decoder: resumes after update {training.update}")
    report = Progress("decoder", config.decoder.updates)
    train_fast_decoder(config, training, clips, report, lambda: _save(run, training))
    count = min(UNSEEN_CLIPS, config.decoder.clips)
    unseen = config.with_settings([f"seed={config.seed + 1}", f"decoder.clips={count}", "decoder.crop_latents=0"])
    _write(run, release, training.network, made(unseen, prompts))


def _save(run: Run, training: DecoderTraining) -> None:
    buffer = io.BytesIO()
    torch.save(training.to_dict(), buffer)
    run.folder.write(CHECKPOINT, buffer.getvalue())


def _write(run: Run, release: Release, network: FastDecoder, unseen: DecodedClips) -> None:
    """`decoder/`: weights in bfloat16, their layout, and where they come from, with what was measured of them."""
    network = network.to(torch.bfloat16)
    with (run.folder / FAST_DECODER).replaced(last=LINEAGE, check=run.check_lease) as folder:
        network.save_pretrained(folder)
        stored = FastDecoder.from_pretrained(folder).to(network.device)
        write_json(folder / LINEAGE, lineage_of(run, release, stored, unseen))
    say(f"decoder: {run.folder / FAST_DECODER}, {run.folder.read_json(f'{FAST_DECODER}/{LINEAGE}')['psnr_db']} dB")


def lineage_of(run: Run, release: Release, network: FastDecoder, unseen: DecodedClips) -> dict[str, Any]:
    """What the decoder says of itself; its PSNR is to the full decoder's pixels of clips it has not seen."""
    shown = torch.cat([StreamingFastDecoder(network).decode_clip(clip).cpu() for clip in unseen.latents.split(1)])
    geometry, options = run.config.geometry, run.config.decoder
    return {
        "stage": FAST_DECODER,
        "parent": release.name,
        "seed": run.config.seed,
        "updates": options.updates,
        "clips": options.clips,
        "parameters": sum(part.numel() for part in network.parameters()),
        "flops_per_latent_frame": frame_flops(network, geometry.latent_height, geometry.latent_width),
        "psnr_db": round(psnr_db(shown, unseen.pixels), 2),
        "psnr_clips": len(shown),
    }


def work(argv: Sequence[str]) -> None:
    options = arguments.distill_decoder(argv, __doc__ or "")
    with opened(options) as run:
        release = source_of(run, options.release)
        say(
            f"run {run.name} in {run.folder}: the fast decoder of release {release.name}, "
            f"{run.config.decoder.updates} updates over {run.config.decoder.clips} clips"
        )
        if options.dry_run:
            say("dry run: everything checked, nothing written")
        else:
            say(f"release {distil_decoder(run, release)}")
