# SPDX-License-Identifier: Apache-2.0
"""`calibrate_decode`: the policy that reads few experts in decode steps of a batch, and its opponents at equal reads.

Every candidate is measured in decode steps (``decoding.py``), after a prompt that follows the rule for prompts. Damage
is the mean KL divergence from the full model, as in ``search.py``. The method:

1. One number for all layers: a policy's numbers are multiplied by a common factor until the budget is used up.
2. By layer: each layer's number is moved alone, which gives its damage for an expert less to read. Layers whose
   reads are dearer than the average get a lower number, those whose reads are cheaper a higher one, and step 1 brings
   the reads back to the budget. What does less damage is kept; where it does not, steps halve.

Opponents are found in the same way: rules of one token by steps 1 and 2, and fixed k by layer along the path that gives
up the cheapest experts first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.calibration.by_layer import static_by_layer
from adaptive_k_moe.calibration.decoding import MAX_STEPS, DecodeReader, Decoding
from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.calibration.evaluator import Evaluator, Scores
from adaptive_k_moe.calibration.kinds import Kind
from adaptive_k_moe.calibration.laboratory import Budget, Candidate, Laboratory, Measured
from adaptive_k_moe.calibration.recording import EvaluationCache, engine_fingerprint
from adaptive_k_moe.calibration.solve import CLOSE, best_of, excess, keeps, time_share
from adaptive_k_moe.calibration.timing import StepTime, Timing, time_policies
from adaptive_k_moe.calibration.windows import Windows
from adaptive_k_moe.policy import (
    FULL,
    EntropyChoices,
    EntropyPolicy,
    FixedPolicy,
    PhasesPolicy,
    Policy,
    PolicyTables,
    RatioChoices,
    RatioPolicy,
    SharedChoices,
    SharedPolicy,
    TopPPolicy,
)
from adaptive_k_moe.policy_kinds import KINDS

Report = Callable[[str, int, int | None], None]
Factors = Sequence[float]

LARGEST_STEP = 1.0
"""By how much a layer's number is moved at once in step 2, as a natural logarithm."""

PROBE = 0.3
"""By how much it is moved to see what that does."""

FURTHEST = 10.0
"""How far step 1 looks for a rule that uses the budget up, as a natural logarithm of the factor: a small number may
change nothing at first."""

TIME_CORRECTIONS = 2
"""How often a policy that was found for a time is timed, and the search repeated with what the fit missed."""

TIME_CLOSE = 0.005
"""A share of time so near to its target meets it."""


@dataclass(frozen=True)
class DecodeCalibration:
    """What `calibrate_decode` found.

    Attributes:
        name: the policy's.
        policies: the policy with this name, its opponents at equal reads NAME_static and NAME_per_token and, where
            times were taken, those at equal time, NAME_static_time and NAME_per_token_time.
        fit: scores of each on the part that it was fitted on.
        reported: all of them, `full` first, in decode steps of the other part.
        budget: what was asked for.
        budget_met: on the reported part, "yes" or "no"; of a time, whether it lies above the interval's lower end.
        step_time: what steps take on this machine, where times were taken.
    """

    name: str
    policies: dict[str, PhasesPolicy]
    fit: dict[str, Scores]
    reported: list[Decoding]
    budget: Budget
    budget_met: str
    step_time: StepTime | None = None

    def to_json(self) -> dict[str, Any]:
        """Ready for `json.dump`."""
        return {
            "budget": {name: value for name, value in self.budget._asdict().items() if value is not None},
            "budget_met_on_reported": self.budget_met,
            "batch": self.reported[0].batch,
            "policies": {
                name: policy.model_dump(mode="json", exclude_none=True) for name, policy in self.policies.items()
            },
            "fit": {
                name: {"avg_k": scores.avg_k, "reads": scores.avg_reads, "kl": scores.mean_kl}
                for name, scores in self.fit.items()
            },
            "reported": [each.to_json() for each in self.reported],
            "step_time": None if self.step_time is None else asdict(self.step_time),
        }


