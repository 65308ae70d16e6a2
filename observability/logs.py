# SPDX-License-Identifier: Apache-2.0
"""Structured logs: one line of JSON for each request, by the standard library's `logging`.

Example::

    logger = get_logger("inference")
    logger.log_inference(trace)

Where the lines go, how files rotate and which lines are left out is logging's own business: add handlers and
filters to `logger.logger`. With no handler anywhere, lines go to standard error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import logging.handlers
import math
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from adaptive_k_moe.errors import ServerError
from adaptive_k_moe.observability.inference_trace import InferenceTrace
from adaptive_k_moe.runtime.outputs import RequestOutput

PREFIX = "adaptive_k_moe."
"""What the names of our loggers begin with in `logging`."""

_SECONDS_BETWEEN_SENTENCES = 60.0
_errors = logging.getLogger(f"{PREFIX}observability")
_LEVELS = {"error": logging.ERROR, "refused": logging.WARNING}


class InferenceLogger:
    """Writes a line a request.

    Args:
        logger: where the lines go.
        with_text: write prompts and answers, too. They may be private, so this is never the default.

    Attributes:
        logger: as above, to add handlers and filters to.
    """

    def __init__(self, logger: logging.Logger, *, with_text: bool = False) -> None:
        self.logger = logger
        self._with_text = with_text

    def log_inference(self, trace: InferenceTrace | RequestOutput) -> None:
        """Write the line of a request that has ended.

        Args:
            trace: the request, or its last output.
        """
        if isinstance(trace, RequestOutput):
            trace = InferenceTrace.of(trace)
        level = _LEVELS.get(trace.finish_reason, logging.INFO)
        if not self.logger.isEnabledFor(level):
            return
        # The line is made when a handler asks for it, so those that a filter leaves out cost nothing.
        record = self.logger.makeRecord(
            self.logger.name, level, "", 0, _Line(trace, self._with_text), (), None, extra={"trace": trace}
        )
        if self.logger.hasHandlers():
            self.logger.handle(record)
        elif self.logger.filter(record):
            _LAST_RESORT.handle(record)


class SampleFilter(logging.Filter):
    """Lets a share of the requests through, always the same ones, and every one that failed or was refused.

    Args:
        share: from 0 to 1.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self._limit = share * 2**64

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is written."""
        trace = getattr(record, "trace", None)
        if not isinstance(trace, InferenceTrace) or record.levelno >= logging.WARNING:
            return True
        digest = hashlib.blake2b(trace.request_id.encode(errors="replace"), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self._limit


def get_logger(name: str = "inference", *, with_text: bool = False) -> InferenceLogger:
    """The structured logger of that name; it is `logging.getLogger("adaptive_k_moe." + name)`.

    Args:
        name: what is logged.
        with_text: write prompts and answers, too.
    """
    logger = logging.getLogger(PREFIX + name)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    return InferenceLogger(logger, with_text=with_text)


def file_handler(path: str | Path, *, max_bytes: int = 0, backup_count: int = 5) -> logging.Handler:
    """A handler that appends lines to a file.

    Args:
        path: the file; with no limit it may be moved away by another program, such as logrotate, and is then
            begun anew.
        max_bytes: begin a new file before this size and keep the old ones under numbers; 0 is no limit.
        backup_count: how many old ones.

    Raises:
        ServerError: the file cannot be written.
    """
    handler: logging.Handler
    try:
        if max_bytes:
            handler = _RotatingFile(path, maxBytes=max_bytes, backupCount=backup_count, encoding="utf-8")
        else:
            handler = _WatchedFile(path, encoding="utf-8")
    except OSError as error:
        raise ServerError(f"cannot write the request log {path}: {error.strerror}.") from None
    handler.setFormatter(logging.Formatter("%(message)s"))
    return handler


class _OneSentence(logging.FileHandler):
    """What a full disk makes of a file's handler: now and then a sentence, and no traceback for each line."""

    _said = -math.inf

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        """Say why a line could not be written, once a minute at most."""
        del record
        now = time.monotonic()
        if now - self._said >= _SECONDS_BETWEEN_SENTENCES:
            self._said = now
            _errors.error("the request log %s cannot be written: %s", self.baseFilename, sys.exc_info()[1])

    def close(self) -> None:
        """Close the file; what cannot be written any more is lost."""
        with contextlib.suppress(OSError):
            super().close()


class _RotatingFile(_OneSentence, logging.handlers.RotatingFileHandler):
    pass


class _WatchedFile(_OneSentence, logging.handlers.WatchedFileHandler):
    pass


def as_fields(trace: InferenceTrace, *, with_text: bool = False) -> dict[str, Any]:
    """The fields of a request's line, in their order; what is unknown is left out.

    Args:
        trace: the request.
        with_text: prompts and answers, too.
    """
    fields: dict[str, Any] = {
        "ts": _timestamp(trace.finished),
        "request_id": trace.request_id,
        "batch_index": trace.batch_index or None,
        "trace_id": trace.context.trace_id if trace.context else None,
        "policy": trace.policy,
        "followed": trace.followed and dict(trace.followed),
        "variant": trace.variant,
        "num_input_tokens": trace.num_input_tokens,
        "num_output_tokens": trace.num_output_tokens,
        "avg_k": _rounded(trace.avg_k, 6),
        "compute_saved_ratio": _rounded(trace.compute_saved_ratio, 6),
        "avg_reads": _rounded(trace.avg_reads, 6),
        "reads_per_token": _rounded(trace.reads_per_token, 6),
        "k_histogram": {str(k): count for k, count in trace.k_histogram.items()},
        "latency_ms": _rounded(1e3 * trace.latency_seconds, 3),
        "queue_ms": None if trace.scheduled is None else _rounded(1e3 * (trace.scheduled - trace.arrival), 3),
        "ttft_ms": None if trace.ttft_seconds is None else _rounded(1e3 * trace.ttft_seconds, 3),
        "num_preemptions": trace.num_preemptions or None,
        "finish_reason": trace.finish_reason,
        "error_kind": trace.error_kind,
        "error": trace.error,
    }
    if with_text:
        fields |= {"prompt": trace.prompt, "answers": list(trace.texts)}
    return {name: value for name, value in fields.items() if value is not None}


class _Line:
    """A request's line, made when it is asked for."""

    def __init__(self, trace: InferenceTrace, with_text: bool) -> None:
        self._trace = trace
        self._with_text = with_text

    def __str__(self) -> str:
        return json.dumps(as_fields(self._trace, with_text=self._with_text))


def _timestamp(seconds: float) -> str:
    """RFC 3339, in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


class _StandardError(logging.StreamHandler[Any]):
    """Writes to what standard error is at that moment, as logging's own last resort does."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        """Standard error."""
        return sys.stderr


_LAST_RESORT = _StandardError()
