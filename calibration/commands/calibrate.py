# SPDX-License-Identifier: Apache-2.0
"""``adaptive-k calibrate``: choose a policy's thresholds by measurement, within a budget."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_k_moe.calibration.kinds import ADAPTIVE_KINDS, STATIC_KINDS

if TYPE_CHECKING:
    from adaptive_k_moe.calibration.calibrate import Calibration
    from adaptive_k_moe.calibration.evaluator import Evaluator
    from adaptive_k_moe.calibration.laboratory import Budget
    from adaptive_k_moe.calibration.windows import Windows
    from adaptive_k_moe.policy import PolicySet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint_dir", type=Path, help="Hugging Face checkpoint; an engine is built from it")
    model.add_argument("--engine_dir", type=Path, help="directory written by `adaptive-k build`")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="UTF-8 text to fit on")
    parser.add_argument(
        "--heldout_text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="text to report on (default: every second block of windows of --text, which is then not fitted on)",
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--target_avg_k", type=float, metavar="X", help="mean experts run for a token in a layer")
    budget.add_argument("--target_saving", type=float, metavar="PCT", help="per cent of the expert runs left out")
    budget.add_argument("--max_perplexity_increase", type=float, metavar="PCT", help="per cent that may be lost")
    budget.add_argument(
        "--target_reads",
        type=float,
        metavar="SHARE",
        help="with --batch_size: experts that a decode step reads, as a share of the full model's",
    )
    budget.add_argument(
        "--target_time",
        type=float,
        metavar="SHARE",
        help="with --batch_size: time of a decode step on this machine, as a share of the full model's",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        metavar="B",
        help="calibrate for decode steps of B sequences: finds the prices of a `shared` policy for decode",
    )
    parser.add_argument(
        "--prefill_policy",
        metavar="NAME",
        help="with --batch_size: policy of the engine or of OUTPUT that prompts follow (default: full)",
    )
    parser.add_argument(
        "--max_steps",
        type=int,
        default=1024,
        help="with --batch_size: most decode steps of a pass over the fitted part (default: 1024)",
    )
    parser.add_argument(
        "--layer_rounds", type=int, default=4, help="with --batch_size: rounds of prices by layer (default: 4)"
    )
    parser.add_argument(
        "--policy_kind",
        nargs="+",
        choices=(*ADAPTIVE_KINDS, *STATIC_KINDS),
        help="kinds to choose among, by their damage on the fitted part (default: all adaptive ones)",
    )
    parser.add_argument(
        "--k_values",
        type=int,
        nargs="+",
        help="values of k to choose among, the trained top-k last (default: a third, two thirds and all of it)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="policy file to write or add to")
    parser.add_argument("--policy_name", default="balanced", help="the policy's name in it (default: balanced)")
    parser.add_argument("--no_opponent", action="store_true", help="leave the fixed k by layer out of the policy file")
    parser.add_argument("--default", action="store_true", help="make it the file's default policy")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write index.html, figures and results.json there")
    parser.add_argument("--work_dir", type=Path, help="keeps recordings and scores (default: OUTPUT with .work added)")
    parser.add_argument("--window", type=int, help="tokens in a window (default: 256, or what the engine takes)")
    parser.add_argument("--max_tokens", type=int, help="use about this many tokens of each text")
    parser.add_argument("--bands", type=int, default=6, help="entropy bands in each layer (default: 6)")
    parser.add_argument(
        "--refine_passes", type=int, default=48, help="passes that refining a kind may take (default: 48)"
    )
    parser.add_argument(
        "--curve_points", type=int, default=4, help="budgets at which every kind is measured (default: 4)"
    )
    parser.add_argument("--timing_rounds", type=int, default=5, help="rounds of timing for the report (default: 5)")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="read the text with transformers and our operator there, and build no engine; needs --checkpoint_dir",
    )
    parser.add_argument("--num_threads", type=int, help="CPU threads (default: all)")


def run(args: argparse.Namespace) -> int:
    """Calibrate, write the policy file and the report, and print the table."""
    from adaptive_k_moe.calibration.calibrate import calibrate
    from adaptive_k_moe.engine_builder.commands.console import progress_bar
    from adaptive_k_moe.files import write_text

    if args.bands < 2:
        from adaptive_k_moe.calibration.errors import CalibrationError

        raise CalibrationError(f"{args.bands} bands cannot rank tokens by their entropy: give --bands 2 or more.")
    for_decode = (args.target_reads, args.target_time, args.prefill_policy)
    if args.batch_size is None and any(value is not None for value in for_decode):
        from adaptive_k_moe.calibration.errors import CalibrationError

        raise CalibrationError(
            "--target_reads, --target_time and --prefill_policy are for decode steps: give --batch_size, too."
        )
    if args.batch_size is not None:
        return _run_decode(args)
    work_dir = args.work_dir or args.output.with_name(args.output.name + ".work")
    args.output.parent.mkdir(parents=True, exist_ok=True)  # or fails now, not when all is measured
    if args.report:
        from adaptive_k_moe.calibration.report import check_matplotlib, write_report

        check_matplotlib()
    known = _known_policies(args.output)
    with progress_bar("opening") as report:
        with _open(args, work_dir, report) as evaluator:
            fit, heldout = _texts(args, evaluator)
            result = calibrate(
                evaluator,
                fit,
                heldout,
                _budget(args, evaluator.full_k),
                work_dir=work_dir,
                kinds=args.policy_kind,
                expert_norms=known.expert_norms,
                k_values=args.k_values,
                name=args.policy_name,
                num_bands=args.bands,
                refine_passes=args.refine_passes,
                curve_points=args.curve_points if args.report else 0,
                timing_rounds=args.timing_rounds,
                report=report,
            )
            write_text(args.output, policy_text(_policy_file(known, result, evaluator, args)))
            if args.report:
                report("drawing the report", 0, None)
                write_report(args.report, result, evaluator)
    print(table(result))
    names = result.chosen.name if args.no_opponent else f"{result.chosen.name} and {result.opponent.name}"
    print(f"{names} written to {args.output}")
    if args.report:
        print(f"report: {args.report / 'index.html'}")
    return 0


def _run_decode(args: argparse.Namespace) -> int:
    """Calibrate for decode steps, write the policy file, and print the table."""
    from adaptive_k_moe.calibration.calibrate_decode import calibrate_decode
    from adaptive_k_moe.calibration.decoding import decode_table
    from adaptive_k_moe.calibration.errors import CalibrationError
    from adaptive_k_moe.calibration.laboratory import Budget
    from adaptive_k_moe.engine_builder.commands.console import progress_bar
    from adaptive_k_moe.files import write_json, write_text

    if (args.target_reads, args.target_time, args.max_perplexity_increase) == (None, None, None):
        raise CalibrationError(
            "--batch_size goes with --target_reads, --target_time or --max_perplexity_increase: give one of them."
        )
    if args.policy_kind or args.k_values:
        raise CalibrationError("--policy_kind and --k_values do not go with --batch_size: leave them out.")
    rise = args.max_perplexity_increase
    loss = None if rise is None else rise / 100
    budget = Budget(reads=args.target_reads, time=args.target_time, perplexity_increase=loss)
    work_dir = args.work_dir or args.output.with_name(args.output.name + ".work")
    args.output.parent.mkdir(parents=True, exist_ok=True)  # or fails now, not when all is measured
    known = _known_policies(args.output)
    with progress_bar("opening") as report:
        with _open(args, work_dir, report, max_batch_size=max(16, args.batch_size)) as evaluator:
            if known.expert_norms is not None:
                evaluator.expert_norms = known.expert_norms
            policies = {**_in_nats(evaluator.config.adaptive_k), **_in_nats(known)}
            fit, heldout = _texts(args, evaluator)
            result = calibrate_decode(
                evaluator,
                fit,
                heldout,
                budget,
                batch=args.batch_size,
                work_dir=work_dir,
                name=args.policy_name,
                known=policies,
                prefill=_prefill(args.prefill_policy, policies, evaluator.full_k),
                rounds=args.layer_rounds,
                max_steps=args.max_steps,
                timing_rounds=args.timing_rounds,
                report=report,
            )
            opponents = [f"{args.policy_name}_static", f"{args.policy_name}_per_token"]
            names = [
                args.policy_name,
                *(each for each in opponents if each in result.policies and not args.no_opponent),
            ]
            content = known
            if known.expert_norms is None:
                content = known.model_copy(update={"expert_norms": evaluator.expert_norms})
            for name in names:
                rule = result.policies[name].model_dump(mode="json", exclude_none=True)
                for phase in ("prefill", "decode"):
                    _to_unit(rule[phase], known.unit)
                content = content.with_policy(name, rule, default=args.default and name == args.policy_name)
            write_text(args.output, policy_text(_with_full(content, evaluator.full_k)))
    if args.report:
        args.report.mkdir(parents=True, exist_ok=True)
        write_json(args.report / "decode.json", result.to_json())
    print(f"fitted on {len(fit)} windows of {fit.window} tokens, reported on {len(heldout)} others")
    print(decode_table(result.reported))
    if result.step_time is not None:
        taken = result.step_time
        print(
            f"time of a step, of full's: {taken.fixed:.3f} + {taken.by_reads:.5f} a read + {taken.by_k:.4f} a token's "
            f"expert + {taken.sharing:.3f} to share; off by {taken.largest_error:.3f} at most"
        )
    print(f"budget met on the reported part: {result.budget_met}")
    print(f"{', '.join(names)} written to {args.output}")
    return 0


def _in_nats(policies: PolicySet) -> dict[str, Any]:
    """A set's policies by name, with thresholds in nats."""
    import math

    from adaptive_k_moe.policy import PolicySet

    if policies.unit == "nats":
        return dict(policies.policies)
    content = policies.model_dump(mode="json", exclude_none=True)
    for policy in content["policies"].values():
        for rule in (policy, policy.get("prefill", {}), policy.get("decode", {})):
            _scale_thresholds(rule, math.log(2))
    return dict(PolicySet.model_validate({**content, "unit": "nats"}).policies)


