# SPDX-License-Identifier: Apache-2.0
"""What the full model's routers chose on a text, and how much each expert's output weighs.

Both are read off an engine whose session also shows what the operator of each MoE layer was given: the hidden states
and the router's logits. An expert's output is the operator's own, for a token that runs that expert alone. Collected
once, streamed to disk, and completed where a run was cut off, as recordings are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.calibration.evaluator import Evaluator, Progress
from adaptive_k_moe.calibration.recording import engine_fingerprint, open_arrays, read_json
from adaptive_k_moe.calibration.windows import Windows
from adaptive_k_moe.engine_config import EngineConfig
from adaptive_k_moe.files import write_json
from adaptive_k_moe.model_config import MoeConfig, PretrainedConfig
from adaptive_k_moe.plugin.description import MOE, POLICY_KINDS
from adaptive_k_moe.runtime.session.expert_load import moe_operators
from adaptive_k_moe.runtime.session.openvino import OpenVinoSession

if TYPE_CHECKING:
    from adaptive_k_moe.plugin import Routing

FORMAT = 1
"""Changes whenever old files could not be read any more."""

DECIMALS = 4
"""Norms are rounded before anything is measured with them, so that the policy file says what was measured."""

_PROBED = {name: MOE.input_index(name) for name in ("hidden_states", "router_logits")}


@dataclass(frozen=True, eq=False)
class RouterRecording:
    """The full model's choices, in memory-mapped files. W windows of n tokens, L layers, K the trained top-k.

    Attributes:
        scores: [W, n, L, K] scores of the selected experts, best first.
        experts: [W, n, L, K] which they are.
        total: [W, n, L] sum of all experts' scores.
        norms: [L, E] mean L2 norm of each expert's output over the tokens that run it; each layer's mean is 1, and
            so is the norm of an expert that no token ran.
    """

    scores: npt.NDArray[np.float32]
    experts: npt.NDArray[np.int32]
    total: npt.NDArray[np.float32]
    norms: npt.NDArray[np.float64]


def can_collect(evaluator: Evaluator) -> bool:
    """Whether the engine's session can show what its operators are given."""
    return evaluator.config.build_config.target == "openvino"


def collect_routers(
    evaluator: Evaluator, windows: Windows, directory: Path, *, progress: Progress | None = None
) -> RouterRecording:
    """The routers' recording: read from `directory`, completed where a run was cut off, or made.

    Args:
        evaluator: the engine; its session is closed meanwhile.
        windows: W windows of n tokens.
        directory: this text's own; made if missing.
        progress: called with the number of windows that are there.

    Raises:
        CalibrationError: the engine is not of the target openvino.
    """
    model = evaluator.config.pretrained_config
    if not can_collect(evaluator):
        raise CalibrationError(
            f"expert norms are measured on an engine of the target openvino, and this one's is "
            f"{evaluator.config.build_config.target}: calibrate such an engine, and take its policy file for this one."
        )
    lead = (len(windows), windows.window, model.num_moe_layers)
    shapes: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
        "scores": ((*lead, evaluator.full_k), np.float32),
        "experts": ((*lead, evaluator.full_k), np.int32),
        "total": (lead, np.float32),
    }
    identity = {"format": FORMAT, "engine": engine_fingerprint(evaluator), "tokens": windows.fingerprint()}
    manifest = directory / "routers.json"
    directory.mkdir(parents=True, exist_ok=True)
    known = read_json(manifest)
    done = int(known.get("windows_done", 0)) if {name: known.get(name) for name in identity} == identity else 0
    paths = {name: directory / f"router_{name}.npy" for name in shapes}
    files, done = open_arrays(paths, shapes, manifest, done)
    layers = (model.num_moe_layers, model.num_experts)
    sums, counts = (np.array(known[name]) if done else np.zeros(layers) for name in ("norm_sums", "counts"))
    if progress is not None:
        progress(done)
    if done < len(windows):
        probe = RouterProbe(model)
        with evaluator.with_session(probe.open):
            for batch in evaluator.batches(windows, evaluator.tables({}), 0, start=done):
                for layer in range(model.num_moe_layers):
                    seen = probe.look(layer, evaluator.full_k)
                    for name in shapes:
                        file = files[name][batch.windows]
                        file[:, :, layer] = getattr(seen, name).reshape(file[:, :, layer].shape)
                    np.add.at(sums[layer], seen.experts, seen.norms)
                    np.add.at(counts[layer], seen.experts, 1)
                for array in files.values():
                    array.flush()
                content = {"windows_done": batch.windows.stop, "norm_sums": sums.tolist(), "counts": counts.tolist()}
                write_json(manifest, {**identity, **content})
                if progress is not None:
                    progress(batch.windows.stop)
    return RouterRecording(files["scores"], files["experts"], files["total"], relative_norms(sums, counts))


