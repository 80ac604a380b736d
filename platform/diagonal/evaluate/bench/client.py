"""A viewer in a process of its own: asks for a stream over a loopback socket, notes when each fragment is there.

    python -m diagonal.evaluate.bench.client PORT

Neither torch nor a decoder: it parses MP4 boxes, counts frames and prints one line of JSON. Its clock is the machine's.
"""

from __future__ import annotations

import json
import socket
import sys
import time

GO = b"go\n"
_TIMEOUT_S = 600.0


def watch(port: int) -> dict[str, object]:
    """When it asked, when the first media byte came, when each fragment was whole, and the frames in all."""
    with socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT_S) as stream:
        asked_s = time.monotonic()
        stream.sendall(GO)
        data, first_media_s, arrived_s, frames = bytearray(), None, list[float](), 0
        while part := stream.recv(1 << 16):
            now_s = time.monotonic()
            data += part
            if first_media_s is None and b"moof" in data:
                first_media_s = now_s
            for name, box in whole_boxes(data):
                if name == "moof":
                    frames += samples(box)
                elif name == "mdat":
                    arrived_s.append(now_s)
    return {"asked_s": asked_s, "first_media_s": first_media_s, "arrived_s": arrived_s, "frames": frames}


def whole_boxes(data: bytearray) -> list[tuple[str, bytes]]:
    """Name and body of each MP4 box that is complete; they are taken out of `data`."""
    found = []
    while len(data) >= 8 and len(data) >= (size := int.from_bytes(data[:4], "big")) >= 8:
        found.append((data[4:8].decode("latin-1"), bytes(data[8:size])))
        del data[:size]
    return found


def samples(moof: bytes) -> int:
    """Frames of a fragment: the sample count of its track run (ISO/IEC 14496-12 8.8.8)."""
    start = moof.index(b"trun") + 8  # behind name, version and flags
    return int.from_bytes(moof[start : start + 4], "big")


if __name__ == "__main__":
    print(json.dumps(watch(int(sys.argv[1]))))
