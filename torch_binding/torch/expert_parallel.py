# SPDX-License-Identifier: Apache-2.0
"""Expert parallel: each process of a group holds a range of every layer's experts, and their outputs are added up.

All processes run the whole model on the same tokens, but for the experts. Each decides for itself what runs, over all
experts and so alike, computes what its own experts contribute, and adds up with the others: one all-reduce of
[T, hidden] a layer. The sum's order is the ranks', so results equal one process's to rounding and not to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from adaptive_k_moe.errors import BuildError


class ExpertShare:
    """What a process holds of every layer's experts: neighbours, as many as others hold, or one more.

    Args:
        group: of `torch.distributed`, whose processes share out the experts.
        num_experts: of a layer.

    Attributes:
        group: the group.
        first: the first expert that this process holds.
        end: one past the last.

    Raises:
        BuildError: this process is not of the group, or it has more processes than a layer has experts.
    """

    def __init__(self, group: Any, num_experts: int) -> None:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise BuildError("expert_parallel_group: this process is not in the group.")
        if ranks > num_experts:
            raise BuildError(
                f"expert_parallel_group has {ranks} processes but a layer has {num_experts} experts: use at most "
                "as many."
            )
        self.group = group
        self.num_experts = num_experts
        self.first, self.end = (num_experts * edge // ranks for edge in (rank, rank + 1))

    def take(self, experts: Any, names: tuple[str, ...]) -> None:
        """Keep this process's part of a layer's weights [E, ...] and free the others'."""
        if held_range(experts) is not None:
            return
        for name in names:
            weight = getattr(experts, name)
            part = weight.detach()[self.first : self.end].clone()  # in memory of its own
            setattr(experts, name, torch.nn.Parameter(part, requires_grad=False))
        mark(experts, self.first, self.end)

    def add_up(self, output: Any) -> Any:
        """The sum of all processes' outputs, in place."""
        dist.all_reduce(output, group=self.group)
        return output


class _NotAlone:
    """The forward of experts of which a process holds a range, where nothing adds up."""

    def __init__(self, first: int, end: int) -> None:
        self.held = first, end

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise BuildError(
            f"this process holds the experts {self.held[0]} to {self.held[1] - 1} alone: put the operator into the "
            "model, with adapt(model, expert_parallel_group=...), before it runs."
        )


def mark(experts: Any, first: int, end: int) -> None:
    """Note that a module holds these experts alone, which its own forward knows nothing of."""
    setattr(experts, forward_name(experts), _NotAlone(first, end))


def held_range(experts: Any) -> tuple[int, int] | None:
    """The experts that a module holds, first and end, if it does not hold all."""
    forward = vars(experts).get(forward_name(experts))
    return forward.held if isinstance(forward, _NotAlone) else None


def forward_name(module: Any) -> str:
    """The attribute with a module's forward."""
    # Where a device map has put a hook around it, the hook goes on moving weights and inputs.
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"
