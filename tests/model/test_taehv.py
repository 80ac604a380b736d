"""TAEHV's decoder under its published names: its frames, streamed as whole, and a release that is served by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from diagonal.errors import FieldError
from diagonal.jsonfile import write_json
from diagonal.model.base_model import load_fast_decoder
from diagonal.model.fast_decoder import StreamingFastDecoder
from diagonal.model.taehv import TaehvDecoder, write_taehv
from tests.networks import draw, small_config

CHANNELS = 16
CONFIG = small_config(f"geometry.latent_channels={CHANNELS}")


def published(seed: int = 0) -> dict[str, Tensor]:
    """A file's tensors, with the names and shapes of taew2_1: written out apart from the code under test."""
    shapes: dict[str, tuple[int, ...]] = {"1.weight": (256, CHANNELS, 3, 3), "1.bias": (256,)}
    for start, width, narrower, steps in ((3, 256, 128, 1), (9, 128, 64, 2), (15, 64, 64, 2)):
        for block in range(start, start + 3):
            for conv, inner in ((0, 2 * width), (2, width), (4, width)):
                shapes[f"{block}.conv.{conv}.weight"] = (width, inner, 3, 3)
                shapes[f"{block}.conv.{conv}.bias"] = (width,)
        shapes[f"{start + 4}.conv.weight"] = (steps * width, width, 1, 1)
        shapes[f"{start + 5}.weight"] = (narrower, width, 3, 3)
    shapes |= {"22.weight": (3, 64, 3, 3), "22.bias": (3,)}
    values = {name: draw(*shape, seed=seed + number) for number, (name, shape) in enumerate(shapes.items())}
    scaled = {name: value / max(value[0].numel(), 1) ** 0.5 for name, value in values.items()}
    return {f"decoder.{name}": value for name, value in scaled.items()} | {"encoder.0.weight": torch.zeros(64, 3, 3, 3)}


def reference(weights: dict[str, Tensor], latents: Tensor) -> Tensor:
    """A whole clip `[c, f, h, w]` to `[4f-3, 3, 8h, 8w]` in [0, 1], layer by layer over all of its steps."""

    def conv(x: Tensor, name: str, padding: int = 1) -> Tensor:
        return F.conv2d(x, weights[f"decoder.{name}.weight"], weights.get(f"decoder.{name}.bias"), padding=padding)

    x = F.relu(conv(torch.tanh(latents.transpose(0, 1) / 3) * 3, "1"))
    for start, steps in ((3, 1), (9, 2), (15, 2)):
        for block in range(start, start + 3):
            past = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
            inner = F.relu(conv(torch.cat((x, past), dim=1), f"{block}.conv.0"))
            x = F.relu(conv(F.relu(conv(inner, f"{block}.conv.2")), f"{block}.conv.4") + x)
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        grown = conv(x, f"{start + 4}.conv", padding=0)
        x = conv(grown.reshape(len(x) * steps, -1, *x.shape[2:]), f"{start + 5}")
    return conv(F.relu(x), "22").clamp(0, 1)[3:]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save(published(), tmp_path / "taew2_1.pth")
    return tmp_path / "taew2_1.pth"


@pytest.fixture
def network(file: Path, tmp_path: Path) -> TaehvDecoder:
    write_taehv(file, tmp_path / "decoder")
    found = load_fast_decoder(tmp_path, CONFIG)
    assert isinstance(found, TaehvDecoder)
    return found


def test_a_published_file_gives_its_frames_whole_and_chunk_by_chunk(network: TaehvDecoder) -> None:
    latents = draw(1, CHANNELS, 6, 2, 3, seed=1)
    expected = (reference(published(), latents[0]) * 255).round()
    assert expected.shape == (21, 3, 16, 24) and expected.std() > 5
    decoder = StreamingFastDecoder(network)
    whole = decoder.decode_clip(latents)
    state = decoder.start()
    chunks = [decoder.decode(part, state) for part in latents.split(3, dim=2)]
    assert [part.shape[1] for part in chunks] == [9, 12] and torch.equal(torch.cat(chunks, dim=1), whole)
    assert (whole[0].permute(0, 3, 1, 2).float() - expected).abs().max() <= 1


def test_a_safetensors_file_is_the_same(tmp_path: Path, network: TaehvDecoder) -> None:
    save_file(published(), tmp_path / "taew2_1.safetensors")
    write_taehv(tmp_path / "taew2_1.safetensors", tmp_path / "other")
    other = TaehvDecoder.from_pretrained(tmp_path / "other").state_dict()
    assert all(torch.equal(value, other[name]) for name, value in network.state_dict().items())


def test_another_model_of_the_family_is_refused_by_a_tensors_name(tmp_path: Path) -> None:
    weights = published()
    weights["decoder.1.weight"] = torch.zeros(256, 48, 3, 3)
    torch.save(weights, tmp_path / "taew2_2.pth")
    with pytest.raises(FieldError, match=r"decoder tensors = \['decoder.1.weight'\]: allowed is those of taew2_1"):
        write_taehv(tmp_path / "taew2_2.pth", tmp_path / "decoder")
    assert not (tmp_path / "decoder").exists()


def test_a_geometry_of_other_channels_is_refused(network: TaehvDecoder, tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="latent_channels"):
        load_fast_decoder(tmp_path, small_config())
    write_json(tmp_path / "decoder" / "config.json", {"_class_name": "TaehvDecoder", "latent_channels": 8})
    with pytest.raises(FieldError, match="mismatched_keys"):
        load_fast_decoder(tmp_path, CONFIG)
