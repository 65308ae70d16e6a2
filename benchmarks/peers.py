# SPDX-License-Identifier: Apache-2.0
"""This project's engine against the other MoE engines for CPUs, whole, on one checkpoint at equal bits.

    python benchmarks/peers.py --prepare     # install and build the peers, write the models; once, needs PyPI
    python benchmarks/peers.py               # measure all, on an idle machine
    python benchmarks/peers.py --models mixtral --weights int4 --stacks adaptive-k llama.cpp

Peers: vLLM, OpenVINO on optimum-intel's export, llama.cpp, transformers. Each runs in a process of its own that stays
loaded, and they take turns, so a slow minute of the machine falls on all. A peer with a choice of settings is first
measured once with each, and for every column the fastest of them stands for it. Decode is measured while all sequences
decode, after prompts of 128 tokens; figures are medians over the turns.

The roofline is the larger of two times: the bytes of the weights that a step must read, without scales, over the read
bandwidth of the same minutes; and its operations over the rate of a large matrix product, in bfloat16 unless weights
are float32. Kernels that multiply integers may pass the second.

A run replaces what it measured in the results' file and keeps the rest, so models and weights can be measured in
several runs. A comparison of decoding is ruined by one other busy process; on a machine that is not idle nothing is
measured without --force, and the file says how busy it was.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from _peers.checkpoints import SHAPES, Shape
from _peers.prepare import LLAMA_CPP_PYTHON, PrepareError, Workshop, cpu_flags, disk_bytes
from _peers.worker import Column, Worker, WorkerError
from _results import cpu_name, write_results
from _roofline import BITS, GemmProbe, ReadProbe, seconds

OURS = "adaptive-k"
PREFILL, PROMPT, DECODE, BATCHES = 512, 128, 32, (1, 8, 16)
QUICK_DECODE = 8
IDLE_CPUS = 0.2
"""How many CPUs others may keep busy on a machine that counts as idle."""

BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}

Settings = dict[str, Any]


def columns(decode: int) -> dict[str, Column]:
    """What is measured of each stack, by the name that it has in a table."""
    found = {f"prefill {PREFILL}": Column("prefill", 1, 0, PREFILL)}
    return found | {f"decode, batch {batch}": Column("decode", batch, PROMPT, decode) for batch in BATCHES}


@dataclass(frozen=True)
class Candidate:
    """A stack with one choice of settings, ready to start.

    Attributes:
        label: the settings, as a table shows them; "" where there is no choice.
    """

    stack: str
    label: str
    python: Path
    script: str
    settings: Settings
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, root: Path) -> Worker:
        """A process that has the model loaded."""
        log = root / "logs" / f"{self.stack} {self.label}.log".replace(" ", "-")
        return Worker(self.python, self.script, self.settings, log, environment=self.environment)


class MissingError(Exception):
    """A stack has no such weights; the message is one sentence."""


def adaptive_k(workshop: Workshop, model: str, weights: str, threads: int) -> list[Candidate]:
    settings = {"model": str(workshop.engine(model, weights)), "threads": threads}
    return [Candidate(OURS, "", Path(sys.executable), "serve_adaptive_k.py", settings)]


def vllm(workshop: Workshop, model: str, weights: str, threads: int) -> list[Candidate]:
    workshop.environment("vllm")
    checkpoint = workshop.compressed_tensors(model, weights)
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, with no messages in the time
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0))[:threads]),
        "VLLM_CACHE_ROOT": str(workshop.root / "vllm-cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    dtype = "float32" if weights == "float32" else "bfloat16"
    return [
        Candidate(
            "vllm",
            label,
            workshop.python("vllm"),
            "serve_vllm.py",
            {"model": str(checkpoint), "dtype": dtype, "eager": label == "eager"},
            environment,
        )
        for label in ("eager", "compiled")
    ]


def openvino(workshop: Workshop, model: str, weights: str, threads: int) -> list[Candidate]:
    bfloat16 = bool(cpu_flags() & BFLOAT16_FLAGS)
    if weights == "bfloat16" and not bfloat16:
        raise MissingError("this processor has no bfloat16 products, and OpenVINO would compute in float32")
    workshop.environment("openvino")
    directory = str(workshop.openvino(model, weights))
    precisions = {"float32": ["f32"], "bfloat16": ["bf16"]}.get(weights, ["bf16", "f32"] if bfloat16 else ["f32"])
    return [
        Candidate(
            "openvino",
            f"{precision} compute" if len(precisions) > 1 else "",
            workshop.python("openvino"),
            "serve_openvino.py",
            {"model": directory, "threads": threads, "precision": precision},
        )
        for precision in precisions
    ]


def llama_cpp(workshop: Workshop, model: str, weights: str, threads: int) -> list[Candidate]:
    programs = str(workshop.llama_cpp())
    settings = {"programs": programs, "model": str(workshop.gguf(model, weights)), "version": LLAMA_CPP_PYTHON}
    python = Path(sys.executable)
    return [Candidate("llama.cpp", "", python, "serve_llama_cpp.py", {**settings, "threads": threads})]


def transformers(workshop: Workshop, model: str, weights: str, threads: int) -> list[Candidate]:
    if weights in ("int8", "int4"):
        raise MissingError("transformers has no integer weights of its own for experts on a CPU")
    settings = {"model": str(workshop.checkpoint(model)), "dtype": weights, "threads": threads}
    return [
        Candidate(
            "transformers",
            f"{experts} experts",
            Path(sys.executable),
            "serve_transformers.py",
            {**settings, "experts": experts},
        )
        for experts in ("grouped_mm", "eager")
    ]


STACKS = {OURS: adaptive_k, "vllm": vllm, "openvino": openvino, "llama.cpp": llama_cpp, "transformers": transformers}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--weights", choices=list(BITS), nargs="+", default=["bfloat16", "int8", "int4"])
    parser.add_argument("--stacks", choices=list(STACKS), nargs="+", default=list(STACKS))
    parser.add_argument("--repeats", type=int, default=3, help="turns of each stack")
    parser.add_argument("--num_threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--prepare", action="store_true", help="only make what is needed, and measure nothing")
    parser.add_argument("--quick", action="store_true", help="one turn, short, first settings: shows that all runs")
    parser.add_argument("--table", action="store_true", help="only print the table of the results' file")
    parser.add_argument("--force", action="store_true", help="measure although the machine is busy")
    parser.add_argument("--directory", type=Path, default=Path("build/peers"), help="where the peers are made")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/peers.json; quick.json with --quick")
    args = parser.parse_args()
    if args.repeats < 1 or args.num_threads < 1:
        parser.error("--repeats and --num_threads must be 1 or more")
    args.directory = args.directory.absolute()
    if args.output is None:
        args.output = args.directory / "quick.json" if args.quick else Path("benchmarks/results/peers.json")
    return args


def main() -> None:
    args = parse_arguments()
    tables = read_tables(args.output)
    if args.table:
        print("\n\n".join(markdown(table) for table in tables))
        return
    if not args.prepare:
        check_idle(force=args.force)
    for model in args.models:
        for weights in args.weights:
            table = compare(args, model, weights)
            if table is not None:
                tables = [other for other in tables if (other["model"], other["weights"]) != (model, weights)]
                tables.append(table)
                write_results(args.output, {"tables": tables})
    if not args.prepare:
        print("\n" + "\n\n".join(markdown(table) for table in tables))


def read_tables(output: Path) -> list[dict[str, Any]]:
    """What earlier runs measured; nothing if there is no such file."""
    found: list[dict[str, Any]] = json.loads(output.read_text())["tables"] if output.is_file() else []
    return found


def busy_cpus(seconds: float) -> float:
    """How many CPUs are busy while this process waits."""
    before = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    time.sleep(seconds)
    after = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    spent = [int(b) - int(a) for a, b in zip(before, after, strict=True)]
    idle = spent[3] + spent[4]  # waiting for a disk is idle, too
    return (os.cpu_count() or 1) * (1 - idle / max(sum(spent), 1))


def check_idle(*, force: bool) -> float:
    """How many CPUs others keep busy; refuses to go on where that spoils the figures, unless forced."""
    busy = busy_cpus(3.0)
    if busy > IDLE_CPUS:
        said = f"{busy:.1f} CPUs are busy with something else, which spoils every figure (llama.cpp's twentyfold)"
        if not force:
            raise SystemExit(f"{said}: wait until the machine is idle, or measure with --force.")
        tell(f"WARNING: {said}. Measuring all the same, because of --force.")
    return busy


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def prepared(args: argparse.Namespace, model: str, weights: str, missing: dict[str, str]) -> list[list[Candidate]]:
    """Each stack's candidates; a stack that cannot be had goes into `missing` with the reason."""
    workshop = Workshop(args.directory, lambda line: tell(f"{model}, {weights}: {line}"))
    found = []
    for name in args.stacks:
        try:
            candidates = STACKS[name](workshop, model, weights, args.num_threads)
        except (MissingError, PrepareError) as error:
            missing[name] = str(error)
            tell(f"{model}, {weights}: {name} is left out: {error}")
            continue
        for candidate in candidates:
            candidate.settings["vocab_size"] = SHAPES[model].vocab_size
        found.append(candidates[:1] if args.quick else candidates)
    return found


