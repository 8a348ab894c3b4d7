"""From logits to the next token, one request at a time: its own penalty, filters and random stream.

Called by the engine once a step; knows nothing of text, HTTP or other requests.
"""

import torch

from deployments.engine.request import SamplingParams


def random_stream(params: SamplingParams) -> torch.Generator | None:
    """The request's own random stream, or None when it samples greedily."""
    if params.temperature == 0:
        return None
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


def sample(
    logits: torch.Tensor, params: SamplingParams, seen_token_ids: list[int], generator: torch.Generator | None
) -> int:
    """Pick the next token from `logits` ([vocab_size], float32, not changed)."""
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(seen_token_ids, device=logits.device).unique()
        at_seen = logits[seen]
        penalised = torch.where(at_seen > 0, at_seen / params.repetition_penalty, at_seen * params.repetition_penalty)
        logits = logits.index_put((seen,), penalised)
    if generator is None:
        return int(logits.argmax())
    logits = logits.cpu() / params.temperature
    num_kept = min(params.top_k or logits.numel(), logits.numel())
    kept, token_ids = logits.topk(num_kept)  # likeliest first
    probabilities = kept.softmax(-1)
    if params.top_p < 1.0:
        mass_before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(mass_before >= params.top_p, 0.0)
    return int(token_ids[torch.multinomial(probabilities, 1, generator=generator)])
