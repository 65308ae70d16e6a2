# SPDX-License-Identifier: Apache-2.0
"""The report of a calibration: figures as PNG, and one HTML file that needs no network.

The figures lie in the page as SVG data, the coloured text is plain HTML, and the page forbids itself any
connection. Every text that comes from outside (tokens, names) is escaped.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_k_moe.calibration.calibrate import Calibration, Point
from adaptive_k_moe.calibration.evaluator import Evaluator
from adaptive_k_moe.calibration.kinds import CURVE_KINDS, PER_LAYER, Kind
from adaptive_k_moe.calibration.timing import Phase, Timing
from adaptive_k_moe.calibration.windows import token_texts
from adaptive_k_moe.errors import DependencyError
from adaptive_k_moe.files import write_json
from adaptive_k_moe.policy import EntropyPolicy
from adaptive_k_moe.policy_kinds import KINDS


def _looks() -> dict[Kind, tuple[str, str]]:
    """Each kind's colour in figures, and its name."""
    looks = {"random": ("#c7a76c", "random tokens (control)")}
    for one, by_layer in PER_LAYER.items():
        kind = KINDS["fixed" if one == "static" else one]
        looks[one] = kind.colours[0], "entropy, one rule" if one == "entropy" else kind.label
        looks[by_layer] = kind.colours[1], f"{kind.label} by layer"
    return looks


COLOURS = {kind: colour for kind, (colour, _) in _looks().items()}
LABELS = {kind: label for kind, (_, label) in _looks().items()}
TEXT_WINDOWS = 4


def check_matplotlib() -> None:
    """Refuse now what `write_report` would refuse.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise DependencyError(
            "the report needs matplotlib: install it with pip install 'adaptive-k-moe[calibration]'."
        ) from None


def write_report(directory: Path, result: Calibration, evaluator: Evaluator) -> None:
    """Write ``index.html``, the figures and ``results.json``.

    Args:
        directory: made if missing.
        result: what to show.
        evaluator: runs the text that is shown in colour.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    check_matplotlib()
    import matplotlib

    directory.mkdir(parents=True, exist_ok=True)
    figures: list[tuple[str, str, Callable[[Any], None]]] = [
        (
            "entropy_by_layer",
            "Entropy of each router on the fitted text, and the thresholds of the best policy by layer",
            lambda figure: _histograms(figure, result),
        ),
        (
            "damage",
            "Where dropping experts does damage: KL divergence from one band of one layer at the lowest k, for each "
            "expert run that it saves",
            lambda figure: _damage(figure, result),
        ),
        ("k_by_layer", "Average k by layer on the reported text", lambda figure: _k_by_layer(figure, result)),
    ]
    if result.curves:
        figures.insert(
            0,
            (
                "quality_by_k",
                "Quality against average k on the reported text, with 95 % intervals over windows",
                lambda figure: _quality_by_k(figure, result),
            ),
        )
    if result.timings:
        figures.insert(
            1,
            (
                "quality_by_time",
                "Quality against measured time: the ratio to the full model's in interleaved rounds, with its 95 % "
                "interval over rounds",
                lambda figure: _quality_by_time(figure, result),
            ),
        )
    sections = []
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        for name, caption, draw in figures:
            svg = _draw(directory / f"{name}.png", name, draw)
            data = base64.b64encode(svg).decode()
            sections.append(
                f'<figure><img alt="{html.escape(caption)}" src="data:image/svg+xml;base64,{data}">'
                f"<figcaption>{html.escape(caption)}.</figcaption></figure>"
            )
    write_json(directory / "results.json", result.to_json())
    page = _page(result, "\n".join(sections), _coloured_text(result, evaluator))
    (directory / "index.html").write_text(page, encoding="utf-8")