class DecodeLaboratory(Laboratory):
    """Measures candidates in decode steps, each once.

    Args:
        reader: the text.
        evaluator: the engine.
        prefill: rule of the prompts.
        directory: keeps scores.
        report: told about progress.
    """

    def __init__(
        self, reader: DecodeReader, evaluator: Evaluator, prefill: Any, directory: Path, report: Report
    ) -> None:
        identity = f"{engine_fingerprint(evaluator)}:{reader.windows.fingerprint()}:{reader.batch}:{reader.prompt}"
        cache = EvaluationCache(directory / "decode.jsonl", identity)
        super().__init__(
            evaluator,
            reader.windows,
            None,
            cache,
            on_evaluation=lambda what: report(
                f"decode steps of {reader.batch}, {directory.name} part: {what}", len(cache), None
            ),
        )
        self._reader = reader
        self._prefill = prefill

    def decode(self, kind: Kind, rule: Any) -> Measured:
        """A rule of decode, behind the rule of the prompts."""
        return self.measure(Candidate(kind, PhasesPolicy(kind="phases", prefill=self._prefill, decode=rule)))

    def full(self) -> Measured:
        """The trained top-k in both phases."""
        return self.measure(Candidate("static", FixedPolicy(kind="fixed", k=self.evaluator.full_k)))

    def _read(self, tables: PolicyTables, rows: int | npt.NDArray[np.int32]) -> Scores:
        assert isinstance(rows, int)
        return self._reader.scores(tables, rows)


def scaled(rule: Any, factors: Factors, full_k: int) -> Any:
    """The rule with each layer's numbers multiplied: a larger factor saves more.

    A price and a ratio are numbers that an expert has to reach; of a share to reach it is what may be missing.

    Args:
        rule: of any kind but `fixed`.
        factors: [L], or one for a rule that is the same in all layers.
        full_k: the trained top-k.
    """

    def moved(choices: Any, factor: float) -> dict[str, Any]:
        match choices:
            case EntropyChoices():
                return {"thresholds": [_short(limit * factor) for limit in choices.thresholds], "k": choices.k}
            case SharedChoices():
                return {"price": _short((choices.price or 0.0) * factor)}
            case RatioChoices():
                return {"ratio": min(1.0, _short(choices.ratio * factor))}
            case _:
                return {"p": max(1e-6, 1 - _short(min(1.0, (1 - choices.p) * factor)))}

    def content(layer: int, factor: float) -> dict[str, Any]:
        choices = rule.choices(layer, full_k)
        limits = choices.model_dump(include={"k_min", "k_max"}, exclude_none=True)
        return {**moved(choices, factor), **limits}

    made: dict[str, Any] = {"kind": rule.kind}
    if len(set(factors)) == 1 and not rule.layers:
        made |= content(0, factors[0])
    else:
        made["layers"] = {layer: content(layer, factor) for layer, factor in enumerate(factors)}
    return type(rule).model_validate(made)


def meet(
    laboratory: DecodeLaboratory, rule: Any, start: Factors, budget: Budget, *, passes: int = 10
) -> Measured | None:
    """Step 1: the rule, scaled from `start` by one factor more, that uses a budget up; None where none keeps it.

    Args:
        laboratory: measures.
        rule: as for `scaled`.
        start: [L] factors to begin with.
        budget: the target.
        passes: most candidates to measure.
    """
    low: tuple[float, float] | None = None
    high: tuple[float, float] | None = None
    x, step = 0.0, 0.5
    moved_low: bool | None = None
    kept: list[tuple[float, Measured]] = []
    for _ in range(passes):
        factors = [factor * math.exp(x) for factor in start]
        found = laboratory.decode(rule.kind, scaled(rule, factors, laboratory.evaluator.full_k))
        value = excess(laboratory, found, budget)
        if keeps(laboratory, found, budget):
            kept.append((abs(value), found))
            if abs(value) <= CLOSE:
                break
        # An end that stays twice counts half (the Illinois rule, as in `solve`).
        if value > 0:
            high = high if high is None or not moved_low else (high[0], high[1] / 2)
            low = (x, value)
        else:
            low = low if low is None or moved_low is not False else (low[0], low[1] / 2)
            high = (x, value)
        moved_low = value > 0
        if low is not None and high is not None:
            share = min(max(low[1] / (low[1] - high[1]), 0.1), 0.9)
            x = low[0] + share * (high[0] - low[0])
        else:
            x, step = x + math.copysign(step, value), step * 2
            if abs(x) > FURTHEST:
                break
    return min(kept, key=lambda item: item[0])[1] if kept else None