def _to_unit(rule: dict[str, Any], unit: str) -> None:
    """A rule of a policy file whose thresholds were in nats, in the file's unit."""
    import math

    if not rule.get("layers", True):
        del rule["layers"]
    if unit == "bits":
        _scale_thresholds(rule, 1 / math.log(2))


def _scale_thresholds(rule: dict[str, Any], factor: float) -> None:
    for choices in [rule, *rule.get("layers", {}).values()]:
        if "thresholds" in choices:
            choices["thresholds"] = [limit * factor for limit in choices["thresholds"]]


def _prefill(name: str | None, policies: dict[str, Any], full_k: int) -> Any:
    """The rule that prompts follow: the trained top-k, or a policy's own of one token."""
    from adaptive_k_moe.calibration.errors import CalibrationError
    from adaptive_k_moe.policy import FULL, FixedPolicy, rules_of
    from adaptive_k_moe.policy_kinds import KINDS

    if name is None or name == FULL:
        return FixedPolicy(kind="fixed", k=full_k)
    if name not in policies:
        raise CalibrationError(
            f"there is no policy {name!r} for prompts: the engine and OUTPUT have {sorted(policies)}."
        )
    rule = rules_of(policies[name], policies)[0]
    if KINDS[rule.kind].sees_step:
        raise CalibrationError(f"policy {name!r} shares experts, which is for decode: give prompts another one.")
    return rule


