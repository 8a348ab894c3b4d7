"""From a request's `response_format` to what holds an answer to it: grammars, compiled beside the event loop.

The ingress writes the grammar and compiles it to refuse early; a replica compiles the same text again for its engine.
llguidance does the work. Knows nothing of HTTP or of how tokens are picked.
"""

import asyncio
import json
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import AddedToken, Tokenizer

from deployments.engine.constraint import Constraint, ConstraintFault
from deployments.errors import NotReady, ResponseFormatRefused
from deployments.protocol.chat import ResponseFormat
from deployments.structured_outputs.json_schema import check_schema
from deployments.text.vocabulary import Vocabulary
from training.base_models.resolve import BaseCheckpoint

SCHEMA_PATH = "response_format.json_schema.schema"
_COMPILE_TIMEOUT_S = 1.5
_CACHE_SIZE = 128
_STACK_BYTES = 256 * 2**20  # the library recurses along `$ref`; pages that it does not touch cost nothing
_END_OF_TEXT = "<|end of grammar|>"
# One space or none after a comma or colon, none elsewhere: with free whitespace small models write little else.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_LIMITS = LLParserLimits(
    max_lexer_states=50_000,  # about 2 kB each
    verbose_errors=False,  # which would have the schema and the answer in them
)


def grammar_of(response_format: ResponseFormat | None) -> str | None:
    """What a response format asks for, as the rule `json` of llguidance's Lark dialect; None for free text.

    Raises:
        ResponseFormatRefused: the schema is not supported.
    """
    if response_format is None or response_format.type == "text":
        return None
    schema: dict[str, Any] = {"type": "object"}
    if response_format.json_schema is not None:
        schema = response_format.json_schema.schema_
        check_schema(schema, SCHEMA_PATH, strict=bool(response_format.json_schema.strict))
    return f"json: %json {json.dumps(schema | {'x-guidance': _JSON_OPTIONS})}"


class GrammarCompiler:
    """Compiles grammars for one tokenizer and keeps the latest `cache_size` of them.

    Args:
        vocabulary: where its decoder takes a space away from the beginning, a text may begin with one.
        timeout_s: how long a caller waits.
    """

    def __init__(
        self,
        base: BaseCheckpoint,
        tokenizer: Tokenizer,
        vocabulary: Vocabulary,
        *,
        cache_size: int = _CACHE_SIZE,
        timeout_s: float = _COMPILE_TIMEOUT_S,
    ) -> None:
        own = Tokenizer.from_str(tokenizer.to_str())
        # Which of the model's tokens end an answer is the chat format's matter: the library gets a sign of its own.
        own.add_special_tokens([AddedToken(_END_OF_TEXT, special=True, normalized=False)])
        end_token_id = own.token_to_id(_END_OF_TEXT)
        assert end_token_id is not None
        self._end_token_id = end_token_id
        num_tokens = max(int(base.llama_config()["vocab_size"]), self._end_token_id + 1)
        self._tokenizer = LLTokenizer(own.to_str(), n_vocab=num_tokens, eos_token=self._end_token_id)
        self._start = 'start: " "? json\n' if vocabulary.strips_first_space else "start: json\n"
        self._cache_size = cache_size
        self._timeout_s = timeout_s
        self._compiled: OrderedDict[str, asyncio.Task[Constraint]] = OrderedDict()  # the latest used last
        self._thread = _thread_with_a_deep_stack()

    async def compile(self, grammar: str) -> Constraint:
        """The beginning of `grammar_of`'s grammar; compiled once, however many ask for it at a time.

        Raises:
            ResponseFormatRefused: it does not compile, takes too long, or no text is of it.
            NotReady: other grammars took all the time.
        """
        compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = self._compiled[grammar] = asyncio.create_task(self._compile_in_time(grammar))
        self._compiled.move_to_end(grammar)
        while len(self._compiled) > self._cache_size:
            self._compiled.popitem(last=False)
        return (await asyncio.shield(compiled)).copy()  # a caller that leaves does not stop the others

    async def _compile_in_time(self, grammar: str) -> Constraint:
        future = self._thread.submit(self._compile, grammar)
        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), self._timeout_s)
        except TimeoutError:
            self._compiled.pop(grammar, None)
            if future.cancel():
                raise NotReady("schemas of other requests are still being compiled: try again") from None
            raise ResponseFormatRefused(
                f"{SCHEMA_PATH}: it does not compile in {self._timeout_s} s: make it smaller", SCHEMA_PATH
            ) from None

    def _compile(self, grammar: str) -> Constraint:
        lark = LLMatcher.grammar_from_lark(self._start + grammar)
        matcher = LLMatcher(self._tokenizer, lark, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            reason = _reason(matcher.get_error())
            if "coerce_one_of" in reason:
                reason = "oneOf needs options that a const property tells apart: use anyOf"
            raise ResponseFormatRefused(f"{SCHEMA_PATH}: {reason}", SCHEMA_PATH)
        constraint = Constraint(matcher, self._end_token_id)
        try:
            constraint.copy().allowed()
        except ConstraintFault as fault:
            raise ResponseFormatRefused(f"{SCHEMA_PATH}: no JSON can be of it: correct it", SCHEMA_PATH) from fault
        return constraint


def _reason(error: str) -> str:
    """What the library says, in one line, without the grammar that it quotes."""
    first, _, _ = error.partition("\n   1 | ")
    _, _, said = first.rpartition("failed to compile JSON schema: ")
    return " ".join(said.removesuffix("<non-verbose/>").split())[:300]


def _thread_with_a_deep_stack() -> ThreadPoolExecutor:
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammars")
    usual = threading.stack_size(_STACK_BYTES)
    try:
        executor.submit(int).result()  # starts the thread
    finally:
        threading.stack_size(usual)
    return executor
