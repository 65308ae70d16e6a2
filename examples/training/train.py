#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Train a small mixture-of-experts language model from scratch on a CPU.

The script makes everything a Hugging Face checkpoint directory needs, with nothing downloaded but Debian
packages:

1. **Text.**  By default the King James Bible (``bible-kjv-text``, public domain) and the Python 3.11
   documentation (``python3.11-doc``, PSF licence), both fetched with ``apt-get download`` into
   ``--cache_dir`` and unpacked there without being installed.  ``--text FILE`` (repeatable) uses plain text
   files instead.  Whole documents (chapters, documentation pages) are set aside for validation and for the
   held-out file, so neither is ever trained on.
2. **Tokenizer.**  A byte-level BPE with ``<unk> <s> </s> <pad>``, trained on the training documents only.
   A post-processor puts ``<s>`` in front of every encoded text.
3. **Model.**  ``--architecture`` picks an entry of :data:`ARCHITECTURES`; its weights start at random.
4. **Training.**  AdamW, linear warmup and cosine decay.  The schedule follows whichever runs out first of
   ``--steps`` and ``--minutes``, so that a run on a busy machine still ends with a fully decayed rate.
   The objective is next-token cross-entropy plus ``--router_aux_loss_coef`` times the Switch load-balancing
   loss, taken for each layer and averaged.  (The loss that transformers computes pools the layers first,
   which lets one layer's imbalance hide behind another's.)  The gates are drawn with ``--gate_init_std``
   rather than the default 0.02, which starts every router within a hair of the uniform distribution, and
   learn at ``--gate_lr_scale`` times the rate of the rest, which keeps them from becoming certain of every
   token early on.
5. **Checkpoint.**  Weights in bfloat16, tokenizer, ``heldout.txt``, ``training.json`` and a ``README.md``
   whose numbers are measured on the saved files, loaded back in float32.

Every window the model sees, in training and evaluation, is ``<s>`` followed by up to ``--context`` tokens.

Typical use, about fifty minutes on two cores::

    python examples/training/train.py --output_dir examples/models/mixtral-small --minutes 50
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from model_card import NEW_TOKENS, model_card
from small_model import (
    ARCHITECTURES,
    SIZE_HELP,
    Architecture,
    load_balancing_loss,
    mean_entropies,
    mean_loss,
    recorded_router_logits,
    router_statistics,
    routers,
)
from texts import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    SPECIAL_TOKENS,
    Corpus,
    bible_source,
    build_corpus,
    consecutive_windows,
    encode,
    file_source,
    python_docs_source,
    random_windows,
    train_tokenizer,
)

# transformers leaves these without annotations, so they are handled as Any.
AutoModelForCausalLM: Any = transformers.AutoModelForCausalLM
AutoTokenizer: Any = transformers.AutoTokenizer
GenerationConfig: Any = transformers.GenerationConfig
PROMPTS = ("In the beginning", "And the LORD said unto Moses,", "The function returns")