def by_layer(laboratory: DecodeLaboratory, rule: Any, found: Measured, budget: Budget, rounds: int) -> Measured:
    """Step 2: layers' numbers moved towards the same damage for each expert less to read.

    Args:
        laboratory: measures.
        rule: what `found` is, or the same kind by layer.
        found: a policy that keeps the budget.
        budget: the target.
        rounds: how often numbers are moved.
    """
    layers, full_k = laboratory.evaluator.num_layers, laboratory.evaluator.full_k
    best, here = found, rule
    direction: npt.NDArray[np.float64] | None = None
    step = 1.0
    for _ in range(rounds):
        if direction is None:
            prices = []
            for layer in range(layers):
                factors = [math.exp(PROBE) if each == layer else 1.0 for each in range(layers)]
                probe = laboratory.decode(rule.kind, scaled(here, factors, full_k)).scores
                saved = best.scores.avg_reads - probe.avg_reads
                prices.append((probe.mean_kl - best.scores.mean_kl) / saved if saved > 0 else math.inf)
            usual = float(np.median([price for price in prices if 0 < price < math.inf] or [1.0]))
            # A layer that saves nothing, or costs nothing, is moved as far as one that costs a lot, or little.
            gaps = np.log(np.clip(np.array(prices) / usual, math.exp(-LARGEST_STEP), math.exp(LARGEST_STEP)))
            direction = gaps.mean() - gaps
        moved = meet(laboratory, here, list(np.exp(step * direction)), budget, passes=5)
        if moved is not None and best_of([best, moved], budget) is moved:
            best, direction = moved, None
            assert isinstance(moved.candidate.policy, PhasesPolicy)
            here = moved.candidate.policy.decode
        else:
            step /= 2
    return best


def static_at(laboratory: DecodeLaboratory, budget: Budget) -> Measured:
    """The fixed k, by layer or the same everywhere, that uses a budget up.

    The next one on the path would save more than is asked for, or lose more than is allowed.

    Args:
        laboratory: measures.
        budget: the target.
    """
    layers, full_k = laboratory.evaluator.num_layers, laboratory.evaluator.full_k

    def measure(ks: Sequence[int]) -> Measured:
        if len(set(ks)) == 1:
            return laboratory.decode("static", FixedPolicy(kind="fixed", k=ks[0]))
        return laboratory.decode("static_per_layer", static_by_layer(ks).policy)

    same = [measure([k] * layers) for k in range(1, full_k + 1)]
    alone = [
        [measure([k if at == layer else full_k for at in range(layers)]).scores for k in range(1, full_k + 1)]
        for layer in range(layers)
    ]
    ks, path = [full_k] * layers, [[full_k] * layers]
    while any(k > 1 for k in ks):
        costs = {}
        for layer, k in enumerate(ks):
            if k > 1:
                before, after = alone[layer][k - 1], alone[layer][k - 2]
                costs[layer] = (after.mean_kl - before.mean_kl) / max(before.avg_reads - after.avg_reads, 1e-9)
        ks[min(costs, key=lambda layer: costs[layer])] -= 1
        path.append(list(ks))
    first, last = 0, len(path) - 1  # reads fall along the path, and damage rises
    while first < last:
        middle = (first + last + 1) // 2
        first, last = (middle, last) if excess(laboratory, measure(path[middle]), budget) >= 0 else (first, middle - 1)
    best = measure(path[first])
    if budget.bounds_damage:
        return best_of([best, *(found for found in same if keeps(laboratory, found, budget))], budget)
    limit = excess(laboratory, best, budget)
    return best_of([best, *(found for found in same if 0 <= excess(laboratory, found, budget) <= limit)], budget)


def per_token_rules(policies: Mapping[str, Policy], norms: bool) -> list[Any]:
    """Rules of one token to begin with: one number for all layers, and those of a policy file.

    Args:
        policies: of the engine and of the policy file.
        norms: whether the norms of the experts' outputs are known.
    """
    plain: list[Any] = [RatioPolicy(kind="ratio", ratio=0.1), TopPPolicy(kind="top_p", p=0.8)]
    for policy in policies.values():
        if isinstance(policy, (FixedPolicy, PhasesPolicy)) or KINDS[policy.kind].sees_step:
            continue
        if isinstance(policy, EntropyPolicy):
            choices: list[Any] = (
                [*policy.layers.values()] if policy.thresholds is None else [policy, *policy.layers.values()]
            )
            if not any(each.thresholds for each in choices):
                continue  # a fixed k by layer has no number to move
        if norms or not KINDS[policy.kind].uses_norms:
            plain.append(policy)
    return plain


