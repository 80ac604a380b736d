"""Replay: a recorded session once more, from the log that its owner was given, as a video file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from diagonal.engine.recording import Recording
from diagonal.engine.replay import replay
from diagonal.errors import FieldError, require
from diagonal.media.encode import CODECS, ChunkEncoder, write_fragments
from diagonal.model.release import Release
from jobs.runs.run import main, say


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recording", help="the file that GET /v1/videos/{id}/recording gave")
    parser.add_argument("--release", default="", help="its release, a folder or s3:// URI ('' is the embedded one)")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda")
    parser.add_argument("--codec", default="h264", choices=list(CODECS))
    parser.add_argument("--scale", type=int, default=1, help="enlarge the pixels so many times")
    parser.add_argument("--out", required=True, help="the video file, .mp4")
    return parser.parse_args(argv)


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
    options = arguments(argv)
    recording, release = read_recording(options.recording), Release.load(options.release or None)
    geometry = release.config.geometry
    size = (geometry.pixel_height, geometry.pixel_width, geometry.pixel_fps)
    encoder = ChunkEncoder(*size, codec=options.codec, scale=options.scale)
    write_fragments(options.out, segments(recording, release, encoder, options.device))
    say(json.dumps({"out": options.out, "chunks": recording.chunks, "pixel_frames": encoder.next_pixel_frame}))


if __name__ == "__main__":
    main("jobs.replay")
