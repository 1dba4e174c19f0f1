"""Conversion of GPT-OSS weights to and from Hugging Face checkpoints in 16 or 32 bits."""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint import HuggingFaceStorageReader
from torchtitan.models.gpt_oss import GptOssModel
from torchtitan.models.gpt_oss import state_dict_adapter as upstream

from titan_moe_lb.errors import JobError

_HF_EXPERTS = "model.layers.{}.mlp.experts."
_EXPERTS = "layers.{}.moe.routed_experts.inner_experts."
_EXPERT_NAMES = {
    "gate_up_proj": "mlp1_weight_EGD",
    "gate_up_proj_bias": "mlp1_bias_EG",
    "down_proj": "mlp2_weight_EDF",
    "down_proj_bias": "mlp2_bias_ED",
}
_WEIGHTS = (".experts.gate_up_proj", ".experts.down_proj")


class GptOssStateDictAdapter(upstream.GptOssStateDictAdapter):
    """Adapter that converts the expert weights too, which torchtitan 0.3.0's adapter loses.

    Upstream fact: torchtitan's adapter uses the expert names of an older module, such as
    ``mlp1_weight`` for ``mlp1_weight_EGD``. So ``to_hf`` drops the experts, and ``from_hf`` makes
    names that no module has. It also assumes the MXFP4 layout, in which the last two axes are in
    torchtitan's order. An unquantized checkpoint has them transposed: ``gate_up_proj``
    ``(E, D, 2F)`` and ``down_proj`` ``(E, F, D)``. Gate and up columns alternate in both layouts.
    """

    def __init__(self, model_config: GptOssModel.Config, hf_assets_path: str | None) -> None:
        super().__init__(model_config, hf_assets_path)
        names: dict[str, str] = self.from_hf_map
        for name in [name for name in names if name.startswith(_HF_EXPERTS)]:
            del names[name]
        names.update({_HF_EXPERTS + name: _EXPERTS + own for name, own in _EXPERT_NAMES.items()})

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Convert to Hugging Face, with transposed expert weights."""
        return _expert_weights_transposed(super().to_hf(state_dict))

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """Convert from Hugging Face, with transposed expert weights."""
        return super().from_hf(_expert_weights_transposed(hf_state_dict))

    def get_hf_storage_reader(
        self, path: str, from_quantized: bool = False
    ) -> HuggingFaceStorageReader:
        """Return a reader of an unquantized checkpoint."""
        if from_quantized:
            raise JobError(
                "checkpoint.initial_load_in_hf_quantized: an MXFP4 checkpoint of gpt_oss cannot be "
                "loaded; write it out in bfloat16 first (transformers: from_pretrained(..., "
                "quantization_config=Mxfp4Config(dequantize=True)).save_pretrained(FOLDER))"
            )
        return super().get_hf_storage_reader(path)


def _expert_weights_transposed(hf_state_dict: dict[str, Any]) -> dict[str, Any]:
    # safetensors stores contiguous tensors only.
    return {
        name: value.transpose(-2, -1).contiguous() if name.endswith(_WEIGHTS) else value
        for name, value in hf_state_dict.items()
    }
