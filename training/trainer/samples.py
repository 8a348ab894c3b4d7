"""Sample answers: greedy answers of base and adapter to held-out prompts, for people who inspect a run."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel

from training.chat.messages import Message
from training.data.run_inputs import RunInputs
from training.registry.manifest import SampleAnswer

_MAX_TOKENS = 64


def sample_answers(
    model: PeftModel, inputs: RunInputs, num_prompts: int, *, with_all_ranks: bool = False
) -> list[SampleAnswer]:
    """Answers for up to `num_prompts` evenly spaced held-out conversations, each cut before its first trained answer.

    Args:
        with_all_ranks: all ranks generate together until the last one has finished, as a sharded base requires.
    """
    conversations = [c for c in inputs.held_out_samples if any(m.learned for m in c.messages)]
    chosen = conversations[:: max(1, len(conversations) // max(1, num_prompts))][:num_prompts]
    if not chosen:
        return []
    firsts = [next(i for i, m in enumerate(c.messages) if m.learned) for c in chosen]
    dialogs = [conversation.messages[:first] for conversation, first in zip(chosen, firsts, strict=True)]
    adapter = generate_answers(model, inputs, dialogs, with_all_ranks=with_all_ranks)
    with model.disable_adapter():
        base = generate_answers(model, inputs, dialogs, with_all_ranks=with_all_ranks)
    return [
        SampleAnswer(
            prompt=conversation.messages[first - 1].content,
            reference=inputs.chat_format.call_syntax.answer(
                conversation.messages[first].content, conversation.messages[first].tool_calls
            ),
            base=base_answer,
            adapter=adapter_answer,
        )
        for conversation, first, base_answer, adapter_answer in zip(chosen, firsts, base, adapter, strict=True)
    ]


@torch.no_grad()
def generate_answers(
    model: PeftModel,
    inputs: RunInputs,
    dialogs: Sequence[Sequence[Message]],
    max_tokens: int = _MAX_TOKENS,
    *,
    with_all_ranks: bool = False,
) -> list[str]:
    """Greedy answers to `dialogs`, in one batch."""
    prompts = [inputs.chat_format.render_prompt(dialog) for dialog in dialogs]
    stop_ids = list(inputs.chat_format.stop_token_ids)
    width = max(map(len, prompts))
    padded = [[stop_ids[0]] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    causal_lm: Any = model
    generated = causal_lm.generate(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max_tokens,
        use_cache=True,  # the trainer turns it off in the model's configuration
        synced_gpus=with_all_ranks,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0],
    )
    answers = []
    for ids in generated[:, width:].tolist():
        end = next((i for i, token_id in enumerate(ids) if token_id in stop_ids), len(ids))
        answers.append(inputs.tokenizer.decode(ids[:end], skip_special_tokens=False).strip())
    return answers
