"""Checks that a registered adapter is served as it was trained: PEFT's answers against those of Corral's engine.

Both run in this process, in float32, one after the other (promises E2 and E4). It is not part of training, because
training does not import the engine.
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
    """One prompt, answered by PEFT and by the engine.

    Attributes:
        answer: of the engine.
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
        """Whether the tokens are equal and the log-probabilities agree within TOLERANCE."""
        return self.same_tokens and self.max_difference <= TOLERANCE


def verify(
    registry: "AdapterRegistry", manifest: "AdapterManifest", prompts: Sequence[str], max_tokens: int
) -> list[Comparison]:
    """Check the version's files against its manifest, then run the prompts with PEFT and with the engine.

    Args:
        prompts: user messages; if empty, the prompts of the manifest's samples, else built-in ones.

    Raises:
        AdapterRefused: a file does not match the manifest, or base or adapter cannot be loaded.
        BaseModelError: the base is not on this machine.
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
    chat_format = load_chat_format(manifest.chat_format, base, tokenizer, default_system=manifest.default_system)
    prompts = list(prompts) or [sample.prompt for sample in manifest.samples] or list(_PROMPTS)
    rendered = [chat_format.render_prompt([Message("user", prompt)]) for prompt in prompts]
    stop_token_ids = chat_format.stop_token_ids
    quantization = manifest.quantization.model_copy(update={"compute_dtype": "float32"})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    model = load_with_peft(directory, quantization, device)
    peft_answers = [continue_greedily(model, ids, max_tokens, stop_token_ids) for ids in rendered]
    del model
    engine_answers = _engine_answers(
        directory, manifest, base, quantization, device.type, rendered, max_tokens, stop_token_ids
    )
    return [
        _compare(prompt, tokenizer.decode(engine.token_ids), peft, engine)
        for prompt, peft, engine in zip(prompts, peft_answers, engine_answers, strict=True)
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
    """Run all prompts in one batch, as a replica would."""
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
        (answer,) = merged(deltas)
        if answer.finish_reason == "error":
            from training.errors import AdapterRefused

            raise AdapterRefused(f"adapter {key!r} failed in the engine, most likely with NaN outputs: train it again")
        prompt_logprobs = [token.logprob for token in answer.prompt_logprobs or () if token is not None]
        logprobs = [token.logprob for token in answer.logprobs]
        answers.append(Continuation(answer.token_ids, prompt_logprobs, logprobs, answer.finish_reason == "stop"))
    return answers


def _compare(prompt: str, answer: str, peft: "Continuation", engine: "Continuation") -> Comparison:
    pairs = list(zip(peft.prompt_logprobs, engine.prompt_logprobs, strict=True))
    for index, (peft_id, engine_id) in enumerate(zip(peft.token_ids, engine.token_ids, strict=False)):
        if peft_id != engine_id:
            break
        pairs.append((peft.logprobs[index], engine.logprobs[index]))
    return Comparison(
        prompt=prompt,
        answer=answer.strip(),
        num_tokens=len(pairs),
        same_tokens=(peft.token_ids, peft.stopped) == (engine.token_ids, engine.stopped),
        max_difference=max(abs(a - b) for a, b in pairs),
    )
