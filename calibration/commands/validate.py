# SPDX-License-Identifier: Apache-2.0
"""``adaptive-k validate``: the routers' entropy on easy, code and hard text, and what the published rule saves."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adaptive_k_moe.calibration.validation import SetValidation

SETS = ("easy", "code", "hard")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="Hugging Face checkpoint directory")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON to write (default: MODEL_validation.json, by the folder's name)",
    )
    parser.add_argument(
        "--text", nargs="+", metavar="NAME=FILE", help="sets of text (default: the bundled easy, code and hard)"
    )
    parser.add_argument("--thresholds", type=float, nargs="*", help="of the rule (default: the published ones)")
    parser.add_argument("--k", type=int, nargs="+", help="of the rule, one more than thresholds")
    parser.add_argument("--unit", default="bits", help="of the thresholds: bits or nats (default: bits)")
    parser.add_argument("--window", type=int, default=64, help="tokens in a window (default: 64)")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="that hooks run on: cpu, in float32, or cuda, in the checkpoint's type and without an engine beside it",
    )
    parser.add_argument("--no_engine", action="store_true", help="measure by hooks alone")
    parser.add_argument("--num_threads", type=int, help="CPU threads of the engine (default: all)")


def run(args: argparse.Namespace) -> int:
    """Measure both ways, compare, print the table and write the JSON."""
    import numpy as np

    from adaptive_k_moe.calibration import validation
    from adaptive_k_moe.calibration.engines import engine_of
    from adaptive_k_moe.calibration.entropy import BITS, EntropyRule, seed_rule
    from adaptive_k_moe.calibration.errors import CalibrationError
    from adaptive_k_moe.calibration.evaluator import Evaluator
    from adaptive_k_moe.calibration.hooks import HookedModel
    from adaptive_k_moe.calibration.windows import make_windows
    from adaptive_k_moe.engine_builder.checkpoint import HfConfig
    from adaptive_k_moe.engine_builder.commands.console import progress_bar
    from adaptive_k_moe.engine_builder.models import architecture_of
    from adaptive_k_moe.errors import BuildError, CheckpointError
    from adaptive_k_moe.files import write_json
    from adaptive_k_moe.runtime.tokenizer import Tokenizer

    texts = _texts(args.text)
    if (args.thresholds is None) != (args.k is None):
        raise CalibrationError("--thresholds and --k belong together: give both or neither.")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)  # or fails now, not when all is measured
    tokenizer = Tokenizer.from_dir(args.checkpoint_dir)
    windows = {name: make_windows(tokenizer, {name: text}, args.window) for name, text in texts.items()}
    with progress_bar("opening") as report, tempfile.TemporaryDirectory() as temporary:
        report("opening the checkpoint", 0, None)
        model = HookedModel(args.checkpoint_dir, args.device)
        full_k = top_k_of(model.model.config)
        rule = seed_rule(model.num_experts, full_k)
        if args.k is not None:
            rule = EntropyRule.checked(args.thresholds, args.k, args.unit, num_experts=model.num_experts).capped(full_k)
        hooks = {
            name: validation.hook_entropies(
                model,
                part,
                progress=lambda done, name=name, part=part: report(f"hooks: {name}", done, len(part)),  # type: ignore[misc]
            )
            for name, part in windows.items()
        }
        without = "--no_engine was given" if args.no_engine else None
        if args.device != "cpu":
            without = f"--device {args.device} computes in another type"
        difference: float | None = None
        if without is None:
            try:
                architecture_of(HfConfig.read(args.checkpoint_dir))
                report("building the engine", 0, None)
                engine_dir = engine_of(args.checkpoint_dir, Path(temporary) / "engine", dtype="float32")
            except (BuildError, CheckpointError) as error:
                without = str(error)
            else:
                with Evaluator(engine_dir, num_threads=args.num_threads) as evaluator:
                    engine = {name: validation.engine_entropies(evaluator, part) for name, part in windows.items()}
                difference = max(validation.check_agreement(hooks[name], engine[name]) for name in windows)
    rows = [validation.summarize(entropy, rule, full_k, name) for name, entropy in hooks.items()]
    if len(rows) > 1:
        rows.append(validation.summarize(np.concatenate(list(hooks.values())), rule, full_k, "all"))
    model_name = args.checkpoint_dir.resolve().name
    largest = float(np.log(model.num_experts)) * BITS
    print(
        f"{model_name}: {model.num_experts} experts, top-{full_k}, {len(model.gates)} routers; entropy is at most "
        f"{largest:.3f} bits\nk by the rule: {_rule_text(rule)}; windows of {args.window} tokens, intervals 95 %\n"
    )
    print(table(rows))
    if difference is None:
        print(f"\nby hooks on transformers alone, not compared with the engine: {without}")
    else:
        print(f"\nhooks on transformers and the engine's own output differ by at most {difference:.1e} bits")
    output = args.output or Path(f"{model_name.replace('-', '_')}_validation.json")
    write_json(
        output,
        {
            "model": model_name,
            "num_experts": model.num_experts,
            "num_experts_per_tok": full_k,
            "max_entropy_bits": largest,
            "rule": {"thresholds_bits": [limit * BITS for limit in rule.thresholds], "k": list(rule.k)},
            "window": args.window,
            "sets": [row.to_json() for row in rows],
            "hooks_and_engine_differ_bits": difference,
            "engine_not_compared": without,
            "reported_by_others": {"source": validation.REPORTED_SOURCE, "rows": validation.REPORTED},
        },
    )
    print(f"written to {output}")
    return 0


def top_k_of(config: object) -> int:
    """The trained top-k, by whichever name a configuration has for it."""
    from adaptive_k_moe.calibration.errors import CalibrationError

    for name in ("num_experts_per_tok", "moe_top_k", "top_k"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    raise CalibrationError("the checkpoint's configuration does not say how many experts a token runs.")


def table(rows: Sequence[SetValidation]) -> str:
    """The measured rows, the reported ones, and the entropy by layer."""
    from adaptive_k_moe.calibration.validation import REPORTED, REPORTED_SOURCE

    lines = [f"{'set':<10}  {'router entropy, bits':>22}  {'effective k':>20}  {'savings':>24}"]
    for row in rows:
        e, k, s = row.entropy, row.effective_k, row.savings
        lines.append(
            f"{row.name:<10}  {e.value:>6.3f} ({e.low:.3f} {e.high:.3f})  {k.value:>6.3f} ({k.low:.3f} {k.high:.3f})  "
            f"{s.value:>7.1%} ({s.low:.1%} {s.high:.1%})"
        )
    lines.append(f"\n{REPORTED_SOURCE}:")
    lines += [
        f"{name:<10}  {entropy:>6.2f}{'':<16}  {k:>6.1f}{'':<14}  {savings:>7.1%}"
        for name, entropy, k, savings in (reported.values() for reported in REPORTED)
    ]
    lines.append("\nentropy by MoE layer, bits (and effective k)")
    lines.append(f"{'layer':<10}  " + "  ".join(f"{row.name:>22}" for row in rows))
    for layer in range(len(rows[0].layer_entropy)):
        cells = [f"{row.layer_entropy[layer].value:.3f} ({row.layer_k[layer].value:.2f})" for row in rows]
        lines.append(f"{layer:<10}  " + "  ".join(f"{cell:>22}" for cell in cells))
    lines.append("savings are a count of expert runs: `adaptive-k eval` measures the time and the quality.")
    return "\n".join(lines)


def _rule_text(rule: object) -> str:
    from adaptive_k_moe.calibration.entropy import BITS, EntropyRule

    assert isinstance(rule, EntropyRule)
    rule = rule.merged()
    parts = [f"{k} below {limit * BITS:.3g} bits" for limit, k in zip(rule.thresholds, rule.k, strict=False)]
    return ", ".join([*parts, f"else {rule.k[-1]}"])


def _texts(named: Sequence[str] | None) -> dict[str, str]:
    """The sets that were named, or the bundled ones."""
    from adaptive_k_moe.calibration.errors import CalibrationError
    from adaptive_k_moe.calibration.windows import read_text

    if named is None:
        folder = Path(__file__).resolve().parent.parent / "texts"
        return {name: read_text(folder / f"{name}.txt") for name in SETS}
    texts = {}
    for entry in named:
        name, separator, path = entry.partition("=")
        if not separator or not name or not path:
            raise CalibrationError(f"--text takes NAME=FILE, and {entry!r} is not that.")
        texts[name] = read_text(path)
    return texts
