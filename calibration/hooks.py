# SPDX-License-Identifier: Apache-2.0
"""Router logits of a `transformers` model by forward hooks on its gates.

`output_router_logits` is not offered by every family; a gate's input and weight are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.errors import DependencyError


class HookedModel:
    """A checkpoint opened by `transformers` in float32, whose routers are listened to.

    Args:
        checkpoint_dir: Hugging Face checkpoint.

    Raises:
        DependencyError: torch or transformers is not installed.
        CalibrationError: `transformers` cannot open it, or it has no router that is known here.
    """

    def __init__(self, checkpoint_dir: str | Path) -> None:
        try:
            import torch
            import transformers
        except ModuleNotFoundError as error:
            raise DependencyError(
                f"hooks on a checkpoint need the package {error.name!r}: "
                "install it with pip install 'adaptive-k-moe[training]'."
            ) from None
        self._torch: Any = torch
        transformers.utils.logging.disable_progress_bar()
        try:
            self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                str(checkpoint_dir), dtype=torch.float32
            ).eval()
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CalibrationError(f"transformers cannot open {checkpoint_dir}: {reason}") from None
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
        torch = self._torch
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
                    self.model(input_ids=torch.from_numpy(window[None]), use_cache=False)
                    windows.append(torch.stack(caught, dim=1).numpy())
                    if progress is not None:
                        progress(row + 1)
        finally:
            for handle in handles:
                handle.remove()
        return np.stack(windows)
