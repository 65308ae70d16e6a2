#!/usr/bin/env python3
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

    python examples/train_small_moe.py --output_dir examples/models/mixtral-small --minutes 50
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    MixtralConfig,
    NemotronHConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

# transformers leaves these without annotations, so they are handled as Any.
AutoModelForCausalLM: Any = transformers.AutoModelForCausalLM
AutoTokenizer: Any = transformers.AutoTokenizer
GenerationConfig: Any = transformers.GenerationConfig
NewTokenizer: Any = PreTrainedTokenizerFast

SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
UNK_ID, BOS_ID, EOS_ID, PAD_ID = range(4)
NEW_TOKENS = 80
PERCENTILES = (5, 25, 50, 75, 95)
PROMPTS = ("In the beginning", "And the LORD said unto Moses,", "The function returns")


# --------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Source:
    """One body of text: documents that are either trained on or held out, never split."""

    name: str
    origin: str
    licence: str
    documents: list[str]


def fetch_debian_package(package: str, cache_dir: Path) -> Path:
    """Download and unpack a Debian package under ``cache_dir``, without installing it; return its root."""
    root = cache_dir / package
    if root.is_dir():
        return root
    cache_dir.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "download", package], cwd=cache_dir, check=True, stdout=subprocess.DEVNULL)
        archive = next(cache_dir.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg", "-x", archive.name, package], cwd=cache_dir, check=True)
    except (OSError, subprocess.CalledProcessError, StopIteration) as error:
        raise SystemExit(
            f"could not fetch the Debian package {package}: {error}\n"
            "Run 'apt-get update' on a Debian system first, or give your own text with --text FILE."
        ) from error
    return root


def parse_bible(printed: str) -> list[str]:
    """Turn what the ``bible`` program prints into a document a chapter and a line a verse, unnumbered."""
    documents: list[str] = []
    heading, verses = "", [""]
    heading_pattern = re.compile(r"^((?:\d )?[A-Z][A-Za-z ]*? \d+)$")
    previous_blank = True
    for line in [*printed.splitlines(), "", "End 1"]:
        if previous_blank and (match := heading_pattern.match(line)):
            if heading:
                documents.append(heading + "\n\n" + "\n".join(verse for verse in verses if verse) + "\n")
            heading, verses = match.group(1), []
        elif match := re.match(r"^ +\d+ (.*)$", line):
            verses.append(match.group(1).strip())
        elif line.strip():
            verses[-1] = f"{verses[-1]} {line.strip()}"
        previous_blank = not line.strip()
    return documents


def bible_source(cache_dir: Path) -> Source:
    """The King James Bible.  The package ships it compressed; the ``bible`` program beside it prints it."""
    program = fetch_debian_package("bible-kjv", cache_dir) / "usr" / "bin" / "bible"
    data = fetch_debian_package("bible-kjv-text", cache_dir) / "usr" / "lib"
    command = [str(program.resolve()), "-p", ".", "Gen1:1-Rev99:99"]
    try:
        printed = subprocess.run(
            command,
            cwd=data,
            check=True,
            capture_output=True,
            text=True,
            encoding="latin-1",
            stdin=subprocess.DEVNULL,
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"the bible program does not run here: {error}; use --text FILE instead") from error
    return Source(
        name="King James Bible",
        origin="Debian package bible-kjv-text",
        licence="public domain (translation of 1611; the package's copyright file says the same)",
        documents=parse_bible(printed),
    )


def clean_rst(text: str) -> str:
    """Reduce reStructuredText to plain text: prose paragraphs on one line each, code blocks as they are."""
    text = re.sub(r":[\w:+.-]+:`[!~]?([^`<]*?)\s*(?:<[^`]*>)?`", r"\1", text)  # :role:`text <target>`
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1", text)  # `text <address>`_
    text = re.sub(r"``([^`]+)``", r"\1", text)
    text = re.sub(r"(?<!\w)`([^`\n]+)`_{0,2}", r"\1", text)
    text = re.sub(r"(?<![\w*])\*{1,2}([^\s*](?:[^*\n]*[^\s*])?)\*{1,2}(?![\w*])", r"\1", text)
    text = re.sub(r"\|(\w+)\|", r"\1", text)
    kept: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line.rstrip() for line in block.splitlines()]
        lines = [line for line in lines if not re.match(r"^\s*([=\-~^\"'*#+.`:])\1{2,}\s*$", line)]
        lines = [line for line in lines if not re.match(r"^\s*(\.\.( |$)|:\w[\w -]*:|[+|].*[+|]$)", line)]
        lines = [re.sub(r"::$", ":", re.sub(r"\s+::$", "", line)) for line in lines if line.strip()]
        if not lines or any("http" in line for line in lines):
            continue
        joined = " ".join(line.strip() for line in lines)
        if all(line.startswith("   ") for line in lines) and (">>>" in joined or letter_share(joined) < 0.9):
            indent = min(len(line) - len(line.lstrip()) for line in lines)
            kept.append("\n".join("    " + line[indent:] for line in lines))
        else:
            kept.append(joined)
    return "\n\n".join(kept) + "\n"


