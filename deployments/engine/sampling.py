"""From logits to the next token of every running request, each with its own penalties, filters and random stream.

The result of a row depends on that row alone, bit for bit: greedy rows share one argmax, everything else is computed
row by row. Knows nothing of text, HTTP, sequences or adapters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from deployments.engine.constraint import PackedMask
from deployments.engine.request import MAX_LOGPROBS, SamplingParams, TokenLogprob

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_GREEDY_BELOW = 1e-5  # temperature; vLLM's threshold, vllm/v1/sample/sampler.py
_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float64).tiny)
_BLOCK = 256  # tokens summed together, to find the block of the drawn token first
# From this top_p on, draw from all tokens until one is in the nucleus: at most two draws on average, and no sorting.
_LARGE_TOP_P = 0.5
# Other filters sort only the tokens within a reach of the largest logit, in units of the temperature; if that is too
# few, within the next one.
_REACHES = (4.0, 7.0, 10.0, 14.0, math.inf)


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One row of logits and the request it belongs to.

    Attributes:
        token_ids: prompt and answer so far.
        generator: from `random_stream`; None samples greedily.
    """

    params: SamplingParams
    token_ids: Sequence[int]
    num_prompt_tokens: int
    generator: torch.Generator | None


def random_stream(params: SamplingParams, index: int = 0) -> torch.Generator | None:
    """The random stream of answer `index`, or None if it samples greedily."""
    if params.temperature < _GREEDY_BELOW:
        return None
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed((params.seed + index) % 2**64)
    return generator


