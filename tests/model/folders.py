"""What tests of files on disk share: reading, editing and uploading a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def upload(client: Any, folder: Path, prefix: str) -> None:
    for name, data in files_of(folder).items():
        client.put_object(Bucket="models", Key=f"{prefix}/{name}", Body=data)
