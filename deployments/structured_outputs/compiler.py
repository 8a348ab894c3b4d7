"""Compiles grammars, with llguidance, to the constraints of answers.

Compilation runs off the event loop, on one thread with a time limit. Knows nothing of HTTP or sampling.
"""

import asyncio
import re
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import AddedToken, Tokenizer

from deployments.engine.constraint import Constraint, ConstraintFault
from deployments.errors import NotReady, ResponseFormatRefused
from deployments.structured_outputs.answer_guard import AnswerGuard
from deployments.structured_outputs.grammar import Grammar
from deployments.structured_outputs.json_guard import JsonTokens
from deployments.text.vocabulary import Vocabulary
from training.base_models.resolve import BaseCheckpoint

_COMPILE_TIMEOUT_S = 1.5
_CACHE_SIZE = 128
_STACK_BYTES = 256 * 2**20  # the library recurses along `$ref`; untouched pages cost nothing
_END_OF_TEXT = "<|end of grammar|>"
_LIMITS = LLParserLimits(
    max_lexer_states=50_000,  # about 2 kB each
    verbose_errors=False,  # verbose errors quote the schema and the answer
)


class GrammarCompiler:
    """Compiles grammars for one tokenizer, with an LRU cache of `cache_size` grammars.

    Args:
        vocabulary: if its decoder strips a leading space, answers may start with one.
        timeout_s: maximum time that a caller waits, in seconds.
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
        extended = Tokenizer.from_str(tokenizer.to_str())
        # The chat format decides which tokens end an answer, so the library gets a separate end token.
        extended.add_special_tokens([AddedToken(_END_OF_TEXT, special=True, normalized=False)])
        end_token_id = extended.token_to_id(_END_OF_TEXT)
        assert end_token_id is not None
        self._end_token_id = end_token_id
        num_tokens = max(int(base.llama_config()["vocab_size"]), self._end_token_id + 1)
        self._tokenizer = LLTokenizer(extended.to_str(), n_vocab=num_tokens, eos_token=self._end_token_id)
        self._json_tokens = JsonTokens(vocabulary, num_tokens)
        self._start = 'start: " "? answer\n' if vocabulary.strips_first_space else "start: answer\n"
        self._cache_size = cache_size
        self._timeout_s = timeout_s
        self._compiled: OrderedDict[Grammar, asyncio.Task[Constraint]] = OrderedDict()  # most recently used last
        self._thread = _thread_with_large_stack()

    async def compile(self, grammar: Grammar) -> Constraint:
        """A constraint at the start of a grammar from `grammar_of`; concurrent calls share one compilation.

        Raises:
            ResponseFormatRefused: the grammar does not compile, takes too long to compile, or matches no text.
            NotReady: compiling other grammars took all the time.
        """
        compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = self._compiled[grammar] = asyncio.create_task(self._compile_in_time(grammar))
        self._compiled.move_to_end(grammar)
        while len(self._compiled) > self._cache_size:
            self._compiled.popitem(last=False)
        return (await asyncio.shield(compiled)).copy()  # a cancelled caller does not cancel the others

    async def _compile_in_time(self, grammar: Grammar) -> Constraint:
        future = self._thread.submit(self._compile, grammar)
        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), self._timeout_s)
        except TimeoutError:
            self._compiled.pop(grammar, None)
            if future.cancel():
                raise NotReady("schemas of other requests are still being compiled: send the request again") from None
            raise ResponseFormatRefused(
                f"{grammar.param}: it does not compile within {self._timeout_s} s: make it smaller", grammar.param
            ) from None

    def _compile(self, grammar: Grammar) -> Constraint:
        lark = LLMatcher.grammar_from_lark(self._start + grammar.rules)
        matcher = LLMatcher(self._tokenizer, lark, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            reason = _reason(matcher.get_error())
            if "coerce_one_of" in reason:
                reason = "the options of oneOf must differ in a const property: use anyOf"
            raise ResponseFormatRefused(f"{grammar.param}: {reason}", grammar.param)
        constraint = Constraint(matcher, self._end_token_id, AnswerGuard(self._json_tokens, grammar))
        try:
            constraint.copy().allowed()
        except ConstraintFault as fault:
            raise ResponseFormatRefused(f"{grammar.param}: no JSON can match it: correct it", grammar.param) from fault
        return constraint


def _reason(error: str) -> str:
    """The library's error message in one line, without the grammar that it quotes."""
    first = re.split(r"\s\d+ \| ", error, maxsplit=1)[0]
    _, _, message = first.rpartition("failed to compile JSON schema: ")
    return " ".join(message.removesuffix("<non-verbose/>").split())[:300]


def _thread_with_large_stack() -> ThreadPoolExecutor:
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammars")
    default_bytes = threading.stack_size(_STACK_BYTES)
    try:
        executor.submit(int).result()  # starts the thread
    finally:
        threading.stack_size(default_bytes)
    return executor
