# SPDX-License-Identifier: Apache-2.0
"""The W3C trace context of a request: which caller's trace it belongs to (https://www.w3.org/TR/trace-context/)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class TraceContext(NamedTuple):
    """The caller's span.

    Attributes:
        trace_id: 32 hexadecimal digits.
        span_id: 16 hexadecimal digits.
        headers: `traceparent` and `tracestate` as they came.
    """

    trace_id: str
    span_id: str
    headers: dict[str, str]


def read_trace_context(headers: Mapping[str, str]) -> TraceContext | None:
    """The trace context in some headers; None if there is none, or none that is valid."""
    match = _TRACEPARENT.fullmatch(headers.get("traceparent", "").strip())
    if match is None:
        return None
    version, trace_id, span_id, _, rest = match.groups()
    if version == "ff" or (version == "00" and rest) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    return TraceContext(trace_id, span_id, dict(headers))
