"""GPT-OSS to and from Hugging Face checkpoints in 16 or 32 bits."""

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
    """Adds the expert weights, which the adapter of torchtitan 0.3.0 loses.

    Upstream fact: its expert names are those of an older module (``mlp1_weight``
    where the module has ``mlp1_weight_EGD``), so ``to_hf`` drops the experts and
    ``from_hf`` makes names that no module has. It also means the MXFP4 layout, whose
    last two axes are those of torchtitan; the weights of an unquantized checkpoint
    (``gate_up_proj`` ``(E, D, 2F)``, ``down_proj`` ``(E, F, D)``) are transposed.
    Gate and up columns alternate in both.
    """

    def __init__(self, model_config: GptOssModel.Config, hf_assets_path: str | None) -> None:
        super().__init__(model_config, hf_assets_path)
        names: dict[str, str] = self.from_hf_map
        for name in [name for name in names if name.startswith(_HF_EXPERTS)]:
            del names[name]
        names.update({_HF_EXPERTS + name: _EXPERTS + own for name, own in _EXPERT_NAMES.items()})

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return _expert_weights_transposed(super().to_hf(state_dict))

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return super().from_hf(_expert_weights_transposed(hf_state_dict))

    def get_hf_storage_reader(
        self, path: str, from_quantized: bool = False
    ) -> HuggingFaceStorageReader:
        """Raises ``JobError`` for a quantized checkpoint."""
        if from_quantized:
            raise JobError(
                "checkpoint.initial_load_in_hf_quantized: an MXFP4 checkpoint of gpt_oss cannot be "
                "loaded; write it out in bfloat16 first (transformers: from_pretrained(..., "
                "quantization_config=Mxfp4Config(dequantize=True)).save_pretrained(FOLDER))"
            )
        return super().get_hf_storage_reader(path)


def _expert_weights_transposed(hf_state_dict: dict[str, Any]) -> dict[str, Any]:
    # Contiguous, because safetensors stores nothing else.
    return {
        name: value.transpose(-2, -1).contiguous() if name.endswith(_WEIGHTS) else value
        for name, value in hf_state_dict.items()
    }