def _draw(png: Path, name: str, draw: Callable[[Any], None]) -> bytes:
    """Draw once, save as PNG, and return the same figure as SVG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    figure.savefig(png, dpi=140)
    stream = io.BytesIO()
    # Fixed ids and no date: the same measurements give the same file.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def _of_kind(points: Sequence[Point], kind: str) -> list[Point]:
    return sorted((point for point in points if point.kind == kind), key=lambda point: point.heldout.avg_k)


def _quality_by_k(figure: Any, result: Calibration) -> None:
    figure.set_size_inches(11, 4.6)
    left, right = figure.subplots(1, 2)
    for kind in CURVE_KINDS:
        points = _of_kind(result.curves, kind)
        if not points:
            continue
        ks = [point.heldout.avg_k for point in points]
        style = {"color": COLOURS[kind], "label": LABELS[kind], "marker": "o", "markersize": 3.5, "linewidth": 1.2}
        _error_bars(left, ks, [point.kl for point in points], 1.0, style)
        _error_bars(right, ks, [point.perplexity_change for point in points], 100.0, style)
    for axis, value, scale in ((left, result.chosen.kl, 1.0), (right, result.chosen.perplexity_change, 100.0)):
        axis.plot(result.chosen.heldout.avg_k, value.value * scale, "*", color="black", markersize=11, zorder=9)
        axis.set_xlabel("average k")
        axis.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
    left.set_ylabel("KL divergence to the full model, nats a token")
    right.set_ylabel("change of perplexity, %")
    left.legend(frameon=False)
    left.set_title(f"star: {result.chosen.name} ({LABELS[result.chosen.kind]})", fontsize=9, loc="left")


def _error_bars(axis: Any, x: Sequence[float], values: Sequence[Any], scale: float, style: dict[str, Any]) -> None:
    middle = np.array([value.value for value in values]) * scale
    low, high = (np.array([getattr(value, end) for value in values]) * scale for end in ("low", "high"))
    axis.errorbar(x, middle, yerr=[np.maximum(middle - low, 0), np.maximum(high - middle, 0)], elinewidth=0.7, **style)


def _quality_by_time(figure: Any, result: Calibration) -> None:
    wanted: list[tuple[Phase, int]] = list(dict.fromkeys((timing.phase, timing.batch) for timing in result.timings))
    columns = 3 if len(wanted) > 4 else min(2, len(wanted))
    rows = -(-len(wanted) // columns)
    figure.set_size_inches(11, 3.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis in axes.flat[len(wanted) :]:
        axis.set_axis_off()
    for axis, (phase, batch) in zip(axes.flat, wanted, strict=False):
        times = {t.policy: t for t in result.timings if (t.phase, t.batch) == (phase, batch)}
        for kind in CURVE_KINDS:
            points = [point for point in _of_kind(result.curves, kind) if point.name in times]
            if points:
                _time_curve(axis, points, times, kind)
        axis.axvline(1, color="#cccccc", linewidth=0.8, zorder=0)
        axis.set_title(f"{phase}, batch {batch}", fontsize=9)
        axis.set_xlabel("time / time of the full model")
    for axis in axes[:, 0]:
        axis.set_ylabel("KL to full, nats")
    axes.flat[0].legend(frameon=False, fontsize=7)


def _time_curve(axis: Any, points: Sequence[Point], times: dict[str, Timing], kind: str) -> None:
    ratios = [times[point.name].ratio for point in points]
    middle = np.array([ratio.value for ratio in ratios])
    spread = [middle - [ratio.low for ratio in ratios], np.array([ratio.high for ratio in ratios]) - middle]
    axis.errorbar(
        middle,
        [point.kl.value for point in points],
        xerr=np.maximum(spread, 0),
        color=COLOURS[kind],
        label=LABELS[kind],
        marker="o",
        markersize=3,
        linewidth=1,
        elinewidth=0.5,
    )


def _entropy_policy(result: Calibration) -> tuple[str, EntropyPolicy | None]:
    """The entropy policy whose thresholds are shown: the chosen one, or the best by layer."""
    for point in (result.chosen, *_of_kind(result.candidates, "entropy_per_layer"), *result.candidates):
        if point.kind in ("entropy", "entropy_per_layer") and isinstance(point.policy, EntropyPolicy):
            return point.name, point.policy
    return "", None


def _histograms(figure: Any, result: Calibration) -> None:
    entropy = result.fit_recording.entropy
    num_layers = entropy.shape[-1]
    columns = min(6, num_layers)
    rows = -(-num_layers // columns)
    figure.set_size_inches(11, 2.2 * rows + 0.3)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    bins = np.linspace(0, float(entropy.max()) * 1.02, 50)
    name, policy = _entropy_policy(result)
    for layer, axis in enumerate(axes.flat):
        if layer >= num_layers:
            axis.set_axis_off()
            continue
        axis.hist(np.asarray(entropy[..., layer]).ravel(), bins=bins, color="#9ecae1", density=True)
        if policy is not None:
            for limit in policy.choices(layer, result.k_values[-1]).thresholds:
                axis.axvline(limit, color="#d62728", linewidth=1)
        axis.set_title(f"layer {layer}", fontsize=8)
        axis.set_yticks([])
    figure.supxlabel(f"entropy, nats{f'; red: thresholds of {name}' if name else ''}", fontsize=9)


def _damage(figure: Any, result: Calibration) -> None:
    damage = result.damage
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = damage.kl[:, :, 0] / damage.saved[:, :, 0]
    figure.set_size_inches(7, 0.35 * len(cost) + 1.4)
    axis = figure.subplots()
    image = axis.imshow(cost, aspect="auto", cmap="magma_r")
    axis.set_xlabel("band of the layer's tokens by entropy, lowest first")
    axis.set_ylabel("layer")
    axis.set_xticks(range(cost.shape[1]))
    axis.set_yticks(range(len(cost)) if len(cost) <= 16 else range(0, len(cost), 4))
    figure.colorbar(image, ax=axis, label="nats a token for each\nunit of average k saved")


def _k_by_layer(figure: Any, result: Calibration) -> None:
    points = [result.chosen, result.opponent, *(p for p in result.candidates if p.policy != result.chosen.policy)]
    table = np.stack([point.heldout.k.mean(axis=0) for point in points])
    figure.set_size_inches(9, 0.4 * len(table) + 1.2)
    axis = figure.subplots()
    image = axis.imshow(table, aspect="auto", cmap="viridis", vmin=1, vmax=result.k_values[-1])
    axis.set_yticks(range(len(points)), [f"{p.name} ({LABELS[p.kind]})" for p in points])
    axis.set_xlabel("layer")
    if table.shape[1] <= 16:
        axis.set_xticks(range(table.shape[1]))
        middle = (1 + result.k_values[-1]) / 2
        for (row, layer), k in np.ndenumerate(table):
            axis.text(layer, row, f"{k:.2f}", ha="center", va="center", color="black" if k > middle else "white")
    figure.colorbar(image, ax=axis, label="average k")


def _coloured_text(result: Calibration, evaluator: Evaluator) -> str:
    """Some windows of the reported text, each token in the colour of its average k."""
    if result.chosen.policy is None:
        return ""
    picks = np.unique(np.linspace(0, len(result.heldout) - 1, min(TEXT_WINDOWS, len(result.heldout))).astype(np.int64))
    windows = result.heldout.take(picks)
    tables = evaluator.tables({"chosen": result.chosen.policy})
    parts: list[str] = []
    lowest, full_k = result.k_values[0], result.k_values[-1]
    for batch in evaluator.batches(windows, tables, 1):
        for offset in range(len(batch.k)):
            texts = token_texts(evaluator.tokenizer, windows.tokens[batch.windows.start + offset].tolist())
            spans = [
                _token(text, batch.k[offset, i], batch.entropy[offset, i], lowest, full_k)
                for i, text in enumerate(texts)
            ]
            parts.append(f'<p class="text">{"".join(spans)}</p>')
    return "\n".join(parts)


def _token(text: str, k: Any, entropy: Any, lowest: int, full_k: int) -> str:
    average = float(np.mean(k))
    share = (average - lowest) / max(full_k - lowest, 1)
    # From pale blue (few experts) to orange (all of them); dark text is readable on every shade.
    low, high = np.array([222, 235, 247]), np.array([253, 150, 80])
    red, green, blue = (int(value) for value in low + share * (high - low))
    layers = "\n".join(
        f"layer {i}: k {own}, {value:.3f} nats" for i, (own, value) in enumerate(zip(k, entropy, strict=True))
    )
    note = html.escape(f"average k {average:.2f}\n{layers}", quote=True)
    shown = html.escape(text).replace("\n", "&#8629;<br>")
    return f'<span style="background:rgb({red},{green},{blue})" data-note="{note}">{shown}</span>'


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1150px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; } th, td { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5em 0; } img { max-width: 100%; } figcaption { color: #555; font-size: .9em; }
.text { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; border: 1px solid #ddd; padding: .8em; }
.text span { position: relative; }
.text span:hover { outline: 1px solid #222; }
.text span:hover::after { content: attr(data-note); position: absolute; left: 0; top: 1.7em; z-index: 9;
  white-space: pre; background: #222; color: #fff; padding: .4em .7em; font-size: 12px; line-height: 1.4; }
"""


