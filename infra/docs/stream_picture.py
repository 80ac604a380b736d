"""The moving picture of the front page: one stream of the embedded model, whose prompt changes while it plays.

python -m infra.docs.stream_picture docs/images/stream.gif
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diagonal.engine.engine import Engine
from diagonal.engine.session import SessionSpec
from diagonal.engine.specs import PromptChange
from diagonal.model.release import Release

PROMPTS = ("a red circle moving right quickly", "a blue square moving up slowly", "a yellow circle moving left quickly")
CHUNKS_A_PROMPT = 6
SEED = 5
SIDE, STRIP = 224, 24  # pixels of the picture, and of the caption below it
EVERY = 2  # of the pixel frames one is shown: 8 a second


def stream(release: Release) -> Iterator[tuple[str, np.ndarray]]:
    """Each pixel frame `[h, w, 3]` with the prompt in force; a change is sent while the chunk before it is made."""
    engine = Engine(release, clock=lambda: 0.0)
    geometry, chunks = release.config.geometry, CHUNKS_A_PROMPT * len(PROMPTS)
    frames = geometry.pixel_start(chunks)
    engine.open(SessionSpec("stream", PROMPTS[0], SEED, frames))
    for chunk in range(chunks):
        number, first = divmod(chunk, CHUNKS_A_PROMPT)
        if number and not first:
            engine.interact("stream", PromptChange(str(number), PROMPTS[number]))
        engine.request("stream")
        (result,) = engine.step()
        yield from ((PROMPTS[number], frame) for frame in result.pixels.numpy())


def drawn(caption: str, frame: np.ndarray) -> Image.Image:
    """The frame enlarged, its prompt below."""
    picture = Image.new("RGB", (SIDE, SIDE + STRIP), "white")
    picture.paste(Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BICUBIC), (0, 0))
    ImageDraw.Draw(picture).text((6, SIDE + 4), caption, fill="black", font=ImageFont.load_default(size=13))
    return picture.quantize(48, dither=Image.Dither.NONE)


def main(path: str) -> None:
    release = Release.load()
    pictures = [drawn(*one) for one in list(stream(release))[::EVERY]]
    duration_ms = round(1000 * EVERY / release.config.geometry.pixel_fps)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=duration_ms, loop=0, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
