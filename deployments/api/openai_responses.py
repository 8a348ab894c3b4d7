"""PromptOutput in OpenAI's two response formats, chat completions and (legacy) completions, as one JSON or as events.

Everything before a `ResponseFormatter` is the same for both. Knows no prompts and no replicas.
"""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing

from pydantic import BaseModel

from deployments.api.outputs import PromptOutput, ScoredToken, TextDelta, merge_deltas
from deployments.errors import error_response
from deployments.protocol.base import PromptTokensDetails, Usage
from deployments.protocol.chat import (
    AssistantMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChatTokenLogprob,
    Choice,
    ChoiceDelta,
    ChunkChoice,
    TopLogprob,
)
from deployments.protocol.completions import Completion, CompletionChoice, CompletionLogprobs
from deployments.text.vocabulary import Vocabulary

_LEAST_LOGPROB = -9999.0  # OpenAI's; JSON has no -infinity

logger = logging.getLogger("ray.serve")


class ResponseFormatter(ABC):
    """How the answers of one request are written, which all carry the same id.

    Chunks are dumped without the fields that are not set, whole answers with all.
    """

    def __init__(self, answer_id: str, model: str, vocabulary: Vocabulary, *, with_logprobs: bool) -> None:
        self.answer_id = answer_id
        self._model = model
        self._created = int(time.time())
        self._vocabulary = vocabulary
        self._with_logprobs = with_logprobs

    @abstractmethod
    def complete(self, answers: Sequence[TextDelta], usage: Usage) -> BaseModel:
        """All of it at once; each answer is one piece with a finish_reason."""

    @abstractmethod
    def first_chunks(self, num_answers: int) -> list[BaseModel]:
        """Chunks before the first piece."""

    @abstractmethod
    def chunks(self, piece: TextDelta) -> list[BaseModel]:
        """One chunk for what the piece adds, and one for the end of the answer."""

    @abstractmethod
    def usage(self, usage: Usage) -> BaseModel:
        """The chunk after all answers, which has no choices."""

    def _spelled(self, token_id: int) -> str:
        spelling = self._vocabulary.spelling(token_id)
        try:
            return spelling.decode()
        except UnicodeDecodeError:  # part of a character
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)


class ChatFormatter(ResponseFormatter):
    """`chat.completion` and `chat.completion.chunk`."""

    def complete(self, answers: Sequence[TextDelta], usage: Usage) -> ChatCompletion:
        """One choice for each answer."""
        choices = []
        for answer in answers:
            assert answer.finish_reason is not None
            choices.append(
                Choice(
                    index=answer.index,
                    message=AssistantMessage(content=answer.text),
                    logprobs=self._logprobs(answer.tokens) if self._with_logprobs else None,
                    finish_reason=answer.finish_reason,
                )
            )
        return ChatCompletion(id=self.answer_id, created=self._created, model=self._model, choices=choices, usage=usage)

    def first_chunks(self, num_answers: int) -> list[BaseModel]:
        """Each answer's role."""
        role = ChoiceDelta(role="assistant", content="")
        return [self._chunk([ChunkChoice(index=i, delta=role, finish_reason=None)]) for i in range(num_answers)]

    def chunks(self, piece: TextDelta) -> list[BaseModel]:
        """Content with its log-probabilities, then an empty delta with the finish_reason."""
        chunks: list[BaseModel] = []
        if piece.text or piece.tokens:
            choice = ChunkChoice(index=piece.index, delta=ChoiceDelta(content=piece.text), finish_reason=None)
            if self._with_logprobs:
                choice.logprobs = self._logprobs(piece.tokens)
            chunks.append(self._chunk([choice]))
        if piece.finish_reason is not None:
            end = ChunkChoice(index=piece.index, delta=ChoiceDelta(), finish_reason=piece.finish_reason)
            chunks.append(self._chunk([end]))
        return chunks

    def usage(self, usage: Usage) -> ChatCompletionChunk:
        """A chunk with `usage` alone."""
        chunk = self._chunk([])
        chunk.usage = usage
        return chunk

    def _chunk(self, choices: list[ChunkChoice]) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self.answer_id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=choices,
        )

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> ChatLogprobs:
        content = []
        for token in tokens:
            assert token.logprob is not None  # a message never begins with its prompt
            top = [self._scored(token_id, logprob) for token_id, logprob in token.logprob.top]
            scored = self._scored(token.token_id, token.logprob.logprob)
            content.append(
                ChatTokenLogprob(token=scored.token, logprob=scored.logprob, bytes=scored.bytes, top_logprobs=top)
            )
        return ChatLogprobs(content=content)

    def _scored(self, token_id: int, logprob: float) -> TopLogprob:
        spelling = list(self._vocabulary.spelling(token_id))
        return TopLogprob(token=self._spelled(token_id), logprob=max(logprob, _LEAST_LOGPROB), bytes=spelling)


