# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's README.md says, from the facts that its training.json holds."""

from __future__ import annotations

import math
from typing import Any

import torch

from small_model import PERCENTILES

NEW_TOKENS = 80


def sparkline(values: list[float], width: int = 60) -> str:
    """A curve in one line of text."""
    if len(values) > width:
        values = [values[round(index * (len(values) - 1) / (width - 1))] for index in range(width)]
    low, high = min(values), max(values)
    marks = "▁▂▃▄▅▆▇█"
    return "".join(marks[round((value - low) / max(high - low, 1e-9) * (len(marks) - 1))] for value in values)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def load_table(routers: list[dict[str, Any]]) -> str:
    """Every expert's share in each layer; of many experts, the spread."""
    experts = len(routers[0]["expert_load"])
    if experts <= 16:
        header = [f"expert {expert}" for expert in range(experts)]
        rows = [row["expert_load"] for row in routers]
    else:
        header = ["least", "lower quartile", "median", "upper quartile", "most"]
        steps = torch.linspace(0, 1, len(header))
        rows = [torch.quantile(torch.tensor(row["expert_load"]), steps).tolist() for row in routers]
    return table(
        ["layer", *header], [[str(layer), *(f"{share:.3f}" for share in row)] for layer, row in enumerate(rows)]
    )


def balance_sentence(run: dict[str, Any]) -> str:
    """What kept the experts' load even besides the loss, if anything."""
    if not run.get("moves_correction_bias"):
        return "No other term acts on router entropy."
    return (
        f"The routers' correction biases move by {run['bias_rate']} a step towards the experts that were chosen too "
        "seldom. No other term acts on router entropy."
    )


def training_paragraph(run: dict[str, Any]) -> str:
    """What was run, in sentences; a run that went on from another's checkpoint names that one too."""
    sentences = []
    before = 0
    for each in [*run["earlier_runs"], run]:
        steps = each.get("steps_continued", before + each["steps"]) - before
        before += steps
        sentences.append(
            f"{steps:,} steps of {each['batch']} windows of `<s>` and {each['context']} tokens "
            f"({steps * each['batch'] * each['context']:,} tokens), peak learning rate {each['lr']}, "
            f"{each['warmup']} steps of warmup, cosine decay"
            + (" (left before its end)." if "steps_continued" in each and not each["finished"] else ".")
        )
    if len(sentences) > 1:
        sentences.insert(0, f"{len(sentences)} runs, each from the checkpoint that the one before had saved:")
    sentences.append(
        f"Together {run['total_tokens']:,} tokens, {run['epochs']:.1f} times the training text; the last run "
        f"took {run['minutes']:.1f} minutes on at most {run['threads']} CPU threads. AdamW, weight decay "
        f"{run['weight_decay']}, gradient norm clipped at 1. The weights are those of step "
        f"{run['kept_step']:,}, which had the lowest validation loss."
    )
    return " ".join(sentences)