class Running:
    """One stack's loaded processes, and which of them stands for which column."""

    def __init__(self, candidates: list[Candidate], names: dict[str, Column], root: Path, stop: ExitStack) -> None:
        """Start the candidates one after the other, keep those that are the fastest in some column.

        Raises:
            WorkerError: none of them runs.
        """
        self.name = candidates[0].stack
        self.failed: dict[str, str] = {}
        self.runs: dict[str, list[float]] = {name: [] for name in names}
        searched: dict[str, dict[str, float]] = {}
        workers: dict[str, Worker] = {}
        self.model = Path(candidates[0].settings["model"])
        for candidate in candidates:
            try:
                worker = candidate.start(root)
                stop.callback(worker.close)
                if len(candidates) > 1:
                    searched[candidate.label] = {name: worker.measure(column) for name, column in names.items()}
                workers[candidate.label] = worker
            except WorkerError as error:
                self.failed[candidate.label] = str(error)
                tell(f"{self.name} {candidate.label} does not run: {error}")
        if not workers:
            raise WorkerError("; ".join(self.failed.values()))
        only = next(iter(workers))
        self.chosen = {
            name: max(searched, key=lambda label: searched[label][name]) if searched else only for name in names
        }
        self.searched = searched
        self.workers = {label: worker for label, worker in workers.items() if label in self.chosen.values()}
        for label in workers.keys() - self.workers.keys():
            workers[label].close()

    def turn(self, names: dict[str, Column]) -> None:
        """Measure every column once."""
        for name, column in names.items():
            self.runs[name].append(self.workers[self.chosen[name]].measure(column))

    def row(self) -> dict[str, Any]:
        """The stack's row of the results."""
        worker = next(iter(self.workers.values()))
        cells = {
            name: {"tokens_per_second": statistics.median(runs), "runs": runs, "settings": self.chosen[name]}
            for name, runs in self.runs.items()
        }
        return {
            "stack": self.name,
            "versions": worker.versions,
            "disk_bytes": disk_bytes(self.model),
            "columns": cells,
            "search": self.searched,
            "settings_that_failed": self.failed,
        }


