"""Requests to the engine and the deltas that it returns. Plain data, importable without torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from deployments.engine.constraint import Constraint

FinishReason = Literal["stop", "length", "error"]
MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of a request are sampled.

    Attributes:
        max_tokens: maximum number of new tokens; 0 only together with `prompt_logprobs`, to score a text.
        min_tokens: number of new tokens before which `stop_token_ids` cannot be sampled.
        temperature: 0 is greedy.
        top_p: keep the smallest set of tokens whose probability reaches this (nucleus sampling, arXiv:1904.09751).
        top_k: number of likeliest tokens to keep; 0 keeps all.
        min_p: keep tokens with at least this fraction of the likeliest token's probability (arXiv:2407.01082).
        repetition_penalty: divides positive and multiplies negative logits of every token of the prompt
            or the answer (CTRL, arXiv:1909.05858); 1.0 is off.
        presence_penalty: subtracted from the logit of every token that occurs in the answer.
        frequency_penalty: subtracted from a token's logit once per occurrence in the answer.
        logit_bias: pairs of a token id and the value added to its logit.
        seed: seed of the request's own random stream; None draws one.
        stop_token_ids: tokens that end the answer and are not part of it.
        ignore_eos: whether to continue past `stop_token_ids`.
        logprobs: number of likeliest tokens whose log-probabilities are reported beside each new token's own; None
            reports none.
        prompt_logprobs: the same for the tokens of the prompt.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A prompt to continue `n` times. `adapter` is the key of a loaded adapter, None for the base.

    Answer `i` of a seeded request draws from the stream of `seed + i`, and follows its own copy of `constraint`.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    adapter: str | None = None
    n: int = 1
    constraint: "Constraint | None" = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its log-probability under the model, and the likeliest tokens at its position, likeliest first.

    Computed from the raw logits, before penalties, bias and temperature, as in OpenAI's API and vLLM; under a
    constraint, over the tokens that it allows, as in vLLM.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """The tokens that a step adds to an answer. Only the last delta of an answer has a finish_reason.

    Attributes:
        index: index of the answer, 0 to n - 1.
        logprobs: one for each of `token_ids` if the request has `logprobs`, else empty.
        num_cached_tokens: prompt tokens found in the prefix cache; in the first delta only.
        prompt_logprobs: in the first delta of answer 0, if requested: one for each prompt token, None for the first,
            which nothing predicts.
    """

    token_ids: list[int]
    finish_reason: FinishReason | None = None
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """Concatenate the deltas of each answer; one delta per answer, in order of `index`."""
    by_index: dict[int, Delta] = {}
    for delta in deltas:
        previous = by_index.get(delta.index)
        by_index[delta.index] = delta if previous is None else _concatenate(previous, delta)
    return [by_index[index] for index in sorted(by_index)]


def _concatenate(first: Delta, second: Delta) -> Delta:
    return Delta(
        first.token_ids + second.token_ids,
        second.finish_reason,
        first.index,
        first.logprobs + second.logprobs,
        first.num_cached_tokens,
        first.prompt_logprobs,
    )
