# SPDX-License-Identifier: Apache-2.0
"""`calibrate`: from an engine, a text and a budget to a policy, and all that was measured on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_k_moe.calibration import bootstrap
from adaptive_k_moe.calibration.bootstrap import Interval
from adaptive_k_moe.calibration.by_layer import Damage
from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.calibration.evaluator import Evaluator, Scores
from adaptive_k_moe.calibration.kinds import ADAPTIVE_KINDS, CURVE_KINDS, ROUTER_KINDS, Kind
from adaptive_k_moe.calibration.laboratory import Budget, Laboratory, Measured, static
from adaptive_k_moe.calibration.recording import EvaluationCache, Recording, collect, engine_fingerprint
from adaptive_k_moe.calibration.routers import RouterRecording, can_collect, collect_routers
from adaptive_k_moe.calibration.search import Search, default_k_values
from adaptive_k_moe.calibration.solve import best_of
from adaptive_k_moe.calibration.timing import Timing, time_policies
from adaptive_k_moe.calibration.windows import Windows
from adaptive_k_moe.policy import Policy

Report = Callable[[str, int, int | None], None]
"""Progress: what is being done, how much of it, and of how much (None: not known before)."""


@dataclass(frozen=True)
class Point:
    """One policy, measured on the text that it was fitted on and on the reported part.

    Attributes:
        name: as in the tables and figures.
        kind: how it decides.
        policy: the rule; None for the control `random`.
        fit: scores on the part that it was fitted on.
        heldout: scores on the other part.
        full: the full model's scores on the other part.
    """

    name: str
    kind: Kind
    policy: Policy | None
    fit: Scores
    heldout: Scores
    full: Scores

    @property
    def perplexity_change(self) -> Interval:
        """On the reported part."""
        return bootstrap.perplexity_change(self.heldout.nll, self.full.nll)

    @property
    def kl(self) -> Interval:
        """On the reported part, nats a token."""
        return bootstrap.mean(self.heldout.kl)

    @property
    def avg_k(self) -> Interval:
        """On the reported part."""
        return bootstrap.mean(self.heldout.k.mean(axis=1))

    def to_json(self) -> dict[str, Any]:
        """Figures and rule; the windows' scores stay in the work folder."""
        return {
            "name": self.name,
            "kind": self.kind,
            "policy": None if self.policy is None else self.policy.model_dump(mode="json", exclude_none=True),
            "fit": {"avg_k": self.fit.avg_k, "perplexity": self.fit.perplexity, "kl": self.fit.mean_kl},
            "heldout": {
                "avg_k": self.avg_k.to_json(),
                "avg_k_by_layer": self.heldout.k.mean(axis=0).tolist(),
                "perplexity": self.heldout.perplexity,
                "perplexity_change": self.perplexity_change.to_json(),
                "kl": self.kl.to_json(),
                "top_token_agreement": float(self.heldout.agreement.mean()),
            },
        }


@dataclass(frozen=True, eq=False)
class Calibration:
    """What `calibrate` found.

    Attributes:
        chosen: the policy for the budget.
        opponent: fixed k by layer, at the lowest average k that is not below the chosen policy's.
        candidates: the best of each kind asked for, the chosen among them.
        curves: every kind at several budgets, for the figures; may be empty.
        timings: of the curves' policies; may be empty.
        budget: what was asked for.
        budget_met: on the reported part: "yes", "no", or "undecided" where the budget is inside the interval.
        damage: by layer and entropy band.
        k_values: the values of k used.
        expert_norms: [L][E] that policies of the kind `contribution` were measured with; None where they cannot be.
        fit_recording: the full model's, on the fitted part.
    """

    chosen: Point
    opponent: Point
    candidates: list[Point]
    curves: list[Point]
    timings: list[Timing]
    budget: Budget
    budget_met: str
    damage: Damage
    k_values: list[int]
    expert_norms: list[list[float]] | None
    fit_recording: Recording
    fit: Windows
    heldout: Windows

    def against_opponent(self) -> dict[str, Interval]:
        """Chosen minus opponent on the reported part, paired by window: below 0 the chosen is better."""
        return compare(self.chosen, self.opponent)

    def pairs(self) -> list[tuple[Point, Point, dict[str, Interval]]]:
        """Every candidate against the opponent, and every candidate against the one of the chosen kind."""
        own = next((point for point in self.candidates if point.policy == self.chosen.policy), self.chosen)
        against_own = [point for point in self.candidates if point is not own]
        return [(point, self.opponent, compare(point, self.opponent)) for point in self.candidates] + [
            (point, own, compare(point, own)) for point in against_own
        ]

    def to_json(self) -> dict[str, Any]:
        """Ready for `json.dump`."""
        return {
            "budget": {name: value for name, value in self.budget._asdict().items() if value is not None},
            "budget_met_on_heldout": self.budget_met,
            "k_values": self.k_values,
            "expert_norms": self.expert_norms,
            "texts": self.fit.names,
            "window": self.fit.window,
            "fit_windows": len(self.fit),
            "heldout_windows": len(self.heldout),
            "full_heldout_perplexity": self.chosen.full.perplexity,
            "chosen": self.chosen.to_json(),
            "opponent": self.opponent.to_json(),
            "chosen_minus_opponent": {name: gap.to_json() for name, gap in self.against_opponent().items()},
            "paired_differences": [
                {"policy": left.name, "minus": right.name, **{name: gap.to_json() for name, gap in gaps.items()}}
                for left, right, gaps in self.pairs()
            ],
            "candidates": [point.to_json() for point in self.candidates],
            "curves": [point.to_json() for point in self.curves],
            "timings": [timing.to_json() for timing in self.timings],
            "damage": {name: value.tolist() for name, value in asdict(self.damage).items()},
        }