def compare(args: argparse.Namespace, model: str, weights: str) -> dict[str, Any] | None:
    """One table: a model with one kind of weights, all stacks in turns; None if only prepared."""
    missing: dict[str, str] = {}
    stacks = prepared(args, model, weights, missing)
    if args.prepare:
        return None
    begin, load = time.monotonic(), os.getloadavg()
    names = columns(QUICK_DECODE if args.quick else DECODE)
    busy = [check_idle(force=True)]
    with ExitStack() as stop:
        running = []
        for candidates in stacks:
            tell(f"{model}, {weights}: loading {candidates[0].stack}")
            try:
                running.append(Running(candidates, names, args.directory, stop))
            except WorkerError as error:
                missing[candidates[0].stack] = str(error)
        read = ReadProbe(args.num_threads)
        product = GemmProbe(args.num_threads, bfloat16=weights != "float32" and bool(cpu_flags() & BFLOAT16_FLAGS))
        rates: dict[str, list[float]] = {"read_bandwidth": [], "products": []}
        for turn in range(1 if args.quick else args.repeats):
            tell(f"{model}, {weights}: turn {turn + 1}")
            busy.append(busy_cpus(1.0))
            rates["read_bandwidth"].append(read.num_bytes / seconds(read.run))
            rates["products"].append(product.operations / seconds(product.run))
            for one in running[:: -1 if turn % 2 else 1]:
                try:
                    one.turn(names)
                except WorkerError as error:
                    missing[one.name] = str(error)
                    running.remove(one)
        rows = [one.row() for one in running]
    measured = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "model": model,
        "weights": weights,
        "title": SHAPES[model].title,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "threads": args.num_threads,
        "repeats": 1 if args.quick else args.repeats,
        "seconds": round(time.monotonic() - begin, 1),
        "busy_cpus": [round(value, 2) for value in busy],
        "load_average": load,
        "rates": measured,
        "rows": rows,
        "roofline": roofline(SHAPES[model], weights, measured["read_bandwidth"], measured["products"]),
        "ours_over_best_peer": over_best_peer(rows),
        "missing": missing,
    }


