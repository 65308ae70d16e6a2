# SPDX-License-Identifier: Apache-2.0
"""Model architectures: one file each, over what every decoder shares (``decoder.py``)."""

from __future__ import annotations

from adaptive_k_moe.engine_builder.checkpoint import HfConfig
from adaptive_k_moe.engine_builder.models.decoder import Decoder
from adaptive_k_moe.engine_builder.models.mixtral import Mixtral
from adaptive_k_moe.engine_builder.models.nemotron_h import NemotronH
from adaptive_k_moe.engine_builder.models.olmoe import Olmoe
from adaptive_k_moe.engine_builder.models.qwen2_moe import Qwen2Moe
from adaptive_k_moe.engine_builder.models.qwen3_moe import Qwen3Moe
from adaptive_k_moe.errors import CheckpointError

ARCHITECTURES: dict[str, type[Decoder]] = {
    "MixtralForCausalLM": Mixtral,
    "NemotronHForCausalLM": NemotronH,
    "OlmoeForCausalLM": Olmoe,
    "Qwen2MoeForCausalLM": Qwen2Moe,
    "Qwen3MoeForCausalLM": Qwen3Moe,
}

__all__ = ["ARCHITECTURES", "Decoder", "architecture_of"]


def architecture_of(config: HfConfig) -> type[Decoder]:
    """The model class for a checkpoint.

    Raises:
        CheckpointError: the architecture is not one that the builder knows.
    """
    try:
        return ARCHITECTURES[config.architecture]
    except KeyError:
        raise CheckpointError(
            f"architecture {config.architecture!r} is not supported; these are: {', '.join(ARCHITECTURES)}."
        ) from None
