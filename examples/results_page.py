# SPDX-License-Identifier: Apache-2.0
"""Writes what `examples/results.py` measured on one bundled model as a page: docs/results/MODEL/README.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptive_k_moe.calibration.report import LABELS

SETS = ("easy", "code", "hard")


def page(work: Path, model: str, steps: Mapping[str, str], processor: str) -> str:
    """The page of a model.

    Args:
        work: the folder with the steps' JSON files.
        model: its name.
        steps: the commands that made them, by name.
        processor: of the machine.
    """
    calibration = _read(work / "report" / "results.json")
    evaluation = _read(work / "eval.json")
    parts = [
        f"# {model}",
        f"Made by `python examples/results.py --model {model}` on {processor}. What the columns mean is in "
        "[calibration.md](../../calibration.md), what it says in [results.md](../../results.md). Intervals are 95 %.",
        "## Quality at the same average k",
        command_block(steps["balanced"]),
        f"{calibration['fit_windows']} windows of {calibration['window']} tokens were fitted on; the figures are those "
        f"of the other {calibration['heldout_windows']}, where the full model's perplexity is "
        f"{calibration['full_heldout_perplexity']:.3f}. **{LABELS[calibration['chosen']['kind']]}** did the least "
        "damage on the fitted part and became `balanced`; the best fixed k by layer became `balanced_static`.",
        _quality(calibration),
        "Differences, paired by window: below 0 the first is better; 0.01 of log-perplexity is 1 %.",
        _differences(calibration),
        "![Quality against average k](quality_by_k.png)",
        "![Damage by layer and entropy](damage.png)",
        "## Each policy of the file",
        command_block(steps["eval"]),
        "On all of `heldout.txt`, half of which was fitted on. Time against `full`, interleaved; `full` is timed "
        "twice, so its row shows what noise alone makes.",
        _policies(evaluation),
        _times(evaluation),
        "![Quality against time](quality_by_time.png)",
        "Experts of a layer that one step of decode reads, and against `full`:",
        _reads(evaluation),
        "## On which text",
        command_block(steps[SETS[0]]),
        "and so on, with few windows: k, and KL to `full` in nats.",
        _by_text(work),
        "## Entropy and the published rule",
        command_block(steps["validate"]),
        _validation(_read(work / "validation.json")),
    ]
    return "\n\n".join(parts) + "\n"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def command_block(step: str) -> str:
    """A step as a block, broken before its flags."""
    lines, line = [], "    adaptive-k"
    for word in step.split():
        if word.startswith("--") and len(line) > 84:
            lines.append(line + " \\")
            line = "       "
        line += " " + word
    return "\n".join([*lines, line])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def percent(interval: dict[str, float]) -> str:
    value, low, high = (100 * interval[name] for name in ("value", "low", "high"))
    return f"{value:+.2f} % ({low:+.2f} to {high:+.2f})"


def number(interval: dict[str, float], digits: int, sign: str = "") -> str:
    value, low, high = (f"{interval[name]:{sign}.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _quality(calibration: dict[str, Any]) -> str:
    opponent = calibration["opponent"]
    candidates = sorted(calibration["candidates"], key=lambda each: each["heldout"]["kl"]["value"])
    rows = []
    for each in [opponent, *candidates]:
        held = each["heldout"]
        rows.append(
            [
                LABELS[each["kind"]] + (" (`balanced`)" if each["kind"] == calibration["chosen"]["kind"] else ""),
                f"{held['avg_k']['value']:.3f}",
                percent(held["perplexity_change"]),
                number(held["kl"], 5),
                f"{100 * held['top_token_agreement']:.1f} %",
            ]
        )
    return markdown_table(["policy", "average k", "perplexity", "KL to full, nats", "same top token"], rows)


def _differences(calibration: dict[str, Any]) -> str:
    rows = []
    for each in calibration["paired_differences"]:
        names = [LABELS.get(each[side], f"`{each[side]}`") for side in ("policy", "minus")]
        rows.append([" - ".join(names), number(each["kl"], 5, "+"), number(each["log_perplexity"], 4, "+")])
    return markdown_table(["", "KL, nats", "log-perplexity"], rows)


def _policies(evaluation: dict[str, Any]) -> str:
    rows = [
        [
            f"`{each['policy']}`",
            f"{each['avg_k']['value']:.3f}",
            f"{100 * each['experts_saved_ratio']:.1f} %",
            percent(each["perplexity_change"]),
            f"{each['kl_to_full_nats']['value']:.5f}",
        ]
        for each in evaluation["policies"]
    ]
    return markdown_table(["policy", "average k", "experts saved", "perplexity", "KL to full, nats"], rows)


def _times(evaluation: dict[str, Any]) -> str:
    columns = [(timing["phase"], timing["batch"]) for timing in evaluation["policies"][0]["timings"]]
    rows = []
    for each in evaluation["policies"]:
        ratios = {(timing["phase"], timing["batch"]): number(timing["ratio"], 3) for timing in each["timings"]}
        rows.append([f"`{each['policy']}`", *(ratios[column] for column in columns)])
    return markdown_table(["time against `full`", *(f"{phase}, batch {batch}" for phase, batch in columns)], rows)


def _reads(evaluation: dict[str, Any]) -> str:
    steps = evaluation["decode"]
    batches = sorted({step["batch"] for step in steps})
    rows = []
    for policy in dict.fromkeys(step["policy"] for step in steps):
        mine = {step["batch"]: step for step in steps if step["policy"] == policy}
        rows.append([f"`{policy}`", *(f"{mine[b]['reads']:.2f} ({mine[b]['reads_share']:.3f})" for b in batches)])
    return markdown_table(["policy", *(f"batch {batch}" for batch in batches)], rows)


def _by_text(work: Path) -> str:
    texts = {name: {each["policy"]: each for each in _read(work / f"{name}.json")["policies"]} for name in SETS}
    rows = [
        [
            f"`{policy}`",
            *(
                f"{texts[name][policy]['avg_k']['value']:.3f}, {texts[name][policy]['kl_to_full_nats']['value']:.5f}"
                for name in SETS
            ),
        ]
        for policy in texts[SETS[0]]
        if policy != "full"
    ]
    return markdown_table(["policy", *SETS], rows)


def _validation(validation: dict[str, Any]) -> str:
    rule = validation["rule"]
    choices = [f"k = {k} below {limit:.2f}" for limit, k in zip(rule["thresholds_bits"], rule["k"], strict=False)]
    rows = [
        [
            each["set"],
            number(each["entropy_bits"], 3),
            number(each["effective_k"], 3),
            f"{100 * each['savings']['value']:.1f} %",
        ]
        for each in validation["sets"]
    ]
    rows += [
        [
            f"reported by others: {each['set']}",
            f"{each['entropy_bits']:.2f}",
            f"{each['effective_k']:.1f}",
            f"{100 * each['savings']:.1f} %",
        ]
        for each in validation["reported_by_others"]["rows"]
    ]
    return "\n\n".join(
        [
            f"In bits, of at most {validation['max_entropy_bits']:.2f}; {', '.join(choices)}, else {rule['k'][-1]}. "
            "The reported rows are Nemotron 3 Nano's, of 7 bits and top-6. Hooks on `transformers` and the engine "
            f"differ by at most {validation['hooks_and_engine_differ_bits']:.1e} bits.",
            markdown_table(["set", "entropy, bits", "effective k", "savings, a count"], rows),
        ]
    )