def model_card(facts: dict[str, Any]) -> str:
    """The checkpoint's README.md, from the facts that training.json holds."""
    model, run, held = facts["model"], facts["training"], facts["heldout"]
    curve, experts, k = facts["loss_curve"], facts["model"]["experts"], facts["model"]["top_k"]
    losses = [point["train_loss"] for point in curve]
    validated = [point for point in curve if "validation_loss" in point]
    shown = sorted({round(index * (len(validated) - 1) / 9) for index in range(10)}) if validated else []
    parts = [
        f"# {facts['name']}",
        f"A {model['architecture']} mixture-of-experts language model of "
        f"{model['parameters'] / 1e6:.2f} million parameters "
        f"({model['active_parameters'] / 1e6:.2f} million active per token at k={k}), trained from scratch "
        "on a CPU by `examples/training/train.py`. It is here so that routing can be tried on routers that "
        "have learned something. It writes sentences that sound like its sources and is of no use as a "
        "source of facts.",
        "Every number below was measured by the script; perplexities, router statistics and samples come "
        "from the saved bfloat16 weights, loaded as float32. `training.json` holds the same facts and the "
        "whole loss curve.",
        "## Model",
        table(
            ["", ""],
            [
                ["layers, hidden size", f"{model['layers']}, {model['hidden_size']}"],
                ["experts, k, expert width", f"{experts}, {k}, {model['intermediate_size']}"],
                [
                    "attention heads, key/value heads, head size",
                    f"{model['heads']}, {model['kv_heads']}, {model['head_dim']}",
                ],
                ["vocabulary", f"{model['vocab_size']} (byte-level BPE), embeddings {model['embeddings']}"],
                ["positions", f"{model['max_positions']} configured, {run['context']} trained on"],
                *model["facts"],
            ],
        ),
        "## Text",
        table(
            ["source", "origin", "licence", "training characters"],
            [
                [source["name"], source["origin"], source["licence"], f"{source['train_characters']:,}"]
                for source in facts["sources"]
            ],
        ),
        f"Together {run['train_stream_tokens']:,} tokens. Whole documents were set aside before training: "
        f"`heldout.txt` ({held['characters']:,} characters, {held['tokens']:,} tokens) and a smaller "
        "validation set, which picks the weights that are kept. Sources may repeat themselves (the Bible "
        "tells some events twice), so some held-out sentences can have near copies in the training text.",
        "## Training",
        training_paragraph(run),
        "To keep the routers from collapsing onto few experts and from staying close to uniform: a "
        f"load-balancing loss for each layer with coefficient {run['router_aux_loss_coef']}; gate weights "
        f"drawn with standard deviation {run['gate_init_std']} (0.02 is the default), trained at "
        f"{run['gate_lr_scale']} times the learning rate and left out of weight decay. {balance_sentence(run)}",
        "Training loss in nats per token, from the first logged interval to the last:",
        f"```text\n{losses[0]:.2f} {sparkline(losses)} {losses[-1]:.2f}\n```",
        table(
            ["step", "tokens", "training loss", "validation loss"],
            [
                [
                    f"{point['step']:,}",
                    f"{point['tokens']:,}",
                    f"{point['train_loss']:.3f}",
                    f"{point['validation_loss']:.3f}",
                ]
                for point in (validated[index] for index in shown)
            ],
        ),
        "## Held-out perplexity",
        f"On `heldout.txt` in windows of `<s>` and {run['context']} tokens, per token of this tokenizer, "
        "the same k for every token:",
        table(
            ["k", "loss (nats)", "perplexity"],
            [[each, f"{result['loss']:.4f}", f"{result['perplexity']:.2f}"] for each, result in held["by_k"].items()],
        ),
        f"## Routers on the held-out text (k={k})",
        f"Entropy in nats of each token's distribution over the {experts} experts. A router without any "
        f"preference would have ln {experts} = {math.log(experts):.3f}.",
        table(
            ["layer", "mean", *(f"p{percent}" for percent in PERCENTILES), "mean top-1 probability"],
            [
                [
                    str(row["layer"]),
                    f"{row['entropy_mean']:.2f}",
                    *(f"{row['entropy_percentiles'][f'p{percent}']:.2f}" for percent in PERCENTILES),
                    f"{row['top1_probability_mean']:.2f}",
                ]
                for row in facts["routers"]
            ],
        ),
        f"Expert load: each expert's share of the top-{k} choices. Even would be {1 / experts:.3f}.",
        load_table(facts["routers"]),
        "## What it writes",
        f"Greedy decoding at k={k}, up to {NEW_TOKENS} tokens, as generated:",
    ]
    for sample in facts["samples"]:
        parts += [f"Prompt `{sample['prompt']}`:", f"```text\n{sample['text']}\n```"]
    parts.append("Made with " + ", ".join(" ".join(item) for item in facts["versions"].items()) + ".")
    return "\n\n".join(parts) + "\n"