def forbid(logits: torch.Tensor, masks: dict[int, PackedMask]) -> None:
    """Set the logits of all tokens that a row's mask does not allow to -infinity, in place.

    Args:
        logits: [n, vocab_size], any device; rows without a mask stay unchanged.
        masks: by row.
    """
    if masks:
        bits = np.unpackbits(np.stack(list(masks.values())), axis=1, count=logits.shape[-1], bitorder="little")
        for row, allowed in zip(masks, torch.from_numpy(bits.view(np.bool_)).to(logits.device), strict=True):
            logits[row] += torch.where(allowed, 0.0, -math.inf)  # a sum, so that NaN stays NaN and is detected


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Sample the next token of every row.

    The order is vLLM's (vllm/v1/sample/sampler.py): logit_bias, min_tokens, penalties, temperature, min_p, top_k,
    top_p. Ties are broken in favor of the lower token id.

    Args:
        logits: [len(rows), vocab_size], float32, any device; not changed.

    Returns:
        One token per row, -1 where the row has NaN or no finite maximum.
    """
    tokens, maxima = _argmax(logits)
    others = [i for i, row in enumerate(rows) if row.generator is not None or _adjusts_logits(row)]
    if others:
        table = (logits if len(others) == len(rows) else logits[others]).cpu().numpy()
        for i, values in zip(others, table, strict=True):
            row = rows[i]
            if _adjusts_logits(row) and not math.isnan(maxima[i]):
                values = _adjusted_logits(values, row)
                tokens[i] = values.argmax()
                maxima[i] = values[tokens[i]]
            if row.generator is not None and math.isfinite(maxima[i]):
                tokens[i] = _draw(values, float(maxima[i]), row.params, row.generator)
    return [int(token) for token in np.where(np.isfinite(maxima), tokens, -1)]


def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int], nums_top: Sequence[int]) -> list[TokenLogprob]:
    """Log-probability of token i in row i of `logits` ([n, vocab_size], raw), and the row's `nums_top[i]` likeliest.

    At most MAX_LOGPROBS are reported, and no token with probability 0.
    """
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    if not any(nums_top):
        return [TokenLogprob(token, logprob) for token, logprob in zip(token_ids, chosen, strict=True)]
    # The same k for all rows, and ranked by logit: neither other rows nor the rounding of logprobs affect the order.
    values, top_ids = logits.topk(min(MAX_LOGPROBS, logits.shape[-1]))
    tops = zip((-values).tolist(), top_ids.tolist(), logprobs.gather(1, top_ids).tolist(), strict=True)
    return [
        TokenLogprob(
            token,
            logprob,
            tuple((i, at_i) for least, i, at_i in sorted(zip(*top, strict=True))[:num_top] if least < math.inf),
        )
        for token, logprob, num_top, top in zip(token_ids, chosen, nums_top, tops, strict=True)
    ]


def _argmax(logits: torch.Tensor) -> tuple[npt.NDArray[np.int64], Floats]:
    """The likeliest token of every row and its logit, which is NaN if the row has one."""
    if logits.device.type == "cpu":  # numpy's argmax takes a tenth of torch's time
        table: Floats = logits.numpy()
        tokens = table.argmax(-1)
        return tokens, table[np.arange(len(table)), tokens]
    maxima, indices = logits.max(-1)
    return indices.cpu().numpy(), maxima.cpu().numpy()


def _adjusts_logits(row: SamplingRow) -> bool:
    params = row.params
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
        or _below_min_tokens(row)
    )


def _below_min_tokens(row: SamplingRow) -> bool:
    """Whether stop tokens are banned for now. With ignore_eos they do not end the answer, so they stay allowed."""
    num_output_tokens = len(row.token_ids) - row.num_prompt_tokens
    return num_output_tokens < row.params.min_tokens and bool(row.params.stop_token_ids) and not row.params.ignore_eos


def _adjusted_logits(logits: Floats, row: SamplingRow) -> Floats:
    """A copy of the row's logits with logit_bias, banned stop tokens and penalties applied."""
    params = row.params
    logits = logits.copy()
    if params.logit_bias:
        token_ids, biases = zip(*params.logit_bias, strict=True)
        np.add.at(logits, list(token_ids), np.array(biases, np.float32))
    if _below_min_tokens(row):
        logits[list(params.stop_token_ids)] = -math.inf
    if params.repetition_penalty != 1:
        repeated = np.fromiter(row.token_ids, np.int64, len(row.token_ids))  # duplicates get the same value twice
        unpenalized = logits[repeated].astype(np.float64)
        with np.errstate(over="ignore"):  # a tiny penalty may overflow: clamp, so that the logit stays finite
            divided = np.minimum(unpenalized / params.repetition_penalty, _LARGEST)
        logits[repeated] = np.where(unpenalized > 0, divided, unpenalized * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        answer = row.token_ids[row.num_prompt_tokens :]
        counts = np.bincount(np.fromiter(answer, np.int64, len(answer)))
        answer_ids = np.flatnonzero(counts)
        logits[answer_ids] -= params.presence_penalty + params.frequency_penalty * counts[answer_ids]
    return logits


def _draw(logits: Floats, maximum: float, params: SamplingParams, generator: torch.Generator) -> int:
    """Draw a token after temperature and filters; `maximum` is the largest logit, and finite."""
    if params.min_p > 0 or 0 < params.top_k < logits.size:
        return _draw_filtered(logits, maximum, params, generator, None)
    with np.errstate(over="ignore"):
        weights = logits - np.float32(maximum)
        weights /= params.temperature
    np.exp(weights, out=weights)
    running_sum = np.add.reduceat(weights, np.arange(0, weights.size, _BLOCK)).cumsum(dtype=np.float64)
    total = float(running_sum[-1])
    if params.top_p < _LARGE_TOP_P:
        return _draw_filtered(logits, maximum, params, generator, total)
    while True:
        target = _uniform(generator) * total
        block = _index_at(running_sum, target)
        start = block * _BLOCK
        weight_before = float(running_sum[block - 1]) if block else 0.0
        token = start + _index_at(weights[start : start + _BLOCK].cumsum(dtype=np.float64), target - weight_before)
        if params.top_p >= 1 or _weight_of_likelier(token, logits, weights) < params.top_p * total:
            return token


def _weight_of_likelier(token: int, logits: Floats, weights: Floats) -> float:
    """Total weight of the tokens that precede this one in the order from likeliest to least likely."""
    num_equal_before = np.count_nonzero(logits[:token] == logits[token])
    return float((weights * (logits > logits[token])).sum()) + num_equal_before * float(weights[token])


def _draw_filtered(
    logits: Floats, maximum: float, params: SamplingParams, generator: torch.Generator, total: float | None
) -> int:
    """Draw from the tokens that the filters keep, by sorting only the likeliest ones.

    Args:
        total: weight of all tokens, relative to the likeliest token's; None if top_p applies to what min_p and top_k
            keep.
    """
    attempts = (_kept_tokens(logits, maximum, params, total, reach) for reach in _REACHES)
    likeliest, running_sum = next(result for result in attempts if result is not None)
    position = _index_at(running_sum, _uniform(generator) * float(running_sum[-1]))
    logit = likeliest[position]
    num_equal_before = np.count_nonzero(likeliest[:position] == logit)
    return int(np.flatnonzero(logits == logit)[num_equal_before])


def _kept_tokens(
    logits: Floats, maximum: float, params: SamplingParams, total: float | None, reach: float
) -> tuple[Floats, Doubles] | None:
    """The logits that the filters keep, likeliest first, and the running sum of their weights.

    None if the filters may keep tokens beyond `reach`. A larger reach only appends to the sorted logits, so the
    results are the same.
    """
    in_reach = logits[logits >= maximum - reach * params.temperature]
    if 0 < params.top_k < in_reach.size:
        in_reach = np.partition(in_reach, -params.top_k)[-params.top_k :]
    likeliest = np.sort(in_reach)[::-1]
    weights = np.exp((likeliest.astype(np.float64) - maximum) / params.temperature)
    num_kept = int(np.count_nonzero(weights >= max(params.min_p, _SMALLEST)))
    all_in_reach = math.isinf(reach) or num_kept < len(weights) or num_kept == params.top_k
    if total is None and not all_in_reach:
        return None
    running_sum = weights[:num_kept].cumsum()
    last = int(running_sum.searchsorted(params.top_p * (total or running_sum[-1])))
    if last == num_kept and not all_in_reach:
        return None
    return likeliest, running_sum[: last + 1]


def _uniform(generator: torch.Generator) -> float:
    return torch.rand((), dtype=torch.float64, generator=generator).item()


def _index_at(running_sum: Doubles, target: float) -> int:
    """Index of the item whose interval contains `target`; despite rounding never one of weight 0 or past the end."""
    last = running_sum.searchsorted(running_sum[-1])
    return int(min(running_sum.searchsorted(target, side="right"), last))
