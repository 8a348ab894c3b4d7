"""Token deltas -> text deltas: the completions of a prompt, before they are formatted as OpenAI's responses.

A `PromptOutput` takes the token deltas that a replica sends for one prompt. Knows nothing of HTTP, chats or adapters.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass

from deployments.engine.request import Delta, TokenLogprob
from deployments.errors import EngineFault
from deployments.protocol.base import FinishReason
from deployments.replica.request import GenerationRequest
from deployments.text.detokenizer import Detokenizer, SentText
from deployments.text.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token, the character offset at which it begins in its completion, and its log-probability.

    `logprob` is None for the first token of an echoed prompt, which nothing predicts.
    """

    token_id: int
    offset: int
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that continues the completion `index`; `tokens` is empty unless log-probabilities were requested.

    The last delta of a completion has a finish_reason.
    """

    index: int
    text: str
    tokens: list[ScoredToken]
    finish_reason: FinishReason | None = None


def merge_deltas(deltas: Iterable[TextDelta]) -> list[TextDelta]:
    """One delta for each index, in order of the index: all deltas of a stream become one per completion."""
    by_index: dict[int, list[TextDelta]] = {}
    for delta in deltas:
        by_index.setdefault(delta.index, []).append(delta)
    return [
        TextDelta(
            index,
            "".join(part.text for part in parts),
            [token for part in parts for token in part.tokens],
            parts[-1].finish_reason,
        )
        for index, parts in sorted(by_index.items())
    ]


async def interleaved(
    streams: Sequence[AsyncGenerator[list[TextDelta], None]],
) -> AsyncGenerator[list[TextDelta], None]:
    """Items of all streams as they arrive; an error in one stream, or closing this generator, closes all streams."""
    pending = {asyncio.ensure_future(anext(stream)): stream for stream in streams}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                stream = pending.pop(future)
                if not isinstance(future.exception(), StopAsyncIteration):
                    item = future.result()
                    pending[asyncio.ensure_future(anext(stream))] = stream
                    yield item
    finally:
        for future in pending:
            future.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


class PromptOutput:
    """The `n` completions of one prompt while they are generated.

    Args:
        generation: the request to the replica; text deltas have tokens if its sampling has logprobs.
        vocabulary: of the model's tokenizer.
        stop: strings that end a completion where they begin.
        first_index: index of the first completion.
        continues_prompt: a completion continues the prompt's text; otherwise it is a text of its own, as a message is.
        echo: prepend the prompt to every completion; `generation` then has prompt_logprobs if it has logprobs.

    Attributes:
        num_cached_tokens: prompt tokens that were in the prefix cache.
    """

    def __init__(
        self,
        generation: GenerationRequest,
        vocabulary: Vocabulary,
        stop: Sequence[str] = (),
        *,
        first_index: int = 0,
        continues_prompt: bool = False,
        echo: bool = False,
    ) -> None:
        sampling, prompt_token_ids = generation.sampling, generation.prompt_token_ids
        self.generation = generation
        self.num_cached_tokens = 0
        self._with_tokens = sampling.logprobs is not None
        self._prompt_text = _text_of(prompt_token_ids, vocabulary) if echo else None
        self._prompt_logprobs: Sequence[TokenLogprob | None] | None = None
        self._held_back: list[Delta] = []
        self._completions = [
            CompletionStream(
                first_index + i,
                Detokenizer(
                    vocabulary,
                    stop,
                    min_tokens=sampling.min_tokens,
                    prompt_token_ids=prompt_token_ids if continues_prompt else (),
                ),
                offset=len(self._prompt_text.text) if self._prompt_text else 0,
            )
            for i in range(generation.n)
        ]

    @property
    def num_tokens(self) -> int:
        """Tokens of all completions so far."""
        return sum(completion.detokenizer.num_tokens for completion in self._completions)

    @property
    def finished(self) -> bool:
        """Whether every completion has its finish_reason, so that the replica may stop."""
        return all(completion.finished for completion in self._completions)

    def add(self, deltas: Sequence[Delta]) -> list[TextDelta]:
        """Turn token deltas into at most one text delta for each completion; tokens after a stop string are dropped.

        Raises:
            EngineFault: the engine failed on a completion.
        """
        text_deltas = []
        for delta in self._after_prompt_logprobs(deltas):
            if delta.index == 0:
                self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
            completion = self._completions[delta.index]
            if completion.finished:
                continue
            if self._prompt_text is not None and not completion.started:
                prompt_tokens = self._prompt_tokens(self._prompt_text)
                text_deltas.append(TextDelta(completion.index, self._prompt_text.text, prompt_tokens))
            text_deltas.append(completion.add(delta))
        return [delta for delta in merge_deltas(text_deltas) if delta.text or delta.tokens or delta.finish_reason]

    def _after_prompt_logprobs(self, deltas: Sequence[Delta]) -> Sequence[Delta]:
        """Hold deltas back until completion 0 has delivered the log-probabilities of an echoed prompt."""
        if self._prompt_text is None or not self._with_tokens or self._prompt_logprobs is not None:
            return deltas
        self._held_back += deltas
        candidates = (delta.prompt_logprobs for delta in self._held_back)
        self._prompt_logprobs = next((logprobs for logprobs in candidates if logprobs is not None), None)
        if self._prompt_logprobs is None:
            return []
        ready, self._held_back = self._held_back, []
        return ready

    def _prompt_tokens(self, prompt: SentText) -> list[ScoredToken]:
        if self._prompt_logprobs is None:
            return []
        triples = zip(self.generation.prompt_token_ids, prompt.token_offsets, self._prompt_logprobs, strict=True)
        return [ScoredToken(*triple) for triple in triples]


class CompletionStream:
    """One completion. `offset` is where its generated text begins, in characters: after an echoed prompt."""

    def __init__(self, index: int, detokenizer: Detokenizer, offset: int) -> None:
        self.index = index
        self.detokenizer = detokenizer
        self.started = False
        self.finished = False
        self._offset = offset
        self._unsent: deque[TokenLogprob] = deque()

    def add(self, delta: Delta) -> TextDelta:
        if delta.finish_reason == "error":
            raise EngineFault("the engine failed on this request: the replica's log has the cause")
        self.started = True
        self._unsent += delta.logprobs
        sent = self.detokenizer.push(delta.token_ids)
        text, tokens, finish_reason = sent.text, self._tokens(sent), delta.finish_reason
        if self.detokenizer.stopped:
            finish_reason = "stop"
        elif finish_reason is not None:
            rest = self.detokenizer.flush()
            text += rest.text
            tokens += self._tokens(rest)
        self.finished = finish_reason is not None
        return TextDelta(self.index, text, tokens, finish_reason)

    def _tokens(self, sent: SentText) -> list[ScoredToken]:
        if not self._unsent:
            return []
        logprobs = [self._unsent.popleft() for _ in sent.token_offsets]
        offsets = (self._offset + offset for offset in sent.token_offsets)
        return [
            ScoredToken(logprob.token_id, offset, logprob) for offset, logprob in zip(offsets, logprobs, strict=True)
        ]


def _text_of(token_ids: Sequence[int], vocabulary: Vocabulary) -> SentText:
    detokenizer = Detokenizer(vocabulary)
    parts = [detokenizer.push(token_ids[start : start + 64]) for start in range(0, len(token_ids), 64)]
    parts.append(detokenizer.flush())
    offsets = [offset for part in parts for offset in part.token_offsets]
    return SentText("".join(part.text for part in parts), offsets)