def active_parameters(model: nn.Module, experts: int, top_k: int) -> int:
    """Parameters that one token uses: everything, with top_k of the experts' weights instead of all."""
    total = sum(parameter.numel() for parameter in model.parameters())
    in_experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    return int(total - in_experts + in_experts * top_k // experts)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the tokenizer's files, in the form that transformers 4 reads as well."""
    tokenizer.save_pretrained(output)
    path = output / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only"):  # how it was loaded, when the run went on from a checkpoint
        config.pop(key, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    path = output / "special_tokens_map.json"
    path.write_text(json.dumps(SPECIAL_TOKENS, indent=2) + "\n", encoding="utf-8")


def save_checkpoint(
    weights: dict[str, Tensor],
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    architecture: Architecture,
    corpus: Corpus,
    training: dict[str, Any],
    curve: list[dict[str, Any]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Write the checkpoint directory, load it back, measure it, and write training.json and README.md."""
    output: Path = args.output_dir
    output.mkdir(parents=True, exist_ok=True)
    rng_state = torch.get_rng_state()
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(weights)
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.save_pretrained(output, save_original_format=True)  # the hub's layout
    save_tokenizer(tokenizer, output)
    heldout_text = "\n".join(corpus.heldout)
    (output / "heldout.txt").write_text(heldout_text, encoding="utf-8")

    saved_tokenizer = AutoTokenizer.from_pretrained(output)
    ids = torch.tensor(saved_tokenizer.backend_tokenizer.encode(heldout_text, add_special_tokens=False).ids)
    windows = consecutive_windows(ids, args.context)
    by_k: dict[str, dict[str, float]] = {}
    facts: dict[str, Any] = {"name": output.name}
    for k in range(args.top_k, 0, -1):
        saved = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32, num_experts_per_tok=k).eval()
        loss = mean_loss(saved, windows)
        by_k[str(k)] = {"loss": round(loss, 5), "perplexity": round(math.exp(loss), 4)}
        if k == args.top_k:
            facts["model"] = {
                "architecture": args.architecture,
                "parameters": sum(parameter.numel() for parameter in saved.parameters()),
                "active_parameters": active_parameters(saved, args.experts, args.top_k),
                "layers": args.layers,
                "hidden_size": args.hidden_size,
                "intermediate_size": args.intermediate_size,
                "experts": args.experts,
                "top_k": args.top_k,
                "heads": args.heads,
                "kv_heads": args.kv_heads,
                "head_dim": args.head_dim,
                "vocab_size": config.vocab_size,
                "embeddings": "tied" if config.tie_word_embeddings else "not tied",
                "facts": architecture.facts(config),
                "max_positions": args.max_positions,
            }
            facts["routers"] = router_statistics(saved, architecture, windows, k)
            samples = []
            for prompt in PROMPTS:
                inputs = saved_tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
                written = saved.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
                samples.append({"prompt": prompt, "text": saved_tokenizer.decode(written[0], skip_special_tokens=True)})
            facts["samples"] = samples
    facts["heldout"] = {"characters": len(heldout_text), "tokens": ids.numel(), "by_k": by_k}
    facts["training"] = training
    facts["sources"] = corpus.sources
    facts["versions"] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
    }
    facts["loss_curve"] = curve
    (output / "training.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (output / "README.md").write_text(model_card(facts), encoding="utf-8")
    torch.set_rng_state(rng_state)
    return facts


def learning_rate(progress: float, step: int, args: argparse.Namespace) -> float:
    """Linear warmup over the first steps, then a cosine to a twentieth of the peak."""
    warmup = min(1.0, (step + 1) / args.warmup)
    cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return float(args.lr * warmup * cosine)


def make_optimizer(model: nn.Module, architecture: Architecture, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW: weight decay on matrices other than the routers', and a lower rate for the routers.

    At the full rate one step may move a router logit by ``hidden_size * lr``, which lets the routers become
    certain of every token within the first few hundred steps.
    """
    gates = [parameter for router in routers(model, architecture) for parameter in router.parameters()]
    gate_ids = {id(parameter) for parameter in gates}
    others = [parameter for parameter in model.parameters() if id(parameter) not in gate_ids]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": args.weight_decay, "rate_scale": 1.0},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0, "rate_scale": 1.0},
        {"params": gates, "weight_decay": 0.0, "rate_scale": args.gate_lr_scale},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def log(message: str) -> None:
    """Print at once, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


def report(facts: dict[str, Any]) -> None:
    """Log the measurements of a saved checkpoint."""
    for k, result in facts["heldout"]["by_k"].items():
        log(f"saved: held-out perplexity at k={k}: {result['perplexity']:.2f}")
    for row in facts["routers"]:
        log(f"saved: layer {row['layer']} entropy {row['entropy_mean']} {row['entropy_percentiles']}")
        log(f"saved: layer {row['layer']} load {row['expert_load']}")
    for sample in facts["samples"]:
        log(f"saved: {sample['text']!r}")


def continued_curve(earlier: dict[str, Any] | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """From the training.json of --init_from: its loss curve up to the weights it kept, and its runs."""
    if earlier is None:
        return [], []
    run = dict(earlier["training"])
    curve = [point for point in earlier["loss_curve"] if point["step"] <= run["kept_step"]]
    run["steps_continued"] = curve[-1]["step"]
    return curve, [*run.pop("earlier_runs", []), run]


def train(args: argparse.Namespace) -> None:
    """The whole run: text, tokenizer, model, training, checkpoint."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    architecture = ARCHITECTURES[args.architecture]

    if args.text:
        sources = [file_source(path) for path in args.text]
    else:
        sources = [bible_source(args.cache_dir), python_docs_source(args.cache_dir)]
    corpus = build_corpus(sources, args.heldout_kb, args.seed)
    for source in corpus.sources:
        log(f"text: {source}")
    if args.init_from:
        earlier = json.loads((args.init_from / "training.json").read_text(encoding="utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(args.init_from)
    else:
        earlier = None
        tokenizer = train_tokenizer(corpus.train, args.vocab_size, args.max_positions)
    args.vocab_size = len(tokenizer)
    stream = encode(tokenizer, corpus.train)
    validation = consecutive_windows(encode(tokenizer, corpus.validation), args.context)
    log(f"tokens: {stream.numel():,} to train on, {sum(w.numel() - 1 for w in validation):,} for validation")

    config = architecture.config(args)
    if args.init_from:
        model = AutoModelForCausalLM.from_pretrained(
            args.init_from, dtype=torch.float32, experts_implementation=args.experts_implementation
        )
    else:
        model = AutoModelForCausalLM.from_config(config, experts_implementation=args.experts_implementation)
        with torch.no_grad():
            for router in routers(model, architecture):
                for parameter in router.parameters():
                    nn.init.normal_(parameter, std=args.gate_init_std)
    log(f"model: {sum(p.numel() for p in model.parameters()):,} parameters")
    optimizer = make_optimizer(model, architecture, args)
    gates = routers(model, architecture)
    model.train()
    curve, earlier_runs = continued_curve(earlier)
    first_step = curve[-1]["step"] if curve else 0
    first_tokens = curve[-1]["tokens"] if curve else 0
    first_minutes = curve[-1]["minutes"] if curve else 0.0
    generator = torch.Generator().manual_seed(args.seed + first_step)
    best_loss, best_step, best_weights = math.inf, 0, {}
    started = time.monotonic()
    next_save = args.first_save_minutes * 60
    step, running_loss, running_balance, running_count = 0, 0.0, 0.0, 0
    batch_tokens = args.batch * args.context
    while True:
        elapsed = time.monotonic() - started
        progress = max(step / args.steps, elapsed / (args.minutes * 60))
        finished = progress >= 1.0
        if not finished:
            rate = learning_rate(progress, step, args)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate_scale"]
            ids = random_windows(stream, args.batch, args.context, generator)
            with recorded_router_logits(model, architecture) as router_logits:
                logits = model(input_ids=ids[:, :-1], use_cache=False).logits
                loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
                balance = load_balancing_loss(gates, router_logits, args.top_k, args.bias_rate)
            (loss + args.router_aux_loss_coef * balance).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            running_loss += float(loss.detach())
            running_balance += float(balance.detach())
            running_count += 1

        if running_count and (step % args.log_every == 0 or finished):
            point: dict[str, Any] = {
                "step": first_step + step,
                "tokens": first_tokens + step * batch_tokens,
                "minutes": round(first_minutes + elapsed / 60, 2),
                "lr": round(rate, 7),
                "train_loss": round(running_loss / running_count, 4),
                "balance_loss": round(running_balance / running_count, 4),
                "router_entropy": mean_entropies(router_logits),
            }
            if step % args.validate_every == 0 or finished:
                point["validation_loss"] = round(mean_loss(model, validation), 4)
                if point["validation_loss"] < best_loss:
                    best_loss, best_step = point["validation_loss"], first_step + step
                    best_weights = {name: value.clone() for name, value in model.state_dict().items()}
            curve.append(point)
            running_loss, running_balance, running_count = 0.0, 0.0, 0
            log(f"{point} ({step * batch_tokens / max(time.monotonic() - started, 1e-9):.0f} tokens/s)")

        if best_weights and (finished or elapsed >= next_save):
            next_save = elapsed + args.save_minutes * 60
            training = {
                "steps": step,
                "kept_step": best_step,
                "batch": args.batch,
                "context": args.context,
                "tokens": step * batch_tokens,
                "train_stream_tokens": stream.numel(),
                "epochs": round((first_tokens + step * batch_tokens) / stream.numel(), 2),
                "total_tokens": first_tokens + step * batch_tokens,
                "minutes": round(elapsed / 60, 2),
                "finished": finished,
                "threads": args.threads,
                "lr": args.lr,
                "warmup": args.warmup,
                "weight_decay": args.weight_decay,
                "router_aux_loss_coef": args.router_aux_loss_coef,
                "bias_rate": args.bias_rate,
                "moves_correction_bias": hasattr(gates[0], "e_score_correction_bias"),
                "gate_init_std": args.gate_init_std,
                "gate_lr_scale": args.gate_lr_scale,
                "seed": args.seed,
                "earlier_runs": earlier_runs,
            }
            report(save_checkpoint(best_weights, config, tokenizer, architecture, corpus, training, curve, args))
        if finished:
            return


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a small mixture-of-experts language model from scratch on a CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="the checkpoint directory to write")
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="mixtral")
    parser.add_argument("--text", type=Path, action="append", help="a text file to train on; may be repeated")
    default_cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "adaptive-k-moe"
    # The default is worked out from the environment, so --help names the variable rather than the path.
    parser.add_argument(
        "--cache_dir",
        type=Path,
        default=argparse.SUPPRESS,
        help="for Debian packages (default: in XDG_CACHE_HOME)",
    )
    parser.add_argument("--heldout_kb", type=int, default=80, help="held-out text, in thousands of characters")

    size = parser.add_argument_group("model size")
    size.add_argument("--vocab_size", type=int, default=2048)
    for name in sorted({name for architecture in ARCHITECTURES.values() for name in architecture.sizes}):
        size.add_argument(f"--{name}", type=int, help=SIZE_HELP.get(name, "") + " (default: the architecture's)")
    size.add_argument("--max_positions", type=int, default=1024)

    run = parser.add_argument_group("training")
    run.add_argument(
        "--init_from",
        type=Path,
        help="go on from this checkpoint directory (same text and seed, or its held-out text is trained on)",
    )
    run.add_argument("--minutes", type=float, default=50.0, help="stop after this long")
    run.add_argument("--steps", type=int, default=20000, help="stop after this many steps")
    run.add_argument("--batch", type=int, default=16, help="windows in a step")
    run.add_argument("--context", type=int, default=256, help="tokens in a window, after <s>")
    run.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    run.add_argument("--warmup", type=int, default=200, help="steps of linear warmup")
    run.add_argument("--weight_decay", type=float, default=0.1)
    run.add_argument("--router_aux_loss_coef", type=float, default=0.01)
    run.add_argument("--bias_rate", type=float, default=1e-3, help="step of the routers' correction biases")
    run.add_argument("--gate_init_std", type=float, default=0.1)
    run.add_argument("--gate_lr_scale", type=float, default=0.1, help="the routers' share of the learning rate")
    run.add_argument("--experts_implementation", default="grouped_mm", choices=("eager", "grouped_mm", "batched_mm"))
    run.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--log_every", type=int, default=50, help="steps between points of the loss curve")
    run.add_argument("--validate_every", type=int, default=250, help="steps, a multiple of --log_every")
    run.add_argument("--first_save_minutes", type=float, default=8.0, help="when to write the first checkpoint")
    run.add_argument("--save_minutes", type=float, default=15.0, help="time between later checkpoints")
    args = parser.parse_args(arguments)
    for name, value in ARCHITECTURES[args.architecture].sizes.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if "cache_dir" not in args:
        args.cache_dir = default_cache
    if args.validate_every % args.log_every:
        parser.error("--validate_every must be a multiple of --log_every")
    return args


def main() -> int:
    """Command-line entry point."""
    train(parse_arguments())
    return 0


if __name__ == "__main__":
    sys.exit(main())
