"""From token deltas to text deltas: a prompt's answers before they are formatted as OpenAI's responses.

A `PromptOutput` takes what a replica sends for one prompt. Knows nothing of HTTP, chats or adapters.
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
    """A token of a piece, where it begins in the answer's text (in characters), and its log-probability.

    `logprob` is None for the first token of an echoed prompt, which nothing predicts.
    """

    token_id: int
    offset: int
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What the answer `index` goes on with; `tokens` only where log-probabilities were asked for.

    The last piece of an answer has a finish_reason.
    """

    index: int
    text: str
    tokens: list[ScoredToken]
    finish_reason: FinishReason | None = None


def merge_deltas(pieces: Iterable[TextDelta]) -> list[TextDelta]:
    """One piece for each index, in order: of a whole stream of pieces, the whole answers."""
    by_index: dict[int, list[TextDelta]] = {}
    for piece in pieces:
        by_index.setdefault(piece.index, []).append(piece)
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
    """Items of all streams as they come; an error in one of them, or closing this, closes them all."""
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
    """The `n` answers to one prompt, as they grow.

    Args:
        generation: what the replica was asked for; pieces have tokens where its sampling has logprobs.
        vocabulary: of the model's tokenizer.
        stop: strings that end an answer where they begin.
        first_index: index of the first answer's pieces.
        continues_prompt: the text goes on in the middle of the prompt's; else it begins anew, as a message does.
        echo: every answer begins with the prompt; then `generation` has prompt_logprobs if it has logprobs.

    Attributes:
        num_cached_tokens: tokens of the prompt whose keys and values were there already.
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
        self._early: list[Delta] = []
        self._answers = [
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
        """Tokens of all answers so far."""
        return sum(answer.detokenizer.num_tokens for answer in self._answers)

    @property
    def finished(self) -> bool:
        """Every answer has its finish_reason: the replica may stop."""
        return all(answer.finished for answer in self._answers)

    def add(self, deltas: Sequence[Delta]) -> list[TextDelta]:
        """At most one piece for each answer; what comes after an answer's stop string is dropped.

        Raises:
            EngineFault: the engine failed on an answer.
        """
        pieces = []
        for delta in self._in_order(deltas):
            if delta.index == 0:
                self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
            answer = self._answers[delta.index]
            if answer.finished:
                continue
            if self._prompt_text is not None and not answer.begun:
                pieces.append(TextDelta(answer.index, self._prompt_text.text, self._prompt_tokens(self._prompt_text)))
            pieces.append(answer.add(delta))
        return [piece for piece in merge_deltas(pieces) if piece.text or piece.tokens or piece.finish_reason]

    def _in_order(self, deltas: Sequence[Delta]) -> Sequence[Delta]:
        """Keep deltas back until the log-probabilities of an echoed prompt are there, which answer 0 brings."""
        if self._prompt_text is None or not self._with_tokens or self._prompt_logprobs is not None:
            return deltas
        self._early += deltas
        found = (delta.prompt_logprobs for delta in self._early)
        self._prompt_logprobs = next((logprobs for logprobs in found if logprobs is not None), None)
        if self._prompt_logprobs is None:
            return []
        ready, self._early = self._early, []
        return ready

    def _prompt_tokens(self, prompt: SentText) -> list[ScoredToken]:
        if self._prompt_logprobs is None:
            return []
        triples = zip(self.generation.prompt_token_ids, prompt.token_offsets, self._prompt_logprobs, strict=True)
        return [ScoredToken(*triple) for triple in triples]


class CompletionStream:
    """One of the answers. `offset` is where its text begins in the whole, in characters."""

    def __init__(self, index: int, detokenizer: Detokenizer, offset: int) -> None:
        self.index = index
        self.detokenizer = detokenizer
        self.begun = False
        self.finished = False
        self._offset = offset
        self._unsent: deque[TokenLogprob] = deque()

    def add(self, delta: Delta) -> TextDelta:
        if delta.finish_reason == "error":
            raise EngineFault("the engine failed on this request: the replica's log has the cause")
        self.begun = True
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