def compare(left: Point, right: Point) -> dict[str, Interval]:
    """Left minus right on the reported part, paired by window."""
    return {
        "avg_k": bootstrap.difference(left.heldout.k.mean(axis=1), right.heldout.k.mean(axis=1)),
        "kl": bootstrap.difference(left.heldout.kl, right.heldout.kl),
        # A difference of log-perplexities is, to first order, a relative difference of perplexities.
        "log_perplexity": bootstrap.difference(left.heldout.nll, right.heldout.nll),
    }


def calibrate(
    evaluator: Evaluator,
    fit: Windows,
    heldout: Windows,
    budget: Budget,
    *,
    work_dir: Path,
    kinds: Sequence[Kind] | None = None,
    expert_norms: list[list[float]] | None = None,
    k_values: Sequence[int] | None = None,
    name: str = "balanced",
    num_bands: int = 6,
    refine_passes: int = 48,
    curve_points: int = 4,
    timing_rounds: int = 5,
    report: Report | None = None,
) -> Calibration:
    """Find the policy of the kinds asked for that does the least damage within a budget.

    Everything random is seeded and every measurement is kept in `work_dir`, so a run that was killed goes
    on where it was and ends with the same policy.

    Args:
        evaluator: the engine.
        fit: the text to choose on.
        heldout: the text to report on.
        budget: average k or rise of perplexity.
        work_dir: keeps recordings and scores.
        kinds: kinds to choose among, by their damage on `fit`; None is every adaptive one that the engine can be
            calibrated for.
        expert_norms: [L][E] that policies measured before go with; None measures them on `fit`.
        k_values: rising, the trained top-k last; None is `default_k_values`.
        name: the policy's.
        num_bands: entropy bands in each layer.
        refine_passes: passes over the text that refining may take.
        curve_points: budgets at which every kind is measured for the figures; 0 leaves them out.
        timing_rounds: rounds in which the curves' policies are timed; 0 leaves them out.
        report: called with each line of progress.

    Raises:
        CalibrationError: the budget cannot be used.
    """
    full_k = evaluator.full_k
    check_budget(budget, full_k)
    report = report or _ignore
    usable = can_collect(evaluator)
    if kinds is None:
        kinds = [kind for kind in ADAPTIVE_KINDS if usable or kind not in ROUTER_KINDS]
    routers = None
    if usable or any(kind in ROUTER_KINDS for kind in kinds):
        routers = _routers(evaluator, fit, work_dir / "fitted", expert_norms, report)
    fit_recording, on_fit = _laboratory(evaluator, fit, work_dir / "fitted", "fitted", report)
    _, on_heldout = _laboratory(evaluator, heldout, work_dir / "reported", "reported", report)
    search = Search(
        on_fit,
        fit_recording.entropy,
        k_values or default_k_values(full_k),
        routers=routers,
        num_bands=num_bands,
        refine_passes=refine_passes,
    )
    full = on_heldout.full().scores

    def point(measured: Measured, label: str) -> Point:
        candidate = measured.candidate
        return Point(
            label,
            candidate.kind,
            candidate.policy if candidate.share is None else None,
            measured.scores,
            on_heldout.measure(candidate).scores,
            full,
        )

    found_by_kind = [search.find(kind, budget) for kind in kinds]
    chosen = best_of(found_by_kind, budget)
    # The opponent gets no fewer experts than the chosen policy really uses.
    opponent = search.opponent(chosen.scores.avg_k)
    candidates = [point(found, found.candidate.kind) for found in found_by_kind]
    curve_kinds = [kind for kind in CURVE_KINDS if routers is not None or kind not in ROUTER_KINDS]
    curves = [point(found, label) for label, found in _curves(search, curve_kinds, curve_points, report)]
    timings: list[Timing] = []
    if curves and timing_rounds:
        policies = {p.name: p.policy for p in curves if p.policy is not None}
        timings = time_policies(
            evaluator,
            heldout,
            evaluator.tables(policies),
            list(policies),
            batches=(1, 16),
            rounds=timing_rounds,
            progress=lambda what: report(f"timing {what}", 0, None),
        )
    chosen_point = point(chosen, name)
    return Calibration(
        chosen=chosen_point,
        opponent=point(opponent, f"{name}_static"),
        candidates=candidates,
        curves=curves,
        timings=timings,
        budget=budget,
        budget_met=budget_met(chosen_point, budget),
        damage=search.damage,
        k_values=search.k_values,
        expert_norms=evaluator.expert_norms,
        fit_recording=fit_recording,
        fit=fit,
        heldout=heldout,
    )