def letter_share(text: str) -> float:
    """The share of letters, spaces and the marks of plain sentences among a text's characters."""
    return sum(character.isalpha() or character in " ,.'" for character in text) / max(len(text), 1)


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as sentences (rather than a signature, a table row or code)."""
    return len(paragraph) >= 200 and letter_share(paragraph) >= 0.95 and paragraph[-1:] in ".!?"


def python_docs_source(cache_dir: Path) -> Source:
    """The Python documentation: guides whole, the library reference reduced to its paragraphs of prose."""
    root = fetch_debian_package("python3.11-doc", cache_dir) / "usr/share/doc/python3.11/html/_sources"
    documents: list[str] = []
    for section in ("tutorial", "howto", "faq", "reference", "library"):
        for path in sorted((root / section).glob("*.rst.txt")):
            text = clean_rst(path.read_text(encoding="utf-8"))
            if section == "library":
                paragraphs = [paragraph for paragraph in text.strip().split("\n\n") if is_prose(paragraph)]
                text = "\n\n".join(paragraphs) + "\n"
            if len(text) >= 500:
                documents.append(text)
    return Source(
        name="Python 3.11 documentation (tutorial, howto, faq, reference; prose of the library reference)",
        origin="Debian package python3.11-doc",
        licence="PSF License Agreement version 2 (code samples also under the Zero-Clause BSD licence)",
        documents=documents,
    )


def file_source(path: Path) -> Source:
    """A plain text file, cut at blank lines into documents of about four thousand characters."""
    documents: list[str] = []
    current: list[str] = []
    for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
        current.append(paragraph)
        if sum(map(len, current)) >= 4000:
            documents.append("\n\n".join(current) + "\n")
            current = []
    if current:
        documents.append("\n\n".join(current) + "\n")
    return Source(name=path.name, origin="file given with --text", licence="not stated", documents=documents)


def set_aside(documents: list[str], characters: int, rng: random.Random) -> tuple[list[str], list[str]]:
    """Take random documents, none very long, out of a list until they hold ``characters`` characters."""
    order = list(range(len(documents)))
    rng.shuffle(order)
    limit = max(characters // 2, min(map(len, documents), default=0))
    taken: set[int] = set()
    total = 0
    for index in order:
        if total >= characters:
            break
        if len(documents[index]) <= limit:
            taken.add(index)
            total += len(documents[index])
    chosen = [documents[index] for index in sorted(taken)]
    return chosen, [document for index, document in enumerate(documents) if index not in taken]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The documents by use, and what to say of their sources."""

    train: list[str]
    validation: list[str]
    heldout: list[str]
    sources: list[dict[str, Any]]


