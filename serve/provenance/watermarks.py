"""Which watermark each session's frames carry, as the settings say: its payload stands for the video's id."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from diagonal.errors import FieldError
from diagonal.geometry import ChunkGeometry
from diagonal.media.watermark import SpreadSpectrum, Watermark, payload_of
from serve.settings import SPREAD_SPECTRUM, ServeSettings, load_plug_in

Make = Callable[[str, int, int, int, bytes], Watermark]


class Watermarks:
    """Makes one for each session. `make(session_id, height, width, scale, key)` gives it, None where there is none."""

    def __init__(self, make: Make | None, key: bytes, geometry: ChunkGeometry) -> None:
        self._make, self._key, self._geometry = make, key, geometry

    @classmethod
    def from_settings(cls, settings: ServeSettings, geometry: ChunkGeometry) -> Watermarks:
        """`FieldError` when the key or the plug-in is not there."""
        if not settings.watermark:
            return cls(None, b"", geometry)
        try:
            key = Path(settings.watermark_key).expanduser().read_bytes()
        except OSError as error:
            raise FieldError("watermark_key", settings.watermark_key, "a file that can be read") from error
        if settings.watermark == SPREAD_SPECTRUM:
            return cls(_spread_spectrum, key, geometry)
        return cls(load_plug_in("watermark", settings.watermark), key, geometry)

    def of(self, session_id: str, scale: int) -> Watermark | None:
        """The one of a session whose pixels are shown `scale` times as large; `FieldError` when it has no room."""
        if self._make is None:
            return None
        size = (self._geometry.pixel_height, self._geometry.pixel_width)
        return self._make(session_id, *size, scale, self._key)

    def scales(self, wanted: tuple[int, ...]) -> tuple[int, ...]:
        """Those that have room for the mark: no others are offered. `FieldError` when none has."""
        fitting = []
        refused: FieldError | None = None
        for scale in wanted:
            try:
                self.of("", scale)
                fitting.append(scale)
            except FieldError as error:
                refused = error
        if refused is not None and not fitting:
            raise refused
        return tuple(fitting)


def _spread_spectrum(session_id: str, height: int, width: int, scale: int, key: bytes) -> SpreadSpectrum:
    return SpreadSpectrum(height, width, key, payload_of(session_id), scale)
