"""What tests of files on disk share: reading, editing and uploading a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from diagonal.jsonfile import write_json
from diagonal.model.stored_weights import empty_network, weights_name

SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")  # umT5's order: the unknown token is not the third
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


def write_tokenizer(folder: Path, **config: object) -> Path:
    """A tokenizer.json of umT5's kind: Unigram with byte fallback, its unknown token fourth."""
    words = ["▁a", "▁red", "▁circle", "▁moves", "▁left", "▁right", "▁the", "▁", *"abcdefghilmnorstuvwxyz<>&,.'\""]
    pieces = [(token, 0.0) for token in SPECIAL]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [(word, -2.0 - 0.1 * index) for index, word in enumerate(words)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "pad_token": "<pad>", **config})
    return folder
