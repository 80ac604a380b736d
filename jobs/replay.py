"""Replay: a recorded session once more, from the log that its owner was given, as a video file."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from runs.start import start

    start(__file__, __doc__)

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from diagonal.engine.recording import Recording
from diagonal.engine.replay import replay
from diagonal.errors import FieldError, require
from diagonal.media.encode import ChunkEncoder, write_fragments
from diagonal.model.release import Release
from jobs.runs import arguments
from jobs.runs.run import say


def read_recording(path: str) -> Recording:
    """What the service gave; `FieldError` when there is no such file, `SnapshotError` when it is none."""
    file = Path(path)
    require(file.is_file(), "recording", path, "a file")
    try:
        return Recording.from_json(file.read_text())
    except UnicodeDecodeError as error:
        raise FieldError("recording", path, "a file of JSON text") from error


def segments(recording: Recording, release: Release, encoder: ChunkEncoder, device: str) -> Iterator[bytes]:
    """The initialisation segment, then each chunk of the session, its last one cut to the length that was asked for."""
    yield encoder.init_segment()
    for one in replay(release, recording, device):
        yield encoder.encode_chunk(one.pixels.numpy())
        say(f"chunk {one.chunk + 1} of {recording.chunks}")


def work(argv: Sequence[str]) -> None:
    options = arguments.replay(argv, __doc__ or "")
    recording, release = read_recording(options.recording), Release.load(options.release or None)
    geometry = release.config.geometry
    size = (geometry.pixel_height, geometry.pixel_width, geometry.pixel_fps)
    encoder = ChunkEncoder(*size, codec=options.codec, scale=options.scale)
    write_fragments(options.out, segments(recording, release, encoder, options.device))
    say(json.dumps({"out": options.out, "chunks": recording.chunks, "pixel_frames": encoder.next_pixel_frame}))