def table(result: Calibration) -> str:
    """The candidates and the opponent on the reported part, as text."""
    lines = [
        f"{len(result.fit)} windows of {result.fit.window} tokens fitted on, {len(result.heldout)} reported; "
        f"perplexity of the full model there: {result.chosen.full.perplexity:.3f}",
        f"{'policy':<28}{'avg k':>8}  "
        f"{'perplexity change (95 %)':>28}  {'KL to full, nats (95 %)':>28}  same top token",
    ]
    points = [result.chosen, result.opponent, *result.candidates]
    for point in points:
        change, kl = point.perplexity_change, point.kl
        label = point.name if point in (result.chosen, result.opponent) else "  best " + point.kind
        lines.append(
            f"{label:<28}{point.avg_k.value:>8.3f}  "
            f"{change.value:>+10.2%} ({change.low:+.2%} {change.high:+.2%})  "
            f"{kl.value:>9.5f} ({kl.low:.5f} {kl.high:.5f})  {point.heldout.agreement.mean():>14.1%}"
        )
    gap = result.against_opponent()
    verdict = "better than" if gap["kl"].high < 0 else "worse than" if gap["kl"].low > 0 else "no different from"
    lines.append("differences on the reported part, paired by window (95 %); below 0 the first is better")
    for left, right, gaps in result.pairs():
        kl, nll = gaps["kl"], gaps["log_perplexity"]
        lines.append(
            f"{f'  {left.name} - {right.name}':<50}KL {kl.value:+.5f} ({kl.low:+.5f} {kl.high:+.5f})  "
            f"log-perplexity {nll.value:+.4f} ({nll.low:+.4f} {nll.high:+.4f})  average k {gaps['avg_k'].value:+.3f}"
        )
    lines += [
        f"budget met on the reported part: {result.budget_met}",
        f"{result.chosen.name} ({result.chosen.kind}) is {verdict} {result.opponent.name} by KL: "
        f"{gap['kl'].value:+.5f} nats ({gap['kl'].low:+.5f} {gap['kl'].high:+.5f}), average k "
        f"{gap['avg_k'].value:+.3f}; log-perplexity {gap['log_perplexity'].value:+.4f} "
        f"({gap['log_perplexity'].low:+.4f} {gap['log_perplexity'].high:+.4f})",
        "a share of experts saved is a count: `adaptive-k eval` measures the time.",
    ]
    return "\n".join(lines)


