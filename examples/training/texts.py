# SPDX-License-Identifier: Apache-2.0
"""Text to train on: where it comes from, what is held out of it, the tokenizer, and windows of tokens."""

from __future__ import annotations

import dataclasses
import random
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

NewTokenizer: Any = PreTrainedTokenizerFast
SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
UNK_ID, BOS_ID, EOS_ID, PAD_ID = range(4)


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
