"""A registered adapter as PEFT and transformers run it: what `corral adapters verify` holds serving against.

Nothing here is fast; it uses the libraries' own loading and generation, as somebody without Corral would.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftModel

from training.base_models.nf4 import (
    Quantization,
    bitsandbytes_config,
    compute_dtype_on,
    forbid_packed_cpu_kernel,
    quiet_loading,
)
from training.errors import AdapterRefused


@dataclass(frozen=True, slots=True)
class Continuation:
    """A greedy answer.

    Attributes:
        token_ids: without the token that ended it.
        prompt_logprobs: of every token of the prompt but the first, which nothing predicts.
        logprobs: of `token_ids`.
        stopped: whether a stop token ended it.
    """

    token_ids: list[int]
    prompt_logprobs: list[float]
    logprobs: list[float]
    stopped: bool


def load_with_peft(directory: Path, quantization: Quantization, device: torch.device) -> PeftModel:
    """`AutoPeftModelForCausalLM.from_pretrained` on a registered folder, its base in 4 bit.

    Raises:
        AdapterRefused: the base that its `adapter_config.json` names is not here.
    """
    dtype: torch.dtype = getattr(torch, compute_dtype_on(device, quantization))
    try:
        with quiet_loading():
            model: Any = AutoPeftModelForCausalLM.from_pretrained(
                str(directory),
                dtype=dtype,
                device_map={"": device},
                attn_implementation="sdpa",
                local_files_only=True,
                quantization_config=bitsandbytes_config(quantization, dtype),
            )
    except OSError as error:
        raise AdapterRefused(
            f"{directory} cannot be loaded with its base ({str(error).splitlines()[0][:200]}): "
            "put the base where base_model_name_or_path in its adapter_config.json says"
        ) from error
    assert isinstance(model, PeftModel)
    if dtype == torch.float32:
        forbid_packed_cpu_kernel(model)
    return model.eval()


@torch.no_grad()
def continue_greedily(
    model: PeftModel, prompt: Sequence[int], max_tokens: int, stop_token_ids: Sequence[int]
) -> Continuation:
    """Up to `max_tokens` greedy tokens after `prompt`, with log-probabilities from one forward over all of it."""
    input_ids = torch.tensor([list(prompt)], device=model.device)
    causal_lm: Any = model
    generated = causal_lm.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=list(stop_token_ids),
        pad_token_id=stop_token_ids[0],
    )
    answer: list[int] = generated[0, len(prompt) :].tolist()
    stopped = bool(answer) and answer[-1] in stop_token_ids
    if stopped:
        answer.pop()
    text = torch.tensor([[*prompt, *answer]], device=model.device)
    logits = causal_lm(input_ids=text, use_cache=False).logits[0, :-1].float()  # [tokens - 1, vocabulary]
    logprobs = logits.log_softmax(-1).gather(1, text[0, 1:, None])[:, 0].tolist()
    first = len(prompt) - 1
    return Continuation(answer, logprobs[:first], logprobs[first:], stopped)