def relative_norms(sums: npt.NDArray[np.float64], counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Mean norms, [L, E], divided by their layer's mean over the experts that were run.

    Args:
        sums: [L, E] of the norms of each expert's outputs.
        counts: [L, E] tokens that ran it.
    """
    ran = counts > 0
    means = np.divide(sums, counts, out=np.zeros_like(sums), where=ran)
    layer_means = means.sum(axis=1, keepdims=True) / np.maximum(ran.sum(axis=1, keepdims=True), 1)
    # A layer whose experts add nothing at all has no norms to tell them apart by.
    usable = ran & (layer_means > 0)
    relative = np.divide(means, layer_means, out=np.ones_like(means), where=usable)
    rounded: npt.NDArray[np.float64] = np.round(relative, DECIMALS)
    return rounded


@dataclass(frozen=True, eq=False)
class _Seen:
    """One layer in one step of T tokens, as in `RouterRecording`; `norms` [T, K] are of the single outputs."""

    scores: npt.NDArray[np.float32]
    experts: npt.NDArray[np.int32]
    total: npt.NDArray[np.float32]
    norms: npt.NDArray[np.float64]


class RouterProbe:
    """Shows what each MoE layer's operator was given in the last step of the session that it opens.

    Args:
        model: the engine's.
    """

    def __init__(self, model: PretrainedConfig) -> None:
        self._model = model
        self._weights: list[_ExpertWeights] = []

    def open(self, engine_dir: str | Path, config: EngineConfig, *, num_threads: int | None = None) -> OpenVinoSession:
        """A session of the engine; its arguments are `OpenVinoSession`'s."""
        self._session = OpenVinoSession(engine_dir, config, num_threads=num_threads, prepare=self._prepare)
        return self._session

    def look(self, layer: int, top_k: int) -> _Seen:
        """What the router of one MoE layer chose in the last step, at the trained top-k."""
        moe = self._model.moe
        logits, routing = self.route(layer, top_k)
        experts = routing.experts[:, :top_k]
        hidden = self._session.output(_probe_name(layer, "hidden_states"))
        outputs = self._weights[layer].run(np.repeat(hidden, top_k, axis=0), experts.ravel(), moe)
        norms = np.linalg.norm(outputs.astype(np.float64), axis=1).reshape(experts.shape)
        return _Seen(routing.weights[:, :top_k], experts, _scores(logits, moe).sum(axis=1), norms)

    def route(self, layer: int, k: int) -> tuple[npt.NDArray[np.float32], Routing]:
        """The router's logits of one MoE layer in the last step, [T, E], and the k experts that it ranks first.

        The weights are the scores.
        """
        from adaptive_k_moe.plugin import route

        moe = self._model.moe
        logits = self._session.output(_probe_name(layer, "router_logits"))
        index, kind, thresholds, k_values = _fixed(len(logits), k)
        return logits, route(
            logits,
            index,
            kind,
            thresholds,
            k_values,
            correction_bias=self._weights[layer].correction_bias,
            scoring=moe.scoring,
            norm_topk_prob=False,
            n_group=moe.n_group,
            topk_group=moe.topk_group,
        )

    def correction_bias(self, layer: int) -> npt.NDArray[np.float32] | None:
        """[E] what one MoE layer adds to the scores to choose experts; None where the model has none."""
        return self._weights[layer].correction_bias

    def _prepare(self, graph: Any) -> None:
        """Let the graph put out what its operators are given."""
        operators = moe_operators(graph)
        self._weights = [_ExpertWeights(node, self._model) for node in operators]
        for layer, node in enumerate(operators):
            for name, index in _PROBED.items():
                port = node.input_value(index)
                port.get_tensor().add_names({_probe_name(layer, name)})
                graph.add_outputs([port])


class _ExpertWeights:
    """One layer's experts, where they lie in the engine.

    The arrays keep their constants alive. The operator's node must not be kept: its code goes with OpenVINO's core.
    """

    def __init__(self, node: Any, model: PretrainedConfig) -> None:
        given = {"correction_bias": model.moe.correction_bias, "quantised": model.quantization is not None}
        names = MOE.input_names(*(name for name, there in given.items() if there))

        def constant(name: str) -> npt.NDArray[Any]:
            return _constant(node, names.index(name), model.weight_format)

        self._up, self._down = constant("up"), constant("down")
        self.correction_bias = constant("correction_bias") if model.moe.correction_bias else None
        self._scales: dict[str, Any] = {}
        if model.quantization is not None:
            up, down = constant("up_scales"), constant("down_scales")
            self._scales = {"gate_up_scales": up, "down_scales": down, "weight_bits": model.quantization.bits}

    def run(
        self, hidden: npt.NDArray[np.float32], experts: npt.NDArray[np.int32], moe: MoeConfig
    ) -> npt.NDArray[np.float32]:
        """Each token's output of the one expert named beside it, [T, H]."""
        from adaptive_k_moe.plugin import moe as run_operator

        logits = np.full((len(hidden), moe.num_experts), -np.inf, np.float32)
        np.put_along_axis(logits, experts[:, None].astype(np.int64), 0.0, axis=1)
        index, kind, thresholds, k_values = _fixed(len(hidden), 1)
        return run_operator(
            hidden,
            logits,
            index,
            kind,
            thresholds,
            k_values,
            self._up,
            self._down,
            activation=moe.activation,
            **self._scales,
        )[0]


def _constant(node: Any, index: int, weight_format: str) -> npt.NDArray[Any]:
    """A weight of the operator; experts that are no integers are kept as bytes, bfloat16 scales before a conversion."""
    source = node.input_value(index).get_node()
    if source.get_type_name() == "Convert":
        scales: npt.NDArray[np.float32] = source.input_value(0).get_node().get_data(dtype=np.float32)
        return scales
    data: npt.NDArray[Any] = source.data
    kind = ml_dtypes.bfloat16 if weight_format == "bfloat16" else np.float32
    return data.view(kind) if data.dtype == np.uint8 else data  # an earlier release's float32 is as it is


def _probe_name(layer: int, name: str) -> str:
    return f"probe.{layer}.{name}"


def _fixed(
    tokens: int, k: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """The operator's policy inputs for the same k at every token."""
    kinds = np.full(1, POLICY_KINDS["entropy"], np.int32)
    return np.zeros(tokens, np.int32), kinds, np.zeros((1, 0), np.float32), np.full((1, 1), k, np.int32)


def _scores(logits: npt.NDArray[np.float32], moe: MoeConfig) -> npt.NDArray[np.float32]:
    """[T, E] the operator's scores."""
    if moe.scoring == "sigmoid":
        return (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores: npt.NDArray[np.float32] = shifted / shifted.sum(axis=1, keepdims=True)
    return scores
