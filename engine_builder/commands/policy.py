# SPDX-License-Identifier: Apache-2.0
"""``adaptive-k policy``: show or change an engine's policies; nothing is rebuilt."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from adaptive_k_moe.policy_kinds import KINDS, ONE_NUMBER, PARAMETERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's actions and flags."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="print the policies as a policy file")
    set_ = actions.add_parser("set", help="add or replace one policy, or all of them from a file")
    remove = actions.add_parser("remove", help="remove one policy")
    for action in (show, set_, remove):
        action.add_argument("--engine_dir", type=Path, required=True, help="engine directory")
    remove.add_argument("--name", required=True, help="the policy to remove")
    set_.add_argument("--file", type=Path, help="policy file whose content replaces all policies")
    set_.add_argument("--name", help="the policy to add or replace")
    set_.add_argument("--kind", choices=list(KINDS), default="entropy")
    set_.add_argument("--thresholds", type=float, nargs="*", help="entropy: limits between the choices, rising")
    set_.add_argument("--k", type=int, nargs="+", help="entropy: one k more than thresholds; fixed: the k")
    for parameter in PARAMETERS:
        meanings = (f"{name}: {kind.meaning}" for name, kind in KINDS.items() if kind.parameter == parameter)
        set_.add_argument(f"--{parameter}", type=float, help="; ".join(meanings))
    set_.add_argument("--price", type=float, help="shared: what an expert must be worth to the step to be read")
    set_.add_argument("--experts", type=int, help="shared: most experts that the step reads for it, beyond k_min")
    bounded = ", ".join((*ONE_NUMBER, "shared"))
    set_.add_argument("--k_min", type=int, help=f"{bounded}: fewest experts")
    set_.add_argument("--k_max", type=int, help=f"{bounded}: most experts")
    set_.add_argument("--default", action="store_true", help="make it the default policy")


def run(args: argparse.Namespace) -> int:
    """Do the action; ``config.json`` is replaced whole or not at all."""
    from adaptive_k_moe.engine_builder.commands.console import warnings_as_sentences
    from adaptive_k_moe.engine_config import read_engine_config, write_engine_config
    from adaptive_k_moe.errors import PolicyError
    from adaptive_k_moe.policy import FULL, parse_policy_set, read_policy_file

    config = read_engine_config(args.engine_dir, verify_files=False)
    policies = config.policies_for_model()
    if args.action == "show":
        print(json.dumps(policies.to_json(), indent=2))
        return 0
    if args.action == "remove":
        content = policies.to_json()
        if args.name == FULL or content["policies"].pop(args.name, None) is None:
            raise PolicyError(f"policy {args.name!r} cannot be removed: it is {FULL!r} or not in the engine.")
        if content.get("default") == args.name:
            content["default"] = FULL
        policies = parse_policy_set(content, "the remaining policies")
    elif args.file is not None:
        norms = policies.expert_norms
        policies = read_policy_file(args.file)
        if policies.expert_norms is None:  # they are the model's, whoever wrote the file
            policies = policies.model_copy(update={"expert_norms": norms})
    elif args.name is not None:
        policies = policies.with_policy(args.name, _definition(args), default=args.default)
    else:
        raise PolicyError("say which policy: --name NAME with its values, or --file FILE.")
    changed = config.model_copy(update={"adaptive_k": policies})
    with warnings_as_sentences():
        changed = changed.model_copy(update={"adaptive_k": changed.policies_for_model()})
    write_engine_config(args.engine_dir, changed)
    print(f"policies of {args.engine_dir}: {', '.join(changed.adaptive_k.policies)}")
    return 0


def _definition(args: argparse.Namespace) -> dict[str, Any]:
    """The policy's JSON from the flags that were given; a flag of another kind is the schema's to refuse."""
    names = ("thresholds", "k", *PARAMETERS, "price", "experts", "k_min", "k_max")
    given = {name: getattr(args, name) for name in names}
    definition = {"kind": args.kind, **{name: value for name, value in given.items() if value is not None}}
    if args.kind == "fixed" and isinstance(args.k, list) and len(args.k) == 1:
        definition["k"] = args.k[0]
    if args.kind == "entropy":
        definition.setdefault("thresholds", [])
    return definition
