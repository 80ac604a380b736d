"""What tests of files on disk share: reading, editing and uploading a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diagonal.model.stored_weights import empty_network, weights_name

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write_hollow_weights(folder: Path) -> None:
    """The weights file that the config in `folder` asks for, by its header; its values are a hole in the file."""
    network = empty_network(folder.name, json.loads((folder / "config.json").read_text()))
    header: dict[str, Any] = {}
    end = 0
    for name, value in network.state_dict().items():
        start, end = end, end + 2 * value.numel()
        header[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [start, end]}
    data = json.dumps(header).encode()
    with (folder / weights_name(folder.name)).open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + end)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def upload(client: Any, folder: Path, prefix: str) -> None:
    for name, data in files_of(folder).items():
        client.put_object(Bucket="models", Key=f"{prefix}/{name}", Body=data)
