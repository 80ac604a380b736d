"""The rate that a client receives: engine, encoder and a loopback socket, with a reader in another process."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diagonal
from diagonal.engine.engine import Engine
from diagonal.engine.session import ChunkResult, SessionSpec
from diagonal.evaluate.bench.client import GO
from diagonal.evaluate.bench.rates import PROMPT, percentiles
from diagonal.media.encode import ChunkEncoder

Row = dict[str, Any]
_TIMEOUT_S = 300.0
_AHEAD = 2  # chunks that wait for the encoder at most


def received_row(engine: Engine, pixel_frames: int, scale: int, rounds: int = 3) -> Row:
    """A stream of so many frames, as fast as it is made, the best of the rounds after the first."""
    found = [_one_stream(engine, f"client-{number}", pixel_frames, scale) for number in range(rounds)]
    best = min(found[1:] or found, key=lambda row: row["seconds"])
    return {**best, "rounds": rounds, "ttff_each_s": [row["ttff_s"] for row in found]}


def _one_stream(engine: Engine, session_id: str, pixel_frames: int, scale: int) -> Row:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(_TIMEOUT_S)
        client = subprocess.Popen(
            [sys.executable, "-m", "diagonal.evaluate.bench.client", str(server.getsockname()[1])],
            stdout=subprocess.PIPE,
            cwd=Path(diagonal.__file__).parents[1],
        )
        try:
            connection, _ = server.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if connection.recv(len(GO)) != GO:
                    raise RuntimeError("the client asked for nothing")
                serve_stream(engine, session_id, pixel_frames, scale, connection)
            told, _ = client.communicate(timeout=_TIMEOUT_S)
        finally:
            client.kill()
            client.wait(_TIMEOUT_S)
    return read_out(json.loads(told), pixel_frames)


def serve_stream(engine: Engine, session_id: str, pixel_frames: int, scale: int, connection: socket.socket) -> None:
    """Open a session and send its init segment and fragments; they are encoded beside the engine, as in service."""
    geometry = engine.geometry
    engine.open(SessionSpec(session_id, PROMPT, 1, pixel_frames, paced=False))
    encoder = ChunkEncoder(geometry.pixel_height, geometry.pixel_width, geometry.pixel_fps, scale=scale)

    def send(result: ChunkResult) -> None:
        connection.sendall(encoder.encode_chunk(result.pixels.numpy()))

    connection.sendall(encoder.init_segment())
    waiting: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="encode") as beside:
        engine.request(session_id, geometry.chunks_for(pixel_frames) - 1)
        last = False
        while not last:
            for result in engine.step():
                if result.error is not None:
                    raise RuntimeError(result.error)
                last = result.last
                waiting.append(beside.submit(send, result))
            while len(waiting) > _AHEAD:
                waiting.popleft().result(_TIMEOUT_S)
        for sent in waiting:
            sent.result(_TIMEOUT_S)
    engine.close(session_id)
    engine.step()


def read_out(told: dict[str, Any], pixel_frames: int) -> Row:
    """A row of what the client noted; `RuntimeError` when frames are missing."""
    if told["frames"] != pixel_frames:
        raise RuntimeError(f"the client got {told['frames']} frames of {pixel_frames}")
    arrived = told["arrived_s"]
    seconds = arrived[-1] - told["asked_s"]
    between = [late - early for early, late in zip(arrived, arrived[1:], strict=False)]
    return {
        "what": "received by a client",
        "pixel_frames": pixel_frames,
        "seconds": seconds,
        "fps": pixel_frames / seconds,
        "ttff_s": told["first_media_s"] - told["asked_s"],
        **percentiles(between),
    }
