"""From logits to the next tokens: each row with its own request's parameters and random stream.

Called by the engine once a step. A row's result does not depend on the other rows, to the bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deployments.engine.request import SamplingParams, TokenLogprob

_NUM_CANDIDATES = 512  # likeliest tokens that are looked at before all are sorted


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One row of logits and the request it belongs to; `token_ids` is prompt and answer so far."""

    params: SamplingParams
    token_ids: Sequence[int]
    num_prompt_tokens: int
    generator: torch.Generator | None


def random_stream(params: SamplingParams, index: int = 0) -> torch.Generator | None:
    """The random stream of a request's answer `index`, or None when it samples greedily."""
    if params.temperature == 0:
        return None
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed((params.seed + index) % 2**64)
    return generator


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Pick the next token of each row; -1 where the logits are NaN.

    Args:
        logits: [len(rows), vocab_size] float32, not changed.
    """
    highest, likeliest = logits.max(dim=-1)
    usable, tokens = highest.isfinite().tolist(), likeliest.tolist()
    for i, row in enumerate(rows):
        if not usable[i]:
            tokens[i] = -1
        elif not _is_plain_greedy(row):
            tokens[i] = _sample_row(logits[i].cpu(), row)
    return tokens


def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int], nums_top: Sequence[int]) -> list[TokenLogprob]:
    """Log-probability of token i under row i of `logits` ([n, vocab_size]), and of its nums_top[i] likeliest."""
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    values, indices = logprobs.topk(max(nums_top), dim=-1)
    return [
        TokenLogprob(token, logprob, tuple(zip(top[:num], at[:num], strict=True)))
        for token, logprob, num, top, at in zip(
            token_ids, chosen, nums_top, indices.tolist(), values.tolist(), strict=True
        )
    ]


def _must_go_on(row: SamplingRow) -> bool:
    return (
        not row.params.ignore_eos
        and bool(row.params.stop_token_ids)
        and len(row.token_ids) - row.num_prompt_tokens < row.params.min_tokens
    )


def _is_plain_greedy(row: SamplingRow) -> bool:
    p = row.params
    return (
        row.generator is None
        and p.repetition_penalty == 1.0
        and p.presence_penalty == 0.0
        and p.frequency_penalty == 0.0
        and not p.logit_bias
        and not _must_go_on(row)
    )


def _sample_row(logits: torch.Tensor, row: SamplingRow) -> int:
    """In vLLM's order: bias, min_tokens, penalties, temperature, min_p, top_k, top_p."""
    params = row.params
    logits = _adjusted(logits, row)
    if row.generator is None:
        return int(logits.argmax())
    probabilities = (logits / params.temperature).softmax(-1)
    drawn = float(torch.rand((), generator=row.generator, dtype=torch.float64))
    num = params.top_k or probabilities.numel()
    if num == probabilities.numel() and params.top_p >= 1.0 and params.min_p == 0.0:
        mass = probabilities.double().cumsum(-1)
        return min(int(torch.searchsorted(mass, drawn * float(mass[-1]), right=True)), mass.numel() - 1)
    for num_kept in (min(num, _NUM_CANDIDATES), min(num, probabilities.numel())):
        kept, token_ids = probabilities.topk(num_kept)  # likeliest first
        token = _draw(kept.double(), token_ids, params, drawn, whole=num_kept == num)
        if token is not None:
            return token
    raise AssertionError("all tokens were looked at")


def _draw(
    kept: torch.Tensor, token_ids: torch.Tensor, params: SamplingParams, drawn: float, *, whole: bool
) -> int | None:
    """The token at `drawn` of the kept mass; None if more than these tokens may have to be kept."""
    mass = kept.cumsum(-1)
    num = kept.numel()
    num_likely = int((kept >= params.min_p * kept[0]).sum())
    # top_p counts the mass of what top_k and min_p left, so all of that has to be here.
    if not whole and num_likely == num and (params.min_p > 0.0 or params.top_k):
        return None
    if params.top_k or params.min_p > 0.0:
        num = num_likely
        total = float(mass[num - 1])
    else:
        total = 1.0
    num_nucleus = int((mass[:num] - kept[:num] < params.top_p * total).sum())
    if not whole and num_nucleus == mass.numel() and num == mass.numel():
        return None
    last = min(num, num_nucleus) - 1
    place = int(torch.searchsorted(mass[: last + 1], drawn * float(mass[last]), right=True))
    return int(token_ids[min(place, last)])


def _adjusted(logits: torch.Tensor, row: SamplingRow) -> torch.Tensor:
    params = row.params
    logits = logits.clone()
    if params.logit_bias:
        ids, values = zip(*params.logit_bias, strict=True)
        logits[list(ids)] += torch.tensor(values)
    if _must_go_on(row):
        logits[list(params.stop_token_ids)] = -torch.inf
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(row.token_ids).unique()
        at_seen = logits[seen]
        logits[seen] = torch.where(
            at_seen > 0, at_seen / params.repetition_penalty, at_seen * params.repetition_penalty
        )
    answer = row.token_ids[row.num_prompt_tokens :]
    if answer and (params.presence_penalty or params.frequency_penalty):
        seen, counts = torch.tensor(answer).unique(return_counts=True)
        logits[seen] -= params.presence_penalty + params.frequency_penalty * counts
    return logits
