# SPDX-License-Identifier: Apache-2.0
"""A plugin of vLLM: its MoE layers follow policies, on vLLM's own kernels.

`register` is the entry point of `vllm.general_plugins`, which vLLM calls in each of its processes. ``runner.py`` gives
MoE layers another router, ``requests.py`` reads policies off requests, ``server.py`` is what both share. All of it goes
through vLLM's own registries.
"""

from __future__ import annotations

from adaptive_k_moe.vllm.configuration import is_asked_for, server_policies


def register() -> None:
    """Let the MoE layers that vLLM makes from here on follow policies, where ADAPTIVE_K_POLICY names a policy file.

    Without it vLLM stays as it is.

    Raises:
        DependencyError: OpenVINO or a package of the policies is missing.
        PolicyError: the policy file is missing or wrong.
    """
    if not is_asked_for():
        return
    server_policies()
    from adaptive_k_moe.vllm.runner import take_over

    take_over()
