"""Request body -> `GenerationRequest` for a model replica: prompt rendering, length limits, sampling parameters.

Knows nothing of HTTP responses or Ray.
"""

from fastapi.exceptions import RequestValidationError
from tokenizers import Tokenizer

from deployments.engine.request import SamplingParams
from deployments.errors import ContextLengthExceeded
from deployments.protocol.chat import AnyCompletionRequest, ChatCompletionRequest, dialog
from deployments.protocol.completions import CompletionRequest
from deployments.protocol.tokenize import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from deployments.replica.request import GenerationRequest
from deployments.structured_outputs.grammar import grammar_of
from deployments.text.text_encoder import TextEncoder
from deployments.text.vocabulary import Vocabulary
from training.base_models.resolve import BaseCheckpoint
from training.chat.chat_format import ChatFormat
from training.chat.default_system import DefaultSystem
from training.chat.detect import load_chat_format
from training.registry.manifest import AdapterManifest


class RequestRenderer:
    """Renders requests for one base model and its adapters.

    Every method raises RequestValidationError if a token id is not in the vocabulary, or if a text has a character that
    the model has no token for. `chat` and `completion` raise ContextLengthExceeded if prompt and completion are longer
    than `max_model_len` tokens.
    """

    def __init__(
        self,
        base: BaseCheckpoint,
        chat_format: str,
        tokenizer: Tokenizer,
        vocabulary: Vocabulary,
        max_model_len: int,
        *,
        default_system: str,
    ) -> None:
        """`chat_format` and `default_system` are as configured, for the base; the manifests of adapters have theirs."""
        self._base = base
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._base_format = load_chat_format(chat_format, base, tokenizer, default_system=default_system)
        self._formats: dict[tuple[str, DefaultSystem | None], ChatFormat] = {}
        self._text_encoder = TextEncoder(tokenizer, vocabulary)
        self._vocab_size = int(base.llama_config()["vocab_size"])
        self._max_model_len = max_model_len

    def chat(self, body: ChatCompletionRequest, adapter: AdapterManifest | None, request_id: str) -> GenerationRequest:
        """Render messages in the adapter's chat format.

        Raises:
            ChatFormatError: the chat format does not accept the messages.
            ResponseFormatRefused: a schema is not supported.
        """
        chat_format = self._chat_format(adapter)
        grammar = grammar_of(body.response_format, body, chat_format.call_syntax, chat_format.tag_ids)
        prompt_token_ids = chat_format.render_prompt(body.dialog())
        num_tokens = len(prompt_token_ids)
        max_tokens = self._max_tokens(body, num_tokens, "messages", f"the messages take {num_tokens}")
        sampling = self._sampling(body, max_tokens, chat_format)
        may_shorten = body.requested_max_tokens is None
        return GenerationRequest(request_id, prompt_token_ids, sampling, adapter, body.n, grammar, may_shorten)

    def completion(
        self, body: CompletionRequest, adapter: AdapterManifest | None, request_id: str
    ) -> list[GenerationRequest]:
        """Encode each prompt without a chat format."""
        chat_format = self._chat_format(adapter)
        generations: list[GenerationRequest] = []
        for param, prompt in body.prompts():
            prompt_token_ids = self._token_ids(param, prompt)
            num_tokens = len(prompt_token_ids)
            max_tokens = self._max_tokens(body, num_tokens, param, f"{param} takes {num_tokens}")
            sampling = self._sampling(body, max_tokens, chat_format)
            generation_id = f"{request_id}-{len(generations)}"
            generations.append(GenerationRequest(generation_id, prompt_token_ids, sampling, adapter, body.n))
        return generations

    def tokenize(self, body: TokenizeRequest, adapter: AdapterManifest | None) -> TokenizeResponse:
        """The token ids that `chat` or `completion` would send for the same input, without a limit on their number.

        Raises:
            ChatFormatError: the chat format does not accept the messages.
        """
        if body.messages is not None:
            token_ids = self._chat_format(adapter).render_prompt(dialog(body.messages, body.tool_definitions()))
        else:
            token_ids = self._token_ids("prompt", body.prompt or "")
            if body.add_special_tokens is False:
                token_ids = token_ids[len(self._text_encoder.prefix) :]
        token_strs = [self._vocabulary.name(token_id) for token_id in token_ids] if body.return_token_strs else None
        return TokenizeResponse(
            count=len(token_ids), max_model_len=self._max_model_len, tokens=token_ids, token_strs=token_strs
        )

    def detokenize(self, body: DetokenizeRequest) -> DetokenizeResponse:
        """Decode token ids."""
        return DetokenizeResponse(prompt=self._vocabulary.text(self._token_ids("tokens", body.tokens)))

    def _chat_format(self, adapter: AdapterManifest | None) -> ChatFormat:
        if adapter is None:
            return self._base_format
        key = adapter.chat_format, adapter.default_system
        if key not in self._formats:
            self._formats[key] = load_chat_format(
                adapter.chat_format, self._base, self._tokenizer, default_system=adapter.default_system
            )
        return self._formats[key]

    def _token_ids(self, param: str, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, list):
            for index, token_id in enumerate(prompt):
                self._check_token_id(token_id, f"{param}.{index}")
            return prompt
        try:
            return self._text_encoder.encode(prompt)
        except ValueError as error:
            raise _validation_error(param, str(error)) from error

    def _max_tokens(self, body: AnyCompletionRequest, num_prompt_tokens: int, param: str, prompt_size: str) -> int:
        """The requested length of a completion, or else its default, capped by what fits the context."""
        room = self._max_model_len - num_prompt_tokens
        requested = body.requested_max_tokens
        needed = max(1 if requested is None else requested, body.min_tokens)
        if room < needed:
            completion_size = f" and the completion {needed}" if needed > 1 or requested else ""
            raise ContextLengthExceeded(
                # clients recognize OpenAI's "maximum context length"
                f"this model's maximum context length is {self._max_model_len} tokens, but {prompt_size}"
                f"{completion_size}: shorten the prompt or lower max_tokens",
                param if room < 1 or requested is None else "max_tokens",
            )
        return min(room, body.max_tokens or room) if requested is None else requested

    def _sampling(self, body: AnyCompletionRequest, max_tokens: int, chat_format: ChatFormat) -> SamplingParams:
        for token_id in body.token_biases:
            self._check_token_id(token_id, "logit_bias")
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=body.min_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=max(0, body.top_k),
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias=tuple(body.token_biases.items()),
            seed=body.seed,
            stop_token_ids=chat_format.stop_token_ids,
            ignore_eos=body.ignore_eos,
            logprobs=body.num_logprobs,
            prompt_logprobs=body.num_prompt_logprobs,
        )

    def _check_token_id(self, token_id: int, param: str) -> None:
        if token_id >= self._vocab_size:
            message = f"token id {token_id} is out of range for this model (0 to {self._vocab_size - 1})"
            raise _validation_error(param, message)


def _validation_error(param: str, message: str) -> RequestValidationError:
    """An error in a field that only the tokenizer can find, raised as those that the field's type finds."""
    return RequestValidationError([{"type": "value_error", "loc": ("body", *param.split(".")), "msg": message}])
