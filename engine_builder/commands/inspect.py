# SPDX-License-Identifier: Apache-2.0
"""``adaptive-k inspect``: what is in an engine directory, checked."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("--engine_dir", type=Path, required=True, help="engine directory")
    parser.add_argument("--json", action="store_true", help="print config.json's content instead of tables")


def run(args: argparse.Namespace) -> int:
    """Print model, sizes, policies and files after checking every file's hash."""
    from rich.console import Console
    from rich.table import Table

    from adaptive_k_moe.engine_config import read_engine_config

    config = read_engine_config(args.engine_dir)
    policies = config.policies_for_model()
    if args.json:
        print(json.dumps(config.to_json(), indent=2))
        return 0
    console = Console()
    for title, model in (("model", config.pretrained_config), ("build", config.build_config)):
        table = Table(title=title, show_header=False, title_justify="left")
        for name, value in model.model_dump(exclude_none=True).items():
            table.add_row(name, json.dumps(value) if isinstance(value, (dict, list)) else str(value))
        console.print(table)
    table = Table("policy", "rule", title=f"policies (thresholds in {policies.unit})", title_justify="left")
    for name, rule in policies.to_json()["policies"].items():
        default = " (default)" if name == policies.default else ""
        table.add_row(name + default, json.dumps(rule))
    console.print(table)
    table = Table("file", "bytes", "hash", title="files (hashes verified)", title_justify="left")
    for name, entry in config.files.items():
        table.add_row(name, f"{entry.size:,}", f"{entry.algorithm} {entry.digest[:16]}")
    console.print(table)
    return 0
