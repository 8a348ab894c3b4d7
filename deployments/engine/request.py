"""What goes into the engine and what comes out: plain data, importable without torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from deployments.engine.constraint import Constraint

FinishReason = Literal["stop", "length", "error"]
MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request picks its tokens.

    Attributes:
        max_tokens: at most so many new tokens; 0 only together with `prompt_logprobs`, to score a text.
        min_tokens: `stop_token_ids` cannot be picked before so many tokens.
        temperature: 0 is greedy.
        top_p: keep the smallest set of tokens whose probability reaches this (nucleus sampling, arXiv:1904.09751).
        top_k: keep so many of the likeliest tokens; 0 keeps all.
        min_p: keep tokens at least this times as likely as the likeliest (arXiv:2407.01082).
        repetition_penalty: divides positive and multiplies negative logits of every token seen in the prompt
            or the answer (CTRL, arXiv:1909.05858); 1.0 is off.
        presence_penalty: subtracted from the logit of every token that the answer has.
        frequency_penalty: subtracted once for each time that the answer has the token.
        logit_bias: (token id, what is added to its logit).
        seed: start of the request's own random stream; None draws one.
        stop_token_ids: tokens that end the answer and are not part of it.
        ignore_eos: do not stop at `stop_token_ids`.
        logprobs: report the log-probability of each new token and of so many of the likeliest; None reports none.
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
    """A token, its log-probability under the model, and the likeliest tokens at its place, likeliest first.

    Taken from the logits as the model gives them, before penalties, bias and temperature, as OpenAI and vLLM do; under
    a constraint among the tokens that it allows, as vLLM does.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What a step adds to an answer. The last delta of an answer has a finish_reason, all others None.

    Attributes:
        index: which of the request's `n` answers.
        logprobs: one for each of `token_ids` when the request asks for them, else empty.
        num_cached_tokens: tokens of the prompt whose keys and values were there already; in the first delta.
        prompt_logprobs: in the first delta of answer 0 when asked for: one for each token of the prompt, None for
            the first token, which nothing predicts.
    """

    token_ids: list[int]
    finish_reason: FinishReason | None = None
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """One delta for each answer, in order of the answers, that says what all of its deltas said."""
    by_index: dict[int, Delta] = {}
    for delta in deltas:
        before = by_index.get(delta.index)
        by_index[delta.index] = delta if before is None else _joined(before, delta)
    return [by_index[index] for index in sorted(by_index)]


def _joined(first: Delta, second: Delta) -> Delta:
    return Delta(
        first.token_ids + second.token_ids,
        second.finish_reason,
        first.index,
        first.logprobs + second.logprobs,
        first.num_cached_tokens,
        first.prompt_logprobs,
    )
