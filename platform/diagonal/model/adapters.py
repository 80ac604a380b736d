"""LoRA adapters of others, by the loaders of diffusers and peft, merged into a student's weights."""

from __future__ import annotations

from pathlib import Path

from diffusers import WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin

from diagonal.errors import FieldError
from diagonal.model.import_checkpoints import lora_of, merge_lora

FIELD = "model.adapters"


def merge_adapter(network: WanTransformer3DModel, file: Path) -> None:
    """Add a LoRA's product to the weights, at its own scale; nothing of the adapter is left beside them.

    With peft's adapter_config.json beside it, it has that scale. `FieldError` when the file is no LoRA, or another
    network's.
    """
    if (file.parent / "adapter_config.json").is_file():
        return merge_lora(network.state_dict(), lora_of(file), file)
    try:
        found = WanLoraLoaderMixin.lora_state_dict(str(file.parent), weight_name=file.name, return_lora_metadata=True)
        state, metadata = found
        network.load_lora_adapter(state, prefix="transformer", metadata=metadata)
        if not getattr(network, "peft_config", None):
            raise ValueError("it adapts no layer of a Wan transformer")
        network.fuse_lora()
        network.unload_lora()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise FieldError(FIELD, str(file), f"a LoRA that fits this network ({reason})") from error
