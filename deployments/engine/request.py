"""What goes into the engine and what comes out: plain data, importable without torch."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request picks its tokens.

    Attributes:
        max_tokens: at most so many new tokens, at least 1.
        temperature: 0 is greedy.
        top_p: keep the smallest set of tokens whose probability reaches this (nucleus sampling, arXiv:1904.09751).
        top_k: keep so many of the likeliest tokens; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of every token seen in the prompt
            or the answer (CTRL, arXiv:1909.05858); 1.0 is off.
        seed: start of the request's own random stream; None draws one.
        stop_token_ids: tokens that end the answer and are not part of it.
        ignore_eos: do not stop at `stop_token_ids`.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A prompt to continue. `adapter` is the key of a loaded adapter, None for the base."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What a step adds to an answer. The last delta of a request has a finish_reason, all others None."""

    token_ids: list[int]
    finish_reason: FinishReason | None = None
