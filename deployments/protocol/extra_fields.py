"""Request fields of OpenAI's, vLLM's, llama.cpp's and other APIs that Corral does not have.

Such a field is accepted with the values that ask for what happens anyway, and then has no effect. With any other value
it is refused, with a sentence that says what to send instead. null, and an empty list or object, mean "not given".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ExtraField:
    """What happens to a field.

    Attributes:
        values: accepted ones; None accepts any, as the field cannot change a completion.
        instead: what to send instead of other values.
    """

    values: Sequence[Any] | None
    instead: str = ""

    def accepts(self, value: Any) -> bool:
        """Whether a value asks for what happens anyway. 1 is 1.0, but not true."""
        if self.values is None or value is None or value in ([], {}):
            return True
        return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in self.values)


def _only(*values: Any, instead: str = "leave it out") -> ExtraField:
    return ExtraField(values, instead)


_ANY = ExtraField(None)
_ECHOED = ("metadata", "store", "prompt_cache_key", "prompt_cache_retention")  # fields of a response
_JSON_SCHEMA = _only(instead="send response_format with type json_schema, whose schema may have enum and pattern")
_FORMAT = _only(instead="the chat format follows from the model: leave it out")
_READ_TEXT = "the models here read text only"
_TEXT_ONLY = _only(instead=_READ_TEXT)
_NO_REASONING = "the models here do not reason before they answer: leave it out"

# Fields of chat completions and of completions.
GENERATION: Mapping[str, ExtraField] = {
    # OpenAI
    "metadata": _ANY,
    "store": _ANY,  # nothing is stored, so there is nothing to retrieve
    "prompt_cache_key": _ANY,  # all prompts share one prefix cache
    "prompt_cache_retention": _ANY,
    # vLLM
    "use_beam_search": _only(False, instead="beam search is not supported: request n completions and choose"),
    "early_stopping": _only(False, instead="it belongs to beam search, which is not supported: leave it out"),
    "length_penalty": _only(1, instead="it belongs to beam search, which is not supported: leave it out"),
    "best_of": _only(1, instead="request n completions and choose among them"),
    "skip_special_tokens": _only(True, instead="special tokens are no text: their ids are in logprobs"),
    "spaces_between_special_tokens": _ANY,
    "include_stop_str_in_output": _only(False, instead="append the stop string yourself"),
    "stop_token_ids": _only(instead="send stop with strings"),
    "bad_words": _only(instead="send logit_bias with -100 for their tokens, which /tokenize lists"),
    "allowed_token_ids": _only(instead="send response_format, or logit_bias with 100 for these tokens"),
    "prompt_logprobs": _only(instead="send the prompt to /v1/completions with echo, logprobs and max_tokens 0"),
    "truncate_prompt_tokens": _only(instead="shorten the prompt yourself: nothing is cut silently"),
    "return_tokens_as_token_ids": _only(False, instead="/tokenize gives the ids of a text"),
    "return_token_ids": _only(False, instead="/tokenize gives the ids of a text"),
    "priority": _only(0, instead="requests are served in their order: leave it out"),
    "request_id": _only(instead="send it in the header x-request-id"),
    "cache_salt": _only(instead="all callers share one prefix cache: leave it out"),
    "logits_processors": _only(),
    "vllm_xargs": _only(),
    "kv_transfer_params": _only(),
    "guided_json": _JSON_SCHEMA,
    "guided_regex": _JSON_SCHEMA,
    "guided_choice": _JSON_SCHEMA,
    "guided_grammar": _JSON_SCHEMA,
    "guided_decoding_backend": _ANY,  # there is one
    "guided_whitespace_pattern": _only(),
    "structured_outputs": _JSON_SCHEMA,
    # llama.cpp, and those that took its names
    "cache_prompt": _ANY,  # its effect is on speed only
    "n_predict": _only(instead="send max_tokens"),
    "repeat_penalty": _only(1, instead="send repetition_penalty"),
    "repeat_last_n": _only(instead="repetition_penalty counts all tokens: leave it out"),
    "typical_p": _only(1, instead="send top_p or min_p"),
    "typ_p": _only(1, instead="send top_p or min_p"),
    "tfs_z": _only(1, instead="send top_p or min_p"),
    "mirostat": _only(0, instead="send top_p or min_p"),
    "mirostat_tau": _ANY,  # without mirostat it has no effect
    "mirostat_eta": _ANY,
    "dry_multiplier": _only(0, instead="send repetition_penalty or frequency_penalty"),
    "xtc_probability": _only(0, instead="send temperature or min_p"),
    "dynatemp_range": _only(0, instead="send temperature"),
    "grammar": _JSON_SCHEMA,
    "json_schema": _JSON_SCHEMA,
    "samplers": _only(instead="their order is fixed: penalties, temperature, min_p, top_k, top_p"),
    "n_probs": _only(0, instead="send logprobs"),
    "id_slot": _only(-1),
    "timings_per_token": _only(False, instead="/metrics has the server's speed"),
    # Ollama
    "keep_alive": _ANY,  # the model stays loaded
    "options": _only(instead="send its members as fields of the request"),
    "format": _JSON_SCHEMA,
    "think": _only(False, instead=_NO_REASONING),
}

CHAT: Mapping[str, ExtraField] = {
    **GENERATION,
    # OpenAI
    "functions": _only(instead="it is the old name of tools: send tools"),
    "function_call": _only("none", "auto", instead="it is the old name of tool_choice: send tool_choice"),
    "verbosity": _ANY,
    "prediction": _ANY,  # its effect is on speed only
    "modalities": _only(["text"], instead="the models here write text only"),
    "audio": _only(instead="the models here write text only"),
    "reasoning_effort": _only("none", "minimal", instead=_NO_REASONING),
    "reasoning": _only(instead=_NO_REASONING),
    "include_reasoning": _ANY,  # there is none
    "web_search_options": _only(instead="there is no web search here: leave it out"),
    "plugins": _only(),
    # vLLM
    "add_generation_prompt": _only(True, instead="send the rendered text to /v1/completions"),
    "continue_final_message": _only(False, instead="send the rendered text to /v1/completions"),
    "add_special_tokens": _only(False, instead="the chat format adds its own: leave it out"),
    "echo": _only(False, instead="the prompt is what you sent; /v1/completions has echo"),
    "documents": _only(instead="put them into a message"),
    "chat_template": _FORMAT,
    "chat_template_kwargs": _only(
        {"enable_thinking": False}, {"thinking": False}, instead="chat formats have no options"
    ),
    "mm_processor_kwargs": _TEXT_ONLY,
}

TOKENIZE: Mapping[str, ExtraField] = {
    name: CHAT[name]
    for name in (
        *("add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs"),
        "mm_processor_kwargs",
    )
}

MESSAGE: Mapping[str, ExtraField] = {
    # What client libraries write into the assistant's message and send back.
    "refusal": _only(instead="send it as content"),
    "annotations": _ANY,
    "audio": _TEXT_ONLY,
    "function_call": _only(instead="it is the old form of tool_calls: send tool_calls"),
    "parsed": _ANY,  # the content as an object
    "reasoning_content": _ANY,  # earlier reasoning is not part of a prompt
    "reasoning": _ANY,
    "provider_specific_fields": _ANY,
    "images": _TEXT_ONLY,
    "cache_control": _ANY,  # the prefix cache needs no marks
    "prefix": _only(False, instead="send the rendered text to /v1/completions"),
    "partial": _only(False, instead="send the rendered text to /v1/completions"),
}

TEXT_PART: Mapping[str, ExtraField] = {
    "cache_control": _ANY,
    "annotations": _ANY,
    "prompt_cache_breakpoint": _ANY,
    **dict.fromkeys(("image_url", "input_audio", "audio_url", "video_url", "file", "file_data", "image"), _TEXT_ONLY),
}

TOOL: Mapping[str, ExtraField] = {
    "custom": _only(instead="send type function, and run it yourself"),
    "cache_control": _ANY,
    "eager_input_streaming": _ANY,
    "defer_loading": _only(False, instead="every tool stands in the prompt: leave it out"),
}

TOOL_FUNCTION: Mapping[str, ExtraField] = {
    "cache_control": _ANY,
    "annotations": _ANY,  # of the Model Context Protocol, for the program that runs the tool
    "title": _ANY,
    "outputSchema": _ANY,
    "returns": _ANY,  # what transformers' get_json_schema reads from a docstring
    "return": _ANY,
}

TOOL_CALL: Mapping[str, ExtraField] = {
    "index": _ANY,  # of the stream that the message was put together from
    "provider_specific_fields": _ANY,
    "extra_content": _ANY,
    "cache_control": _ANY,
}

CALLED_FUNCTION: Mapping[str, ExtraField] = {
    "parsed_arguments": _ANY,  # the arguments as an object, which openai's `parse` adds
}

STREAM_OPTIONS: Mapping[str, ExtraField] = {
    "include_obfuscation": _only(False, instead="chunks are not padded: leave it out"),
}

_RESPONSES_TEXT = _only(instead="send text.format with type json_schema, whose schema may have enum and pattern")

RESPONSE: Mapping[str, ExtraField] = {
    **{name: field for name, field in GENERATION.items() if name not in _ECHOED},
    **{name: _RESPONSES_TEXT for name, field in GENERATION.items() if field is _JSON_SCHEMA},
    # OpenAI
    "background": _only(False, instead="a response is complete when its request ends: send stream, or leave it out"),
    "background_options": _only(instead="background is not supported: leave it out"),
    "conversation": _only(instead="conversations are not kept: send previous_response_id"),
    "context_management": _only(instead="nothing is cut or summarized silently: leave it out"),
    "prompt": _only(instead="there are no prompt templates here: send instructions and input"),
    "truncation": _only("disabled", instead="nothing is cut silently: leave it out, and shorten the input yourself"),
    "max_tool_calls": _ANY,  # it limits OpenAI's own tools
    "moderation": _only(instead="nothing is moderated here: leave it out"),
    "access_programs": _only({"cyber": "standard"}),
    "image": _ANY,  # there are none to compress
    # fields of chat completions
    "messages": _only(instead="send input, which takes messages too"),
    "max_tokens": _only(instead="send max_output_tokens"),
    "max_completion_tokens": _only(instead="send max_output_tokens"),
    "response_format": _only(instead="send text.format"),
    "n": _only(1, instead="send one request for each, or send them to /v1/chat/completions"),
    "logprobs": _only(False, instead='send include with "message.output_text.logprobs"'),
    "functions": CHAT["functions"],
    "function_call": CHAT["function_call"],
    "best_of": _only(1, instead="send one request for each and choose among them"),
    "n_predict": _only(instead="send max_output_tokens"),
    "verbosity": _ANY,
    "reasoning_effort": CHAT["reasoning_effort"],
    "include_reasoning": _ANY,  # there is none
    "modalities": CHAT["modalities"],
    "chat_template": _FORMAT,
    "chat_template_kwargs": CHAT["chat_template_kwargs"],
    "mm_processor_kwargs": _TEXT_ONLY,
}

RESPONSE_MESSAGE: Mapping[str, ExtraField] = {
    **MESSAGE,
    "function_call": _only(instead="send an item of type function_call"),
    "tool_calls": _only(instead="send items of type function_call"),
    "tool_call_id": _only(instead="send an item of type function_call_output"),
    "phase": _ANY,  # whether it was a final answer
    "name": _ANY,
    "created_by": _ANY,
}

RESPONSE_PART: Mapping[str, ExtraField] = {
    **TEXT_PART,
    "logprobs": _ANY,  # of an earlier answer: they are not part of a prompt
    "parsed": _ANY,
}

RESPONSE_TOOL: Mapping[str, ExtraField] = {
    **TOOL,
    **TOOL_FUNCTION,
    "function": _only(instead="send its members as fields of the tool"),
    "allowed_callers": _only(["direct"]),
    "async": _only(False),
    "output_schema": _ANY,
}

RESPONSE_CALL: Mapping[str, ExtraField] = {
    "caller": _ANY,
    "namespace": _ANY,
    "async": _ANY,
    "created_by": _ANY,
    "parsed_arguments": _ANY,  # what OpenAI's package adds
}

REASONING: Mapping[str, ExtraField] = {
    "effort": _only("none", "minimal", instead=_NO_REASONING),
    "summary": _ANY,
    "generate_summary": _ANY,
    "context": _ANY,
    "mode": _only("standard", instead=_NO_REASONING),
}

PROMPT_CACHE_OPTIONS: Mapping[str, ExtraField] = {
    "mode": _ANY,
    "ttl": _ANY,
    "comparison_response_id": _ANY,
    "prewarm": _only(False, instead="the request's prompt is cached when it is answered: leave it out"),
}

RESPONSE_STREAM_OPTIONS: Mapping[str, ExtraField] = {
    **STREAM_OPTIONS,
    "include_usage": _ANY,  # the last event has it anyway
}