def _ignore(what: str, done: int, total: int | None) -> None:
    """Tell nobody."""
    del what, done, total


def _routers(
    evaluator: Evaluator, fit: Windows, directory: Path, expert_norms: list[list[float]] | None, report: Report
) -> RouterRecording:
    """The fitted part's routers; the norms known already, or else those measured, become the evaluator's."""
    routers = collect_routers(
        evaluator, fit, directory, progress=lambda done: report("routers and expert norms", done, len(fit))
    )
    if expert_norms is not None:
        evaluator.expert_norms = expert_norms
        return replace(routers, norms=evaluator.tables({}).expert_norms.astype(np.float64))
    evaluator.expert_norms = routers.norms.tolist()
    return routers


def _laboratory(
    evaluator: Evaluator, windows: Windows, directory: Path, part: str, report: Report
) -> tuple[Recording, Laboratory]:
    """One part's recording, and what measures candidates on it."""
    recording = collect(
        evaluator,
        windows,
        directory,
        progress=lambda done: report(f"recordings of the {part} part", done, len(windows)),
    )
    identity = f"{engine_fingerprint(evaluator)}:{windows.fingerprint()}"
    cache = EvaluationCache(directory / "evaluations.jsonl", identity)
    laboratory = Laboratory(
        evaluator,
        windows,
        recording.reference,
        cache,
        on_evaluation=lambda what: report(f"evaluating on the {part} part: {what}", len(cache), None),
    )
    return recording, laboratory


def _curves(search: Search, kinds: Sequence[Kind], count: int, report: Report) -> list[tuple[str, Measured]]:
    """The kinds at the same budgets, from the lowest k to the full."""
    if count < 1:
        return []
    lowest, full_k = search.k_values[0], search.k_values[-1]
    targets = np.linspace(lowest, full_k, count + 2)[1:-1]
    found: list[tuple[str, Measured]] = []
    for index, target in enumerate(targets):
        for kind in kinds:
            report(f"curves: {kind.replace('_', ' ')}", index, len(targets))
            if kind != "static":
                found.append((f"{kind} {target:.2f}", search.find(kind, Budget(avg_k=float(target)), refined=False)))
    found += [(f"static {k}", search.laboratory.measure(static(k))) for k in range(lowest, full_k + 1)]
    return found


def check_budget(budget: Budget, full_k: int) -> None:
    """Refuse a budget that nothing can be fitted to.

    Raises:
        CalibrationError: saying what is wrong.
    """
    if (budget.avg_k is None) == (budget.perplexity_increase is None):
        raise CalibrationError("give one budget: --target_avg_k, --target_saving or --max_perplexity_increase.")
    if budget.avg_k is not None and not 1 <= budget.avg_k <= full_k:
        raise CalibrationError(
            f"an average k of {budget.avg_k:g} is no budget for this model: it lies between 1 and the trained "
            f"top-k, {full_k}."
        )
    if budget.perplexity_increase is not None and not 0 <= budget.perplexity_increase < 10:
        raise CalibrationError("a rise of perplexity is given in per cent, from 0 to below 1000.")


def budget_met(point: Point, budget: Budget) -> str:
    """Whether the reported part confirms a budget, by the interval of what was measured there."""
    if budget.avg_k is not None:
        measured, limit = point.avg_k, budget.avg_k
    else:
        assert budget.perplexity_increase is not None
        measured, limit = point.perplexity_change, budget.perplexity_increase
    if measured.high <= limit:
        return "yes"
    return "no" if measured.low > limit else "undecided"
