# SPDX-License-Identifier: Apache-2.0
"""The table at the end of a run, from the rows alone.

PYTHONPATH=tests/support python tests/gpu/first_run/report.py OUT_DIR
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from rows import FAILED, NOT_RUN, PASSED, Rows

LONGEST = 11_900
"""Characters, so that the end of a log of 12,000 has it whole."""
ERRORS = 6
Row = dict[str, Any]


def stages(rows: list[Row]) -> list[str]:
    """What passed in each stage, then the first failure and the next ones."""
    by_stage: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_stage[row["stage"]].append(row)
    lines = [f"{'stage':10} {'passed':>7} {'failed':>7} {'not run':>8}"]
    for stage, found in by_stage.items():
        counts = [len({row["case"] for row in found if row["outcome"] == name}) for name in (PASSED, FAILED, NOT_RUN)]
        lines.append(f"{stage:10} {counts[0]:7} {counts[1]:7} {counts[2]:8}")
    for outcome, title in ((FAILED, "FIRST FAILURE"), (NOT_RUN, "NOT RUN")):
        wrong = list({(row["stage"], row["case"]): row for row in reversed(rows) if row["outcome"] == outcome}.values())
        for number, row in enumerate(reversed(wrong)):
            if number == ERRORS:
                lines.append(f"  and {len(wrong) - ERRORS} more, in results.jsonl")
                break
            error, longest = " ".join(str(row.get("error")).split()), 400 if number == 0 else 110
            lines.append(f"{title if number == 0 else '  then'}: {row['stage']}: {row['case']}: {error[:longest]}")
    return lines


def device(rows: list[Row]) -> tuple[list[str], float | None, float | None]:
    """What it ran on, and the copy bandwidth in GB/s and the peak in TFLOP/s that were measured."""
    lines, copy, peak = [], None, None
    for row in rows:
        if row["case"] == "device" and "name" in row:
            versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
            lines.append(f"{row['name']}, compute capability {row['capability']}, CUDA {row['driver']}; {versions}")
        if row["case"] == "library" and "path" in row:
            lines.append(f"library {row['how']}, sha256 {row['sha256'][:12]}")
        if "gb_s" in row:
            copy = max(copy or 0.0, row["gb_s"])
        if "tflop_s" in row:
            peak = max(peak or 0.0, row["tflop_s"])
    return lines, copy, peak


def number(value: float | None, width: int) -> str:
    """With one digit behind the point where there is room."""
    if value is None:
        return "-".rjust(width)
    text = f"{value:.1f}"
    return (text if len(text) <= width else f"{value:.0f}").rjust(width)


def measured(row: Row | None, copy: float | None, peak: float | None) -> str:
    """Microseconds, GB/s and the share of the copy's, TFLOP/s and the share of the peak."""
    us = row["us"] if row else None
    gb_s, tflop_s = (row[name] / us / unit if row and us else None for name, unit in (("bytes", 1e3), ("flop", 1e6)))
    shares = [
        f"{100 * value / whole:3.0f}" if value and whole else "  -" for value, whole in ((gb_s, copy), (tflop_s, peak))
    ]
    rates = ["-" if value is None else f"{value:.0f}" for value in (gb_s, tflop_s)]
    return f"{number(us, 7)} {rates[0]:>4} {shares[0]} {rates[1]:>3} {shares[1]}"


def speed(rows: list[Row], copy: float | None, peak: float | None) -> list[str]:
    """A line for each layer, format and number of tokens: its ks after one another, then the peers."""
    ours = {(r["layer"], r["weights"], r["tokens"], r["k"]): r for r in rows if "weights" in r and "us" in r}
    peers = {(r["layer"], r["peer"], r["tokens"], r["k"]): r["us"] for r in rows if "peer" in r and "us" in r}
    if not ours and not peers:
        return []
    lines = ["D decode, P prefill; for each k: us, GB/s, % of copy, TFLOP/s, % of peak | peers, bfloat16, us | time"]
    layers = dict.fromkeys((key[0], key[1]) for key in ours) or dict.fromkeys((key[0], "element") for key in peers)
    for layer, weights in layers:
        ks = list(dict.fromkeys(key[3] for key in (*ours, *peers) if key[0] == layer))
        fixed = [k for k in ks if "/" not in k]
        title = f"{layer} {'bfloat16' if weights == 'element' else weights}: k = {', '.join(ks)}"
        columns = " ".join(f"torch triton k={k}" for k in fixed)
        lines.append(f"{title} | {columns} | {', '.join(ks[1:])} over {ks[0]}")
        for tokens in dict.fromkeys(key[2] for key in (*ours, *peers) if key[0] == layer):
            found = [ours.get((layer, weights, tokens, k)) for k in ks]
            path = next((row["path"][0].upper() for row in found if row), "-")
            times = [number(peers.get((layer, peer, tokens, k)), 6) for k in fixed for peer in ("torch", "triton")]
            first = found[0]
            over = [f"{row['us'] / first['us']:.2f}" if row and first else "-" for row in found[1:]]
            parts = [
                f"{tokens:4} {path}",
                *(measured(row, copy, peak) for row in found),
                " ".join(times),
                " ".join(over),
            ]
            lines.append(" |".join(parts))
    return lines


def profiled(rows: list[Row]) -> list[str]:
    """A line for each kernel."""
    lines = []
    for row in rows:
        if row["stage"] == "profile" and "ns" in row:
            shares = f"memory {row.get('dram_percent', 0):3.0f} %  issue {row.get('issue_percent', 0):3.0f} %"
            lines.append(f"{row['case'][:60]:60} {row['ns'] / 1e3:9.1f} us  {shares}")
    return lines


def table(rows: list[Row], longest: int = LONGEST) -> str:
    """The whole text, no longer than so many characters; what does not fit is counted."""
    described, copy, peak = device(rows)
    if copy or peak:
        rates = [
            f"copies at {copy:.0f} GB/s" if copy else "",
            f"bfloat16 products at {peak:.0f} TFLOP/s" if peak else "",
        ]
        described.append("measured here: " + ", ".join(filter(None, rates)))
    lines = [*described, *stages(rows), *speed(rows, copy, peak), *profiled(rows)]
    kept: list[str] = []
    length = 0
    for number, line in enumerate(lines):
        length += len(line) + 1
        if length > longest - 60:
            kept.append(f"and {len(lines) - number} more lines: report.py on the folder prints them")
            break
        kept.append(line)
    return "\n".join(kept) + "\n"


if __name__ == "__main__":
    print(table(Rows(Path(sys.argv[1])).read(), sys.maxsize), end="")
