"""Diagonal: distil a bidirectional video diffusion model into a streaming one, and serve it.

`DiagonalPipeline` is loaded when it is asked for: it needs the extra `model`, which a client does without.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["DiagonalPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    if name != "DiagonalPipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("diagonal.pipeline").DiagonalPipeline
