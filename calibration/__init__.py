# SPDX-License-Identifier: Apache-2.0
"""Calibration: what a policy saves and what it costs, measured on a user's own model and text.

`Evaluator` runs text through an engine under any policy; `recording` and `routers` keep what the full model did;
`search` chooses thresholds; `validation` checks the routers' entropies in two ways; `report` draws.
"""
