# SPDX-License-Identifier: Apache-2.0
"""A trace of k: for each token that was computed and each MoE layer, the entropy and k; kept in a JSON file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from adaptive_k_moe.errors import RequestError
from adaptive_k_moe.files import write_text
from adaptive_k_moe.runtime.outputs import RequestOutput, rows_of_passes
from adaptive_k_moe.validation import describe_first_error

if TYPE_CHECKING:
    from adaptive_k_moe.runtime import LLM


# JSON has no NaN: it is null in a file.
_Nats = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenTrace(_Model):
    """One token's way through the model. L MoE layers.

    Attributes:
        id: the token's id.
        text: its text.
        part: whether it is of the prompt or of the answer.
        k: L experts that ran.
        entropy: L entropies of the routers, in nats; null in a file is NaN.
    """

    id: int = Field(ge=0)
    text: str
    part: Literal["prompt", "answer"]
    k: list[int]
    entropy: list[_Nats]


class KTrace(_Model):
    """The tokens of one request that were computed: all but the answer's last, which nothing follows.

    Attributes:
        version: of the file's format.
        model: the model's architecture.
        policy: the policy that k followed.
        num_experts: experts of a layer; the entropy is at most its logarithm.
        full_k: the trained top-k.
        tokens: in order.
    """

    version: Literal[1] = 1
    model: str
    policy: str
    num_experts: int = Field(ge=1)
    full_k: int = Field(ge=1)
    tokens: list[TokenTrace]

    @model_validator(mode="after")
    def _consistent(self) -> KTrace:
        widths = {len(values) for token in self.tokens for values in (token.k, token.entropy)}
        if len(widths) > 1:
            raise ValueError("its tokens have different numbers of layers")
        return self

    @classmethod
    def of(cls, output: RequestOutput, llm: LLM) -> KTrace:
        """The trace of a request that has ended; of its first sequence.

        Args:
            output: its last output.
            llm: what answered it; an open tokenizer gives the tokens' texts.
        """
        completion = output.outputs[0]
        model = llm.config.pretrained_config
        num_prompt = len(output.prompt_token_ids)
        ks = rows_of_passes(output.prompt_k, completion.k)
        entropies = rows_of_passes(output.prompt_entropy, completion.entropy)
        answer = completion.token_ids[-len(completion.k) :] if len(completion.k) else []
        token_ids = [*output.prompt_token_ids, *answer][: len(ks)]
        texts = _texts(token_ids, llm)
        return cls(
            model=model.architecture,
            policy=output.policy,
            num_experts=model.moe.num_experts,
            full_k=output.expert_runs.full_k,
            tokens=[
                TokenTrace(
                    id=token_id,
                    text=text,
                    part="prompt" if place < num_prompt else "answer",
                    k=ks[place].tolist(),
                    entropy=[round(value, 6) for value in entropies[place].tolist()],
                )
                for place, (token_id, text) in enumerate(zip(token_ids, texts, strict=True))
            ],
        )

    @classmethod
    def read(cls, path: str | Path) -> KTrace:
        """Open a trace that was saved.

        Raises:
            RequestError: the file cannot be read, or is no trace.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise RequestError(f"cannot read the trace {path}: {error.strerror}.") from None
        except ValidationError as error:
            raise RequestError(f"{path} is no trace of k: {describe_first_error(error)}.") from None

    def save(self, path: str | Path) -> None:
        """Write the trace to a file, whole or not at all.

        Raises:
            RequestError: the file cannot be written.
        """
        try:
            write_text(path, self.model_dump_json() + "\n")
        except OSError as error:
            raise RequestError(f"cannot write the trace {path}: {error.strerror}.") from None

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return len(self.tokens[0].k) if self.tokens else 0

    @property
    def largest_entropy(self) -> float:
        """The most that the entropy can be, in nats."""
        return math.log(self.num_experts) if self.num_experts > 1 else 1.0

    @property
    def k(self) -> npt.NDArray[np.int64]:
        """[tokens, L] experts that ran."""
        return np.array([token.k for token in self.tokens], np.int64).reshape(len(self.tokens), self.num_layers)


def _texts(token_ids: list[int], llm: LLM) -> list[str]:
    tokenizer = llm.tokenizer
    if tokenizer is None:
        return [""] * len(token_ids)
    return [tokenizer.decode([token_id], skip_special_tokens=False) for token_id in token_ids]
