"""The sessions of one device by id, and what becomes of them at a chunk boundary."""

from __future__ import annotations

import threading
from dataclasses import replace

from diagonal.engine.chunk_maker import ChunkMaker
from diagonal.engine.session import Session, SessionState


class SessionTable:
    """Whoever reads or changes a session has `lock`, but for the engine's own thread while it makes a chunk of it."""

    def __init__(self) -> None:
        self.sessions: dict[str, Session] = {}
        self.closing: set[str] = set()
        self.lock = threading.Lock()

    def __getitem__(self, session_id: str) -> Session:
        return self.sessions[session_id]

    @property
    def live(self) -> list[Session]:
        return [session for session in self.sessions.values() if session.live]

    @property
    def playing(self) -> list[Session]:
        return [session for session in self.sessions.values() if session.playing]

    def is_closing(self, session: Session) -> bool:
        return session.spec.session_id in self.closing

    def close(self, session_id: str) -> None:
        """Have it freed at the next chunk boundary; unknown ids are ignored."""
        with self.lock:
            if session_id in self.sessions:
                self.closing.add(session_id)

    def settle(self, maker: ChunkMaker, now_s: float) -> bool:
        """Free what was closed, and leave of paused sessions their snapshots; whether anything was done."""
        with self.lock:
            closed, paused = self._take_closed(), self._pause(maker, now_s)
        for session in closed:
            session.cache.close()
            if not session.ended:
                session.move(SessionState.CANCELLED)
        for session in paused:
            maker.evict(session)
            assert session.saved is not None
            session.saved = replace(session.saved, ahead_s=session.ahead_s)
        return bool(closed or paused)

    def _take_closed(self) -> list[Session]:
        if not self.closing:
            return []
        in_flight = {name for name in self.closing if name in self.sessions and self.sessions[name].progress.in_flight}
        gone, self.closing = self.closing - in_flight, in_flight
        return [self.sessions.pop(name) for name in gone if name in self.sessions]

    def _pause(self, maker: ChunkMaker, now_s: float) -> list[Session]:
        pausing = [s for s in self.sessions.values() if s.pausing and not s.ended and not s.progress.in_flight]
        for session in pausing:
            session.pausing = False
            begun = session.playback.zero_s is not None
            session.ahead_s = session.slack_s(maker.config.geometry, now_s) if begun else None
            session.move(SessionState.PAUSED)
            session.log("pause")
        return pausing
