# SPDX-License-Identifier: Apache-2.0
"""The Mamba2 operator on NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.plugin import _plugin
from adaptive_k_moe.plugin.description import MAMBA

Array = npt.NDArray[Any]


def mamba2(
    conv_input: Array,
    dt: Array,
    subsequence_begins: Array,
    past_lens: Array,
    state_slots: Array,
    conv_weight: Array,
    conv_bias: Array,
    a: Array,
    d: Array,
    dt_bias: Array,
    conv_state: npt.NDArray[np.float32],
    ssm_state: npt.NDArray[np.float32],
    *,
    n_groups: int = 1,
    dt_min: float = 0.0,
    dt_max: float = float("inf"),
    num_threads: int | None = None,
) -> npt.NDArray[np.float32]:
    """Runs the causal convolution and the scan over packed sequences, and updates their states in place.

    A token's result does not depend, to the bit, on the other sequences, nor on how the tokens of its own were
    cut into calls.

    Args:
        conv_input: [T, channels] float32, x, B and C of each token, side by side: heads * head_dim, then
            n_groups * state_size twice.
        dt: [T, heads] float32, before its bias.
        subsequence_begins: [S + 1] int32, where each sequence's tokens begin; from 0 to T.
        past_lens: [S] int32, tokens of each sequence that its states have seen. At 0 it starts from zero states,
            whatever lies in its slot.
        state_slots: [S] int32, each sequence's place in the states; all different. At -1 a sequence has none: its
            outputs are zeros and no state changes.
        conv_weight: [K, channels] float32, the newest token's tap last; K is 2 to 16.
        conv_bias: [channels] float32.
        a: [heads] float32, the A of the state space, below 0.
        d: [heads] float32, the D of the skip connection.
        dt_bias: [heads] float32.
        conv_state: [slots, K - 1, channels] float32, C-contiguous; the last inputs, the newest last. Updated.
        ssm_state: [slots, heads, state_size, head_dim] float32, C-contiguous. Updated.
        n_groups: groups of heads that share B and C.
        dt_min: lower limit of the step sizes behind softplus.
        dt_max: upper limit of them.
        num_threads: threads to use; None means all that TBB gives.

    Returns:
        y: [T, heads * head_dim] float32.

    Raises:
        ValueError: an input does not fit; the message names it, and no state is changed.
    """
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"Mamba2: num_threads is {num_threads} but must be at least 1")
    inputs = {
        "conv_input": conv_input,
        "dt": dt,
        "subsequence_begins": subsequence_begins,
        "past_lens": past_lens,
        "state_slots": state_slots,
        "conv_weight": conv_weight,
        "conv_bias": conv_bias,
        "A": a,
        "D": d,
        "dt_bias": dt_bias,
        "conv_state": conv_state,
        "ssm_state": ssm_state,
    }
    arrays = []
    for tensor in MAMBA.inputs:
        value = inputs[tensor.name]
        array = np.asarray(value)
        dtype = np.int32 if tensor.type == "int32" else np.float32
        if array.dtype != dtype:
            raise ValueError(f"Mamba2: input {tensor.name} is {array.dtype} but must be {np.dtype(dtype).name}")
        updatable = isinstance(value, np.ndarray) and array.flags.c_contiguous and array.flags.writeable
        if tensor.name.endswith("_state") and not updatable:
            raise ValueError(f"Mamba2: input {tensor.name} must be a writeable C-contiguous NumPy array: it is updated")
        arrays.append(np.ascontiguousarray(array))
    tokens = len(arrays[0]) if arrays[0].ndim else 0
    width = ssm_state.shape[1] * ssm_state.shape[3] if ssm_state.ndim == 4 else 0
    y = np.empty((tokens, width), np.float32)
    _plugin.mamba2(dict(n_groups=n_groups, dt_min=dt_min, dt_max=dt_max), arrays, num_threads, y)
    return y