def build_corpus(sources: list[Source], heldout_kb: int, seed: int) -> Corpus:
    """Split every source by documents; held-out and validation text is shared out by source size."""
    rng = random.Random(seed)
    whole = sum(len(document) for source in sources for document in source.documents)
    corpus = Corpus([], [], [], [])
    for source in sources:
        size = sum(map(len, source.documents))
        share = int(heldout_kb * 1000 * size / whole)
        heldout, rest = set_aside(source.documents, share, rng)
        validation, train = set_aside(rest, share // 2, rng)
        corpus.heldout.extend(heldout)
        corpus.validation.extend(validation)
        corpus.train.extend(train)
        corpus.sources.append(
            {
                "name": source.name,
                "origin": source.origin,
                "licence": source.licence,
                "train_characters": sum(map(len, train)),
                "validation_characters": sum(map(len, validation)),
                "heldout_characters": sum(map(len, heldout)),
            }
        )
    return corpus


# --------------------------------------------------------------------------------------------------
# Tokenizer and windows
# --------------------------------------------------------------------------------------------------


def train_tokenizer(documents: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that can spell any text and puts ``<s>`` in front of it."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    bos = SPECIAL_TOKENS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, BOS_ID)]
    )
    wrapped: PreTrainedTokenizerFast = NewTokenizer(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )
    return wrapped


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    """All documents as one stream of ids, each followed by ``</s>``."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(documents, add_special_tokens=False):
        ids.extend(encoding.ids)
        ids.append(EOS_ID)
    return torch.tensor(ids, dtype=torch.long)


def random_windows(stream: Tensor, batch: int, context: int, generator: torch.Generator) -> Tensor:
    """``batch`` windows of ``<s>`` and ``context`` tokens from random places of the stream."""
    starts = torch.randint(0, stream.numel() - context, (batch, 1), generator=generator)
    windows = stream[starts + torch.arange(context)]
    return F.pad(windows, (1, 0), value=BOS_ID)


def consecutive_windows(stream: Tensor, context: int) -> list[Tensor]:
    """The stream cut into windows of ``<s>`` and ``context`` tokens, the last one shorter."""
    pieces = [stream[start : start + context] for start in range(0, stream.numel(), context)]
    return [F.pad(piece, (1, 0), value=BOS_ID) for piece in pieces]


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How to configure one architecture and where its routers are.

    Attributes:
        config: from the arguments to its config.
        router_class: name of the module that scores the experts; it returns the [tokens, experts] logits first.
        sizes: defaults of the size options for it.
        facts: rows of the model card that only it has.
    """

    config: Callable[[argparse.Namespace], PreTrainedConfig]
    router_class: str
    sizes: dict[str, int]
    facts: Callable[[PreTrainedConfig], list[list[str]]] = lambda _config: []


def common_fields(args: argparse.Namespace) -> dict[str, Any]:
    """What every architecture's config calls by the same name."""
    return {
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "max_position_embeddings": args.max_positions,
        "num_experts_per_tok": args.top_k,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }


def mixtral_config(args: argparse.Namespace) -> PreTrainedConfig:
    """A Mixtral of about seven million parameters at the default sizes."""
    return MixtralConfig(
        **common_fields(args),
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        head_dim=args.head_dim,
        num_local_experts=args.experts,
        router_aux_loss_coef=args.router_aux_loss_coef,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        sliding_window=None,
    )


def olmoe_config(args: argparse.Namespace) -> PreTrainedConfig:
    """An OLMoE of about five million parameters at the default sizes; its head size is hidden size / heads."""
    return OlmoeConfig(
        **common_fields(args),
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_experts=args.experts,
        router_aux_loss_coef=args.router_aux_loss_coef,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
    )


def nemotron_layers(layers: int) -> list[str]:
    """Mamba and experts in turn, as in Nemotron 3 Nano, with attention after every second Mamba layer."""
    kinds: list[str] = []
    while len(kinds) < layers:
        kinds += ["mamba", "moe", "mamba", "attention", "moe"]
    return kinds[:layers]


def nemotron_config(args: argparse.Namespace) -> PreTrainedConfig:
    """A Nemotron 3 of about six million parameters at the default sizes."""
    return NemotronHConfig(
        **common_fields(args),
        layers_block_type=nemotron_layers(args.layers),
        head_dim=args.head_dim,
        n_routed_experts=args.experts,
        moe_intermediate_size=args.intermediate_size,
        moe_shared_expert_intermediate_size=2 * args.intermediate_size,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        mamba_num_heads=8,
        mamba_head_dim=args.hidden_size // 4,
        ssm_state_size=32,
        n_groups=2,
        conv_kernel=4,
        chunk_size=32,
        tie_word_embeddings=False,
    )


def nemotron_facts(config: Any) -> list[list[str]]:
    """Its layers and the shapes of its Mamba-2 mixers."""
    names = {"linear_attention": "Mamba-2", "full_attention": "attention"}  # what transformers makes of the kinds
    kinds = [names.get(kind, kind) for kind in config.layers_block_type]
    return [
        ["layers by kind", ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))],
        [
            "Mamba-2 heads, head size, state size, groups",
            f"{config.mamba_num_heads}, {config.mamba_head_dim}, {config.ssm_state_size}, {config.n_groups}",
        ],
        ["width of the shared expert", str(config.moe_shared_expert_intermediate_size)],
    ]


# To add an architecture: a function from the arguments to its config, the name of its routers' class, its sizes.
ARCHITECTURES: dict[str, Architecture] = {
    "mixtral": Architecture(
        mixtral_config,
        "MixtralTopKRouter",
        dict(hidden_size=192, intermediate_size=224, layers=6, experts=8, top_k=2, heads=6, kv_heads=2, head_dim=32),
    ),
    "olmoe": Architecture(
        olmoe_config,
        "OlmoeTopKRouter",
        dict(hidden_size=160, intermediate_size=32, layers=4, experts=64, top_k=8, heads=5, kv_heads=5, head_dim=32),
    ),
    "nemotron_h": Architecture(
        nemotron_config,
        "NemotronHTopkRouter",
        dict(hidden_size=160, intermediate_size=72, layers=12, experts=32, top_k=6, heads=6, kv_heads=2, head_dim=32),
        nemotron_facts,
    ),
}


SIZE_HELP = {"intermediate_size": "width of one expert", "top_k": "experts that a token runs"}


def routers(model: nn.Module, architecture: Architecture) -> list[nn.Module]:
    """The model's routers, in layer order."""
    return [module for module in model.modules() if type(module).__name__ == architecture.router_class]