def check_decode_budget(budget: Budget) -> None:
    """Refuse a budget that decode steps cannot be fitted to.

    Raises:
        CalibrationError: saying what is wrong.
    """
    if budget.reads is not None and not 0 < budget.reads < 1:
        raise CalibrationError(
            f"--target_reads is a share of what the full model reads, between 0 and 1, not {budget.reads:g}."
        )
    if budget.time is not None and not 0 < budget.time < 1:
        raise CalibrationError(
            f"--target_time is a share of the full model's time of a decode step, between 0 and 1, not {budget.time:g}."
        )
    if budget.perplexity_increase is not None and not 0 <= budget.perplexity_increase < 10:
        raise CalibrationError("a rise of perplexity is given in per cent, from 0 to below 1000.")


def calibrate_decode(
    evaluator: Evaluator,
    fit: Windows,
    heldout: Windows,
    budget: Budget,
    *,
    batch: int,
    work_dir: Path,
    name: str = "balanced",
    known: Mapping[str, Policy] | None = None,
    prefill: Any = None,
    rounds: int = 4,
    max_steps: int = MAX_STEPS,
    timing_rounds: int = 5,
    report: Report | None = None,
) -> DecodeCalibration:
    """Find the prices that do the least damage within a budget in decode steps of a batch.

    Args:
        evaluator: the engine.
        fit: the text to choose on.
        heldout: the text to report on.
        budget: a share of the full model's reads or time, or a rise of perplexity.
        batch: sequences in a step.
        work_dir: keeps scores, so that a run that was killed goes on where it was.
        name: the policy's.
        known: policies whose rules of one token are opponents, thresholds in nats.
        prefill: rule of the prompts; None is the trained top-k.
        rounds: how often layers' numbers are moved.
        max_steps: most decode steps of a pass over the fitted part; the reported part is read with `MAX_STEPS`.
        timing_rounds: rounds in which policies are timed; 0 takes no times.
        report: told about progress.

    Raises:
        CalibrationError: the budget cannot be used or met, or the engine or the text is too small for the batch.
    """
    check_decode_budget(budget)
    if budget.time is not None and not timing_rounds:
        raise CalibrationError("--target_time needs times: give --timing_rounds 1 or more.")
    report = report or (lambda _what, _done, _total: None)
    prefill = prefill or FixedPolicy(kind="fixed", k=evaluator.full_k)
    on_fit, on_heldout = (
        DecodeLaboratory(
            DecodeReader(evaluator, part, batch, max_steps=steps), evaluator, prefill, work_dir / folder, report
        )
        for part, folder, steps in ((fit, "fitted", max_steps), (heldout, "reported", MAX_STEPS))
    )

    def times(part: Windows, policies: Mapping[str, Policy]) -> list[Timing]:
        report("timing", 0, None)
        tables = evaluator.tables(policies)
        return time_policies(
            evaluator, part, tables, list(policies), batches=(batch,), rounds=timing_rounds, phases=("decode",)
        )

    if timing_rounds:
        probes = time_probes(evaluator.full_k)
        by_name = times(fit, probes)
        sharing = [timing.policy != FULL and probes[timing.policy].kind == "shared" for timing in by_name]
        on_fit.step_time = StepTime.fit(by_name, sharing)
    chosen = share_within(on_fit, budget, rounds)
    equal = {"": Budget()}
    for corrections in range(TIME_CORRECTIONS + 1 if timing_rounds else 0):
        timing = next(each for each in times(fit, {name: chosen.candidate.policy}) if each.policy == name)
        equal["_time"] = Budget(time=timing.ratio.value)
        if (
            budget.time is None
            or corrections == TIME_CORRECTIONS
            or abs(timing.ratio.value - budget.time) <= TIME_CLOSE
        ):
            break
        missed = timing.ratio.value - time_share(on_fit, chosen)
        chosen = share_within(on_fit, Budget(time=budget.time - missed), rounds)
    equal[""] = Budget(reads=chosen.scores.avg_reads / on_fit.full().scores.avg_reads)
    found = {name: chosen}
    for suffix, same in equal.items():
        found[f"{name}_static{suffix}"] = static_at(on_fit, same)
        per_token = per_token_within(on_fit, same, known or {}, rounds)
        if per_token is not None:
            found[f"{name}_per_token{suffix}"] = per_token
    policies = {label: item.candidate.policy for label, item in found.items()}
    timings = times(heldout, policies) if timing_rounds else []
    full = on_heldout.full().scores
    reported = [
        Decoding(
            label,
            batch,
            full if label == FULL else on_heldout.measure(found[label].candidate).scores,
            full,
            next((timing for timing in timings if timing.policy == label), None),
        )
        for label in (FULL, *found)
    ]
    own = reported[1]
    if budget.reads is not None:
        met = own.reads_share <= budget.reads + CLOSE
    elif budget.time is not None:
        met = own.timing is not None and own.timing.ratio.low <= budget.time
    else:
        met = own.perplexity_change.value <= (budget.perplexity_increase or 0.0)
    return DecodeCalibration(
        name,
        {label: policy for label, policy in policies.items() if isinstance(policy, PhasesPolicy)},
        {label: item.scores for label, item in found.items()},
        reported,
        budget,
        "yes" if met else "no",
        on_fit.step_time,
    )