def policy_text(content: dict[str, Any]) -> str:
    """A policy file as a person would write it: one policy a line, one layer a line."""
    content = dict(content)
    norms = content.pop("expert_norms", None)
    policies = []
    for name, policy in content["policies"].items():
        layers = policy.get("layers")
        head = json.dumps({key: value for key, value in policy.items() if key != "layers"})
        if layers:
            rules = ",\n".join(f"      {json.dumps(layer)}: {json.dumps(rule)}" for layer, rule in layers.items())
            head = f'{head[:-1]}, "layers": {{\n{rules}}}}}'
        policies.append(f"    {json.dumps(name)}: {head}")
    rest = "".join(
        f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in content.items() if key != "policies"
    )
    body = ",\n".join(policies)
    rows = ",\n".join(f"    {json.dumps(layer)}" for layer in norms or [])
    last = f',\n  "expert_norms": [\n{rows}\n  ]' if norms else ""
    return f'{{\n{rest}  "policies": {{\n{body}\n  }}{last}\n}}\n'


def _open(args: argparse.Namespace, work_dir: Path, report: Any, *, max_batch_size: int = 16) -> Evaluator:
    """The engine that is named or built, or the checkpoint itself on a device."""
    from adaptive_k_moe.calibration.errors import CalibrationError
    from adaptive_k_moe.calibration.evaluator import Evaluator

    if args.device is not None:
        if args.checkpoint_dir is None:
            raise CalibrationError("--device runs a checkpoint and no engine: give --checkpoint_dir.")
        from adaptive_k_moe.calibration.torch_session import CheckpointEvaluator

        return CheckpointEvaluator(args.checkpoint_dir, args.device)
    engine_dir = args.engine_dir or _build(args.checkpoint_dir, work_dir / "engine", report, max_batch_size)
    return Evaluator(engine_dir, num_threads=args.num_threads)


def _build(checkpoint_dir: Path, engine_dir: Path, report: Any, max_batch_size: int = 16) -> Path:
    """The work folder's engine; one that is whole and of this checkpoint is used again."""
    from adaptive_k_moe.calibration.engines import engine_of

    return engine_of(
        checkpoint_dir,
        engine_dir,
        max_batch_size=max_batch_size,
        progress=lambda part, done, total: report(f"building: {part}", done, total),
    )


def _texts(args: argparse.Namespace, evaluator: Evaluator) -> tuple[Windows, Windows]:
    from adaptive_k_moe.calibration.windows import make_windows, read_text, split

    build = evaluator.config.build_config
    window = args.window or min(256, build.max_seq_len, build.max_num_tokens)
    evaluator.check_window(window)

    def windows(paths: list[Path]) -> Windows:
        texts = {str(path): read_text(path) for path in paths}
        return make_windows(evaluator.tokenizer, texts, window, max_tokens=args.max_tokens)

    if args.heldout_text:
        return windows(args.text), windows(args.heldout_text)
    return split(windows(args.text))


def _budget(args: argparse.Namespace, full_k: int) -> Budget:
    from adaptive_k_moe.calibration.errors import CalibrationError
    from adaptive_k_moe.calibration.laboratory import Budget

    if args.target_avg_k is not None:
        return Budget(avg_k=args.target_avg_k)
    if args.target_saving is not None:
        if not 0 <= args.target_saving < 100:
            raise CalibrationError(f"a saving of {args.target_saving:g} per cent is not between 0 and 100.")
        return Budget(avg_k=full_k * (1 - args.target_saving / 100))
    return Budget(perplexity_increase=args.max_perplexity_increase / 100)


def _known_policies(output: Path) -> Any:
    """What the output file holds already; read before hours of work, so that a bad file is refused at once."""
    from adaptive_k_moe.policy import PolicySet, read_policy_file

    return read_policy_file(output) if output.exists() else PolicySet()


def _policy_file(known: Any, result: Calibration, evaluator: Evaluator, args: argparse.Namespace) -> dict[str, Any]:
    """The known policies with the chosen one and its opponent added or replaced."""
    content = known
    if known.expert_norms is None:
        content = known.model_copy(update={"expert_norms": result.expert_norms})
    for point in (result.chosen,) if args.no_opponent else (result.chosen, result.opponent):
        rule = point.policy.model_dump(mode="json", exclude_none=True)  # type: ignore[union-attr]
        _to_unit(rule, known.unit)
        content = content.with_policy(point.name, rule, default=args.default and point is result.chosen)
    return _with_full(content, evaluator.full_k)


def _with_full(content: PolicySet, full_k: int) -> dict[str, Any]:
    """A policy file's content, `full` first."""
    from adaptive_k_moe.policy import FULL

    written = content.to_json()
    return {**written, "policies": {FULL: {"kind": "fixed", "k": full_k}, **written["policies"]}}
