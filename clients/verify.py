"""Is a registered adapter served as it was trained? PEFT's answers beside those of Corral's own engine.

Both run in this process, in float32, one after the other: training and serving do not know each other, so they meet
here (promises E2 and E4). `clients.cli.adapters` calls `verify`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from training.base_models.nf4 import Quantization
    from training.base_models.resolve import BaseCheckpoint
    from training.export.peft_reference import Continuation
    from training.registry.manifest import AdapterManifest
    from training.registry.registry import AdapterRegistry

TOLERANCE = 1e-3  # of a log-probability, in nats
_PROMPTS = ("What is the capital of France?", "Write one sentence about rain.", "Name three colours.")


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt, run both ways.

    Attributes:
        answer: the engine's.
        num_tokens: tokens of prompt and answer whose log-probabilities were compared.
        same_tokens: whether the greedy answers, and what ended them, are equal.
        max_difference: the largest difference of two log-probabilities, in nats.
    """

    prompt: str
    answer: str
    num_tokens: int
    same_tokens: bool
    max_difference: float

    @property
    def passed(self) -> bool:
        """Whether both gave the same."""
        return self.same_tokens and self.max_difference <= TOLERANCE


def verify(
    registry: "AdapterRegistry", manifest: "AdapterManifest", prompts: Sequence[str], max_tokens: int
) -> list[Comparison]:
    """Check the version's files against its manifest, then run the prompts with PEFT and with the engine.

    Args:
        prompts: user messages; if there are none, those of the manifest's samples, else a few of our own.

    Raises:
        AdapterRefused: a file is not what the manifest says, or base or adapter cannot be loaded.
        BaseModelError: the base is not here.
    """
    import torch

    from training.base_models.resolve import resolve_base_model
    from training.base_models.tokenizer import load_tokenizer
    from training.chat.detect import load_chat_format
    from training.chat.messages import Message
    from training.export.peft_reference import continue_greedily, load_with_peft
    from training.registry.manifest import check_base

    directory = registry.fetch(manifest)
    base = resolve_base_model(manifest.base.source, manifest.base.revision)
    check_base(manifest, base)
    tokenizer = load_tokenizer(base)
    chat_format = load_chat_format(manifest.chat_format, base, tokenizer)
    prompts = list(prompts) or [sample.prompt for sample in manifest.samples] or list(_PROMPTS)
    rendered = [chat_format.render_prompt([Message("user", prompt)]) for prompt in prompts]
    stop_token_ids = chat_format.stop_token_ids
    quantization = manifest.quantization.model_copy(update={"compute_dtype": "float32"})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    model = load_with_peft(directory, quantization, device)
    expected = [continue_greedily(model, ids, max_tokens, stop_token_ids) for ids in rendered]
    del model
    found = _engine_answers(directory, manifest, base, quantization, device.type, rendered, max_tokens, stop_token_ids)
    return [
        _compare(prompt, tokenizer.decode(ours.token_ids), theirs, ours)
        for prompt, theirs, ours in zip(prompts, expected, found, strict=True)
    ]


def _engine_answers(
    directory: "Path",
    manifest: "AdapterManifest",
    base: "BaseCheckpoint",
    quantization: "Quantization",
    device: str,
    prompts: Sequence[list[int]],
    max_tokens: int,
    stop_token_ids: tuple[int, ...],
) -> "list[Continuation]":
    """All prompts in one batch, as a replica would run them."""
    from safetensors.torch import load_file

    from deployments.engine.engine import Engine
    from deployments.engine.request import Delta, EngineRequest, SamplingParams, merged
    from training.base_models.nf4 import load_quantized
    from training.export.peft_reference import Continuation

    engine = Engine(
        load_quantized(base, quantization, device),
        max_model_len=max(map(len, prompts)) + max_tokens,
        max_num_seqs=len(prompts),
        max_loras=1,
    )
    key = manifest.model_id
    weights = load_file(directory / "adapter_model.safetensors")
    engine.load_adapter(key, engine.lora_weights(weights, manifest.lora.scaling))
    sampling = SamplingParams(
        max_tokens=max_tokens, temperature=0.0, stop_token_ids=stop_token_ids, logprobs=0, prompt_logprobs=0
    )
    received: list[list[Delta]] = [[] for _ in prompts]
    for number, prompt in enumerate(prompts):
        engine.add_request(EngineRequest(str(number), prompt, sampling, key), received[number].extend)
    while engine.step():
        pass
    answers = []
    for deltas in received:
        (whole,) = merged(deltas)
        if whole.finish_reason == "error":
            from training.errors import AdapterRefused

            raise AdapterRefused(f"adapter {key!r} failed in the engine, most likely with NaN: train it again")
        prompt_logprobs = [token.logprob for token in whole.prompt_logprobs or () if token is not None]
        logprobs = [token.logprob for token in whole.logprobs]
        answers.append(Continuation(whole.token_ids, prompt_logprobs, logprobs, whole.finish_reason == "stop"))
    return answers


def _compare(prompt: str, answer: str, theirs: "Continuation", ours: "Continuation") -> Comparison:
    pairs = list(zip(theirs.prompt_logprobs, ours.prompt_logprobs, strict=True))
    for at, (theirs_id, ours_id) in enumerate(zip(theirs.token_ids, ours.token_ids, strict=False)):
        if theirs_id != ours_id:
            break
        pairs.append((theirs.logprobs[at], ours.logprobs[at]))
    return Comparison(
        prompt=prompt,
        answer=answer.strip(),
        num_tokens=len(pairs),
        same_tokens=(theirs.token_ids, theirs.stopped) == (ours.token_ids, ours.stopped),
        max_difference=max(abs(a - b) for a, b in pairs),
    )