@contextmanager
def recorded_router_logits(model: nn.Module, architecture: Architecture) -> Iterator[list[Tensor]]:
    """Within the block, every forward pass appends each layer's router logits to the yielded list."""
    record: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        logits = output[0]
        record.append(logits.reshape(-1, logits.shape[-1]))

    handles = [router.register_forward_hook(hook) for router in routers(model, architecture)]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def mean_entropies(router_logits: list[Tensor]) -> list[float]:
    """Each layer's router entropy in nats, averaged over the tokens of one pass."""
    probabilities = [logits.detach().float().softmax(dim=-1) for logits in router_logits]
    return [round(float(torch.special.entr(p).sum(dim=-1).mean()), 3) for p in probabilities]


def choice(router: nn.Module, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The experts' scores, which sum to one for a token, and those that it runs ([tokens, top_k]).

    A router with a correction bias scores by a sigmoid and adds the bias for the choice alone.
    """
    bias = getattr(router, "e_score_correction_bias", None)
    if bias is None:
        scores = logits.float().softmax(dim=-1)
        return scores, scores.topk(top_k, dim=-1).indices
    sigmoid = logits.float().sigmoid()
    return sigmoid / sigmoid.sum(dim=-1, keepdim=True), (sigmoid.detach() + bias).topk(top_k, dim=-1).indices


def expert_load(chosen: Tensor, experts: int) -> Tensor:
    """Each expert's share of the choices [tokens, top_k]."""
    return torch.bincount(chosen.flatten(), minlength=experts).float() / chosen.numel()


def load_balancing_loss(gates: list[nn.Module], router_logits: list[Tensor], top_k: int, bias_rate: float) -> Tensor:
    """Switch load-balancing loss (Fedus et al. 2021) of each layer, averaged; 1 when balanced.

    On the way the correction biases, where there are any, move by `bias_rate` towards the experts that were
    chosen too seldom (Wang et al. 2024, "Auxiliary-loss-free load balancing").
    """
    losses = []
    for gate, logits in zip(gates, router_logits, strict=True):
        scores, chosen = choice(gate, logits, top_k)
        experts = logits.shape[-1]
        load = expert_load(chosen, experts)
        losses.append(experts * torch.dot(load, scores.mean(dim=0)))
        bias: Any = getattr(gate, "e_score_correction_bias", None)
        if bias is not None:
            bias += bias_rate * torch.sign(1 / experts - load)
    return torch.stack(losses).mean()


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------


def mean_loss(model: Any, windows: list[Tensor], batch: int = 16) -> float:
    """Mean cross-entropy in nats over every token after ``<s>`` of the windows."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(windows), batch):
        group = windows[start : start + batch]
        by_length: dict[int, list[Tensor]] = {}
        for window in group:
            by_length.setdefault(window.numel(), []).append(window)
        for same in by_length.values():
            ids = torch.stack(same)
            with torch.inference_mode():
                logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            target = ids[:, 1:].flatten()
            total += float(F.cross_entropy(logits.flatten(0, 1).float(), target, reduction="sum"))
            count += target.numel()
    model.train(was_training)
    return total / count


def router_statistics(
    model: Any, architecture: Architecture, windows: list[Tensor], top_k: int
) -> list[dict[str, Any]]:
    """For each layer: every expert's share of the top-k choices, and the spread of router entropy."""
    per_layer: list[list[Tensor]] = [[] for _ in routers(model, architecture)]
    with torch.inference_mode(), recorded_router_logits(model, architecture) as record:
        for window in windows:
            record.clear()
            model(input_ids=window[None, :-1], use_cache=False)
            for layer, logits in enumerate(record):
                per_layer[layer].append(logits.float())
    statistics = []
    for layer, (gate, pieces) in enumerate(zip(routers(model, architecture), per_layer, strict=True)):
        logits = torch.cat(pieces)
        probabilities = logits.softmax(dim=-1)
        entropy = torch.special.entr(probabilities).sum(dim=-1)
        load = expert_load(choice(gate, logits, top_k)[1], logits.shape[-1])
        quantiles = torch.quantile(entropy, torch.tensor(PERCENTILES, dtype=torch.float32) / 100)
        statistics.append(
            {
                "layer": layer,
                "expert_load": [round(value, 4) for value in load.tolist()],
                "entropy_mean": round(float(entropy.mean()), 4),
                "entropy_percentiles": {
                    f"p{percent}": round(value, 4)
                    for percent, value in zip(PERCENTILES, quantiles.tolist(), strict=True)
                },
                "top1_probability_mean": round(float(probabilities.amax(dim=-1).mean()), 4),
            }
        )
    return statistics


# --------------------------------------------------------------------------------------------------
# Checkpoint and model card
# --------------------------------------------------------------------------------------------------


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
        "on a CPU by `examples/train_small_moe.py`. It is here so that routing can be tried on routers that "
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


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


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