def roofline(shape: Shape, weights: str, bandwidth: float, products: float) -> dict[str, float]:
    """Tokens per second of each column that the machine's two rates allow.

    Args:
        shape: the model.
        weights: a name of `BITS`.
        bandwidth: bytes read per second.
        products: floating-point operations of a matrix product per second.
    """

    def step(tokens: int, logits: int) -> float:
        reads = shape.weights_read(tokens) * BITS[weights] / 8 / bandwidth
        return max(reads, shape.operations(tokens, logits) / products)

    return {
        name: column.tokens / step(column.tokens, 1)
        if column.kind == "prefill"
        else column.batch / step(*[column.batch] * 2)
        for name, column in columns(DECODE).items()
    }


def over_best_peer(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each column our rate over the fastest peer's, and which that is; empty without us or without a peer."""
    ours = [row for row in rows if row["stack"] == OURS]
    peers = [row for row in rows if row["stack"] != OURS]
    if not ours or not peers:
        return {}
    found = {}
    for name, cell in ours[0]["columns"].items():
        best = max(peers, key=lambda row: row["columns"][name]["tokens_per_second"])
        ratio = cell["tokens_per_second"] / best["columns"][name]["tokens_per_second"]
        found[name] = {"ratio": ratio, "peer": best["stack"]}
    return found


def markdown(table: dict[str, Any]) -> str:
    """One table as Markdown: a line for each stack, ours over the best peer, the roofline, and what is missing."""
    names = list(table["roofline"])
    lines = [["tokens/s", *names, "weights on disk", "settings"]]
    for row in table["rows"]:
        cells = row["columns"]
        settings = {name: cells[name]["settings"] for name in names}
        chosen = sorted(set(settings.values()) - {""})
        if len(chosen) > 1:
            chosen = [f"{label}: {', '.join(name for name in names if settings[name] == label)}" for label in chosen]
        version = " ".join(" ".join(item) for item in list(row["versions"].items())[:1])
        stack = f"**{version}**" if row["stack"] == OURS else version
        figures = [number(cells[name]["tokens_per_second"]) for name in names]
        lines.append([stack, *figures, f"{row['disk_bytes'] / 1e6:.0f} MB", "; ".join(chosen)])
    lines.append(["roofline", *(number(table["roofline"][name]) for name in names), "", ""])
    ratios = table["ours_over_best_peer"]
    if ratios:
        shown = [f"**{ratios[name]['ratio']:.2f}** ({ratios[name]['peer']})" for name in names]
        lines.append(["ours over the best peer", *shown, "", ""])
    body = [" | ".join(line) for line in lines]
    rule = " | ".join(["---"] * len(lines[0]))
    rates = table["rates"]
    head = (
        f"{table['title']}; {table['weights']} weights. {table['cpu']}, {table['threads']} threads, {table['date']}; "
        f"median of {table['repeats']}; read bandwidth {rates['read_bandwidth'] / 1e9:.1f} GB/s, matrix products "
        f"{rates['products'] / 1e9:.0f} GFLOPS; other processes kept up to {max(table['busy_cpus']):.1f} CPUs busy."
    )
    left_out = [f"{name} is left out: {reason}" for name, reason in table["missing"].items()]
    return "\n".join([head, "", *(f"| {line} |" for line in [body[0], rule, *body[1:]]), "", *left_out]).rstrip()


def number(rate: float) -> str:
    """Three or more digits, as many as a rate deserves."""
    return f"{rate:.1f}" if rate < 100 else f"{rate:.0f}"


if __name__ == "__main__":
    main()
