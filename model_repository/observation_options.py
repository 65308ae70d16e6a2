# SPDX-License-Identifier: Apache-2.0
"""What a server shall write down of its requests, as options and as the parameters of a model's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adaptive_k_moe.arguments import check_fields
from adaptive_k_moe.errors import ServerError

STANDARD_OUTPUT = "-"
"""As the log's name: standard output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservationOptions:
    """What is written down, besides metrics.

    Attributes:
        request_log: file to which a line of JSON is appended for each request; "-" is standard output, None is none.
        log_prompts: write prompts and answers there, too.
        sample: share of the requests that get a line; those that fail always do.
        max_bytes: begin a new log before this size, and keep five old ones; 0 is no limit.
        otlp_endpoint: where OpenTelemetry spans go, `http://HOST:PORT`; None is nowhere.
        ab_db: database of A/B tests, whose running experiment requests take part in; None is none.

    Raises:
        ServerError: a value is of a wrong type or out of range.
    """

    request_log: str | None = None
    log_prompts: bool = False
    sample: float = 1.0
    max_bytes: int = 0
    otlp_endpoint: str | None = None
    ab_db: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, ServerError)
        if not 0 <= self.sample <= 1:
            raise ServerError(f"the share of requests to log is {self.sample:g}: it must be from 0 to 1.")
        if self.max_bytes < 0:
            raise ServerError(f"a log of {self.max_bytes} bytes cannot be kept: give a size, or 0 for no limit.")
        if self.otlp_endpoint is not None:
            from adaptive_k_moe.observability.spans import check_endpoint

            check_endpoint(self.otlp_endpoint)

    def check(self) -> None:
        """See that the log can be written, before a server is started for it.

        Raises:
            ServerError: it cannot.
        """
        if self.request_log is None or self.request_log == STANDARD_OUTPUT:
            return
        from adaptive_k_moe.observability.logs import file_handler

        file_handler(self.request_log).close()

    def to_parameters(self) -> dict[str, str]:
        """As parameters of a model's configuration; what is left at its default is left out.

        Paths are made absolute: the model's process has another working directory.
        """
        log = self.request_log
        given = {
            "request_log": log if log == STANDARD_OUTPUT else _absolute(log),
            "log_prompts": "true" if self.log_prompts else "",
            "log_sample": "" if self.sample == 1.0 else repr(self.sample),
            "log_max_bytes": str(self.max_bytes or ""),
            "otlp_endpoint": self.otlp_endpoint or "",
            "ab_db": _absolute(self.ab_db),
        }
        return {name: value for name, value in given.items() if value}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> ObservationOptions:
        """The inverse of `to_parameters`.

        Raises:
            ServerError: a parameter's value is unusable.
        """
        try:
            return cls(
                request_log=parameters.get("request_log") or None,
                log_prompts=parameters.get("log_prompts", "false").lower() == "true",
                sample=float(parameters.get("log_sample", 1.0)),
                max_bytes=int(parameters.get("log_max_bytes", 0)),
                otlp_endpoint=parameters.get("otlp_endpoint") or None,
                ab_db=parameters.get("ab_db") or None,
            )
        except ValueError as error:
            raise ServerError(f"a parameter of the model's config.pbtxt is no number: {error}.") from None


def _absolute(path: str | None) -> str:
    return str(Path(path).absolute()) if path else ""