def time_probes(full_k: int) -> dict[str, Policy]:
    """Policies that differ in what a decode step reads and runs, to learn what either takes."""
    half = max(1, full_k // 2)
    fixed: list[Policy] = [FixedPolicy(kind="fixed", k=k) for k in sorted({1, half})]
    shared: list[Policy] = [
        SharedPolicy(kind="shared", price=price, k_min=1, k_max=k_max)
        for price in (1e-6, 0.05, 0.5)
        for k_max in sorted({half, full_k})
    ]
    return {f"probe {number}": policy for number, policy in enumerate([*fixed, *shared])}


def share_within(laboratory: DecodeLaboratory, budget: Budget, rounds: int) -> Measured:
    """The `shared` rule, by layer, that does the least damage within a budget.

    A lower `k_max` saves time and no reads, so others than the trained top-k are tried where time is the budget.

    Args:
        laboratory: measures.
        budget: the target.
        rounds: how often layers' prices are moved.

    Raises:
        CalibrationError: no price keeps the budget.
    """
    full_k = laboratory.evaluator.full_k
    k_max = sorted({full_k, -(-3 * full_k // 4), -(-full_k // 2)} if budget.time is not None else {full_k})
    rules = [
        SharedPolicy(kind="shared", price=0.05, k_min=k_min, k_max=None if most == full_k else most)
        for most in reversed(k_max)
        for k_min in (1, 0)
    ]
    even = [1.0] * laboratory.evaluator.num_layers
    starts = [found for found in (meet(laboratory, rule, even, budget) for rule in rules) if found is not None]
    if not starts:
        raise CalibrationError(
            "no price was found that keeps the budget in these decode steps: give a larger --target_reads, "
            "--target_time or --max_perplexity_increase."
        )
    start = best_of(starts, budget)
    return by_layer(laboratory, _decode_rule(start), start, budget, rounds)


def per_token_within(
    laboratory: DecodeLaboratory, budget: Budget, known: Mapping[str, Policy], rounds: int
) -> Measured | None:
    """The best rule of one token, by layer; None where none keeps the budget.

    Args:
        laboratory: measures.
        budget: the target.
        known: policies whose rules are tried, too.
        rounds: how often layers' numbers are moved.
    """
    even = [1.0] * laboratory.evaluator.num_layers
    rules = per_token_rules(known, laboratory.evaluator.expert_norms is not None)
    found = [each for each in (meet(laboratory, rule, even, budget) for rule in rules) if each is not None]
    if not found:
        return None
    best = best_of(found, budget)
    return by_layer(laboratory, _decode_rule(best), best, budget, rounds)


def _decode_rule(found: Measured) -> Any:
    assert isinstance(found.candidate.policy, PhasesPolicy)
    return found.candidate.policy.decode


def _short(number: float) -> float:
    """Four digits: the file says what was measured."""
    return float(f"{number:.4g}")