def _page(result: Calibration, figures: str, text: str) -> str:
    budget = result.budget
    asked = (
        f"an average k of at most {budget.avg_k:g}"
        if budget.avg_k is not None
        else f"a perplexity at most {100 * (budget.perplexity_increase or 0):g} % higher"
    )
    gap = result.against_opponent()["kl"]
    verdict = (
        "does less damage than" if gap.high < 0 else "does more damage than" if gap.low > 0 else "is no better than"
    )
    rows = "\n".join(_row(point) for point in _table_points(result))
    names = html.escape(", ".join(result.fit.names))
    # Same-origin scripts, styles from elsewhere, fonts, connections: all refused by the page itself.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width">
<title>Adaptive k: {html.escape(result.chosen.name)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(result.chosen.name)}: {html.escape(LABELS[result.chosen.kind])}</h1>
<p>Asked for {asked}; met on the reported text: <b>{result.budget_met}</b>. Chosen on {len(result.fit)} windows of
{result.fit.window} tokens of {names}, reported on {len(result.heldout)} windows that the choice did not see, where the
full model's perplexity is {result.chosen.full.perplexity:.3f}. By KL divergence it {verdict} the best fixed k by
layer with no fewer experts: {gap.value:+.5f} nats ({gap.low:+.5f} to {gap.high:+.5f}).</p>
<table>
<tr><th>policy</th><th>average k</th><th>experts saved</th><th>perplexity change, 95 %</th>
<th>KL to full, nats, 95 %</th><th>same top token</th></tr>
{rows}
</table>
<p>Experts saved is a count. What it is worth in time is in the second figure and in <code>adaptive-k eval</code>.</p>
<h2>Figures</h2>
{figures}
<h2>Text under {html.escape(result.chosen.name)}</h2>
<p>Pale tokens ran few experts, orange ones all. Point at a token for its k and entropies.</p>
{text}
</body>
</html>
"""


def _table_points(result: Calibration) -> list[tuple[str, Point]]:
    return [
        (result.chosen.name, result.chosen),
        (result.opponent.name, result.opponent),
        *((f"best {LABELS[point.kind]}", point) for point in result.candidates),
    ]


def _row(named: tuple[str, Point]) -> str:
    name, point = named
    change, kl = point.perplexity_change, point.kl
    saved = 1 - point.heldout.avg_k / point.full.avg_k
    cells = (
        name,
        f"{point.heldout.avg_k:.3f}",
        f"{saved:.1%}",
        f"{change.value:+.2%} ({change.low:+.2%} to {change.high:+.2%})",
        f"{kl.value:.5f} ({kl.low:.5f} to {kl.high:.5f})",
        f"{point.heldout.agreement.mean():.1%}",
    )
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
