# SPDX-License-Identifier: Apache-2.0
"""A checkpoint opened by `transformers`, and its router logits by forward hooks on its gates.

`output_router_logits` is not offered by every family; a gate's input and weight are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.errors import DependencyError, DeviceError


def open_model(checkpoint_dir: str | Path, device: str = "cpu") -> Any:
    """A checkpoint as a model of `transformers`.

    Args:
        checkpoint_dir: Hugging Face checkpoint.
        device: "cpu", where it computes in float32, or "cuda", where it does in the checkpoint's own type.

    Raises:
        DependencyError: torch or transformers is not installed.
        DeviceError: torch finds no GPU.
        CalibrationError: `transformers` cannot open it.
    """
    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"opening a checkpoint needs the package {error.name!r}: "
            "install it with pip install 'adaptive-k-moe[training]'."
        ) from None
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("torch finds no GPU for --device cuda: install a torch with CUDA, or give --device cpu.")
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(checkpoint_dir), dtype=torch.float32 if device == "cpu" else "auto"
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CalibrationError(f"transformers cannot open {checkpoint_dir}: {reason}") from None
    return model.eval().to(device)


class HookedModel:
    """A checkpoint whose routers are listened to.

    Args:
        checkpoint_dir: Hugging Face checkpoint.
        device: as for `open_model`.

    Raises:
        CalibrationError: it has no router that is known here; and what `open_model` raises.
    """

    def __init__(self, checkpoint_dir: str | Path, device: str = "cpu") -> None:
        self.model: Any = open_model(checkpoint_dir, device)
        from adaptive_k_moe.torch.adapt import moe_blocks

        self.gates = [block.gate for block in moe_blocks(self.model)]
        if not self.gates:
            raise CalibrationError(
                f"{checkpoint_dir} has no router that is known here (a module layers.N.*.gate with one row an expert)."
            )

    @property
    def num_experts(self) -> int:
        """Experts in a MoE layer."""
        return int(self.gates[0].weight.shape[0])

    def router_logits(
        self, tokens: npt.NDArray[np.int64], *, progress: Callable[[int], None] | None = None
    ) -> npt.NDArray[np.float32]:
        """Raw logits over all experts, [W, n, L, E], of W windows of n tokens, layer by layer."""
        import torch

        caught: list[Any] = []

        def listen(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], _output: Any) -> None:
            hidden = arguments[0] if arguments else next(iter(keywords.values()))
            logits = hidden.reshape(-1, hidden.shape[-1]).float() @ module.weight.float().T
            caught.append(logits)

        handles = [gate.register_forward_hook(listen, with_kwargs=True) for gate in self.gates]
        windows: list[npt.NDArray[np.float32]] = []
        try:
            with torch.no_grad():
                for row, window in enumerate(tokens):
                    caught.clear()
                    self.model(input_ids=torch.from_numpy(window[None]).to(self.model.device), use_cache=False)
                    windows.append(torch.stack(caught, dim=1).cpu().numpy())
                    if progress is not None:
                        progress(row + 1)
        finally:
            for handle in handles:
                handle.remove()
        return np.stack(windows)