class CompletionFormatter(ResponseFormatter):
    """`text_completion`, the same for the whole and for chunks."""

    def complete(self, answers: Sequence[TextDelta], usage: Usage) -> Completion:
        """One choice for each answer."""
        completion = self._completion([self._choice(answer) for answer in answers])
        completion.usage = usage
        return completion

    def first_chunks(self, num_answers: int) -> list[BaseModel]:
        """Nothing: a text has no role."""
        return []

    def chunks(self, piece: TextDelta) -> list[BaseModel]:
        """One chunk with text, log-probabilities and finish_reason."""
        return [self._completion([self._choice(piece)])]

    def usage(self, usage: Usage) -> Completion:
        """A completion with `usage` alone."""
        return self.complete([], usage)

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self.answer_id, object="text_completion", created=self._created, model=self._model, choices=choices
        )

    def _choice(self, piece: TextDelta) -> CompletionChoice:
        return CompletionChoice(
            index=piece.index,
            text=piece.text,
            logprobs=self._logprobs(piece.tokens) if self._with_logprobs else None,
            finish_reason=piece.finish_reason,
        )

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> CompletionLogprobs:
        scored = [None if token.logprob is None else max(token.logprob.logprob, _LEAST_LOGPROB) for token in tokens]
        return CompletionLogprobs(
            tokens=[self._spelled(token.token_id) for token in tokens],
            token_logprobs=scored,
            top_logprobs=[self._top(token) for token in tokens],
            text_offset=[token.offset for token in tokens],
        )

    def _top(self, token: ScoredToken) -> dict[str, float] | None:
        """The likeliest tokens and the token itself; of two that are spelled alike, the likelier."""
        if token.logprob is None:
            return None
        top: dict[str, float] = {}
        for token_id, logprob in (*token.logprob.top, (token.token_id, token.logprob.logprob)):
            top.setdefault(self._spelled(token_id), max(logprob, _LEAST_LOGPROB))
        return top


async def sse_events(
    shape: ResponseFormatter,
    answers: Sequence[PromptOutput],
    batches: AsyncGenerator[list[TextDelta], None],
    *,
    include_usage: bool,
) -> AsyncGenerator[str, None]:
    """`answers` as server-sent events while `batches` makes them grow; what is ready together is one string.

    The first string comes with the first batch, and an error before that is raised. Later ones become an event.
    """
    written = False
    num_open = sum(prompt.generation.n for prompt in answers)
    ready = _written(shape.first_chunks(num_open))
    try:
        async with aclosing(batches):  # a client that leaves here stops the replica at once
            async for pieces in batches:
                ready += _written(chunk for piece in pieces for chunk in shape.chunks(piece))
                num_open -= sum(piece.finish_reason is not None for piece in pieces)
                if not num_open:
                    break
                written = True
                yield ready
                ready = ""
        if include_usage:
            ready += _written([shape.usage(usage_of(answers))])
    except Exception as error:
        if not written:
            raise
        logger.exception("answer %s broke off", shape.answer_id)
        ready = f"data: {error_response(error)[1].model_dump_json()}\n\n"
    yield ready + "data: [DONE]\n\n"


async def peek_first(stream: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """The same stream when its first string is there; an error up to then is raised here, not by the stream."""
    first = await anext(stream)

    async def resumed() -> AsyncGenerator[str, None]:
        yield first
        async with aclosing(stream):
            async for text in stream:
                yield text

    return resumed()


async def collect(
    shape: ResponseFormatter, answers: Sequence[PromptOutput], batches: AsyncGenerator[list[TextDelta], None]
) -> str:
    """`answers` as one JSON text, when `batches` has made them whole."""
    async with aclosing(batches):
        pieces = [piece async for batch in batches for piece in batch]

    def write() -> str:
        return shape.complete(merge_deltas(pieces), usage_of(answers)).model_dump_json()

    return await asyncio.to_thread(write)  # scores of a long text take a while


def usage_of(answers: Sequence[PromptOutput]) -> Usage:
    """Counts of one request so far: each prompt once, all of its answers."""
    prompt_tokens = sum(len(prompt.generation.prompt_token_ids) for prompt in answers)
    completion_tokens = sum(prompt.num_tokens for prompt in answers)
    cached_tokens = sum(prompt.num_cached_tokens for prompt in answers)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
    )


def _written(chunks: Iterable[BaseModel]) -> str:
    return "".join(f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n" for chunk in chunks)
