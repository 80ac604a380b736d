"""HTTP Live Streaming (RFC 8216, fragmented MP4) over the chunks that the store keeps: the playlist's text."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor

MEDIA_TYPE = "application/vnd.apple.mpegurl"
READER = "hls"  # all players of a video are one reader to the store: they ask the gateways by turns
AHEAD = 2  # a player may wait for a chunk at most so far behind the newest one
HOLD_BACK_TARGETS = 3  # the least that the specification allows


def target_s(longest_frames: int, fps: int) -> int:
    """Whole seconds that no chunk lasts longer than."""
    return ceil(longest_frames / fps)


def playlist(frames: Sequence[int], fps: int, target: int, first: int = 0, *, ended: bool, endless: bool) -> str:
    """The playlist of chunks `first` on, of so many pixel frames each.

    Of a video of a given length it grows (EVENT) until it ends; of a stream without an end it is a window that slides.
    """
    lines = ["#EXTM3U", "#EXT-X-VERSION:7", f"#EXT-X-TARGETDURATION:{target}", "#EXT-X-INDEPENDENT-SEGMENTS"]
    lines.append(f"#EXT-X-SERVER-CONTROL:CAN-BLOCK-RELOAD=YES,HOLD-BACK={HOLD_BACK_TARGETS * target:.1f}")
    lines.append(f"#EXT-X-MEDIA-SEQUENCE:{first}")
    if not endless:
        lines.append(f"#EXT-X-PLAYLIST-TYPE:{'VOD' if ended else 'EVENT'}")
    lines.append('#EXT-X-MAP:URI="init.mp4"')
    for chunk, count in enumerate(frames, first):
        lines += [f"#EXTINF:{floor(count / fps * 1e5) / 1e5:.5f},", f"chunks/{chunk}.m4s"]
    return "\n".join([*lines, *(["#EXT-X-ENDLIST"] if ended else []), ""])
