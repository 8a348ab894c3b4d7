"""OpenAI's response formats, chat completions and (legacy) completions, as one JSON object or as server-sent events.

Only the `ResponseFormatter` differs between the two formats. Knows nothing of prompts or replicas.
"""

import asyncio
import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing

from pydantic import BaseModel

from deployments.api.logprobs import MIN_LOGPROB, token_logprobs, token_text
from deployments.api.outputs import PromptOutput, ScoredToken, TextDelta, merge_deltas
from deployments.errors import error_response
from deployments.protocol.base import ChatFinishReason, FinishReason, PromptTokensDetails, Usage
from deployments.protocol.chat import (
    AssistantMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    Choice,
    ChoiceDelta,
    ChunkChoice,
)
from deployments.protocol.completions import Completion, CompletionChoice, CompletionLogprobs
from deployments.protocol.generation import StreamOptions
from deployments.protocol.tools import AnswerToolCall, FunctionCallDelta, ToolCallDelta, add_to_calls
from deployments.text.tool_calls import AnswerPart, CallFormat, CallScanner, CallStart
from deployments.text.vocabulary import Vocabulary

logger = logging.getLogger("ray.serve")


class ResponseFormatter(ABC):
    """Formats the completions of one request, which share one id.

    Chunks are serialized without unset fields, complete responses with all fields.
    """

    def __init__(
        self,
        completion_id: str,
        model: str,
        vocabulary: Vocabulary,
        *,
        with_logprobs: bool,
        service_tier: str | None = None,
    ) -> None:
        self.completion_id = completion_id
        self._model = model
        self._created = int(time.time())
        self._vocabulary = vocabulary
        self._with_logprobs = with_logprobs
        self._tier = {} if service_tier is None else {"service_tier": "default"}  # named only where one was requested

    @abstractmethod
    def complete(self, completions: Sequence[TextDelta], usage: Usage) -> BaseModel:
        """The complete response; each completion is one delta with a finish_reason."""

    @abstractmethod
    def first_chunks(self, num_completions: int) -> list[BaseModel]:
        """Chunks before the first delta."""

    @abstractmethod
    def chunks(self, delta: TextDelta) -> Sequence[ChatCompletionChunk | Completion]:
        """Chunks for a delta's text and finish_reason."""

    @abstractmethod
    def usage(self, usage: Usage) -> BaseModel:
        """The chunk after all completions, which has no choices."""


class ChatFormatter(ResponseFormatter):
    """`chat.completion` and `chat.completion.chunk`. `calls` is how answers may call tools, None if they may not."""

    def __init__(
        self,
        completion_id: str,
        model: str,
        vocabulary: Vocabulary,
        *,
        with_logprobs: bool,
        service_tier: str | None = None,
        calls: CallFormat | None = None,
    ) -> None:
        super().__init__(completion_id, model, vocabulary, with_logprobs=with_logprobs, service_tier=service_tier)
        self._calls = calls
        self._scanners: dict[int, CallScanner] = {}  # by index of the completion

    def complete(self, completions: Sequence[TextDelta], usage: Usage) -> ChatCompletion:
        """A response with one choice for each completion."""
        choices = []
        for completion in completions:
            assert completion.finish_reason is not None
            message = self._message(completion)
            choices.append(
                Choice(
                    index=completion.index,
                    message=message,
                    logprobs=self._logprobs(completion.tokens) if self._with_logprobs else None,
                    finish_reason=_finish_reason(completion.finish_reason, bool(message.tool_calls)),
                )
            )
        return ChatCompletion(
            id=self.completion_id, created=self._created, model=self._model, choices=choices, usage=usage, **self._tier
        )

    def first_chunks(self, num_completions: int) -> list[BaseModel]:
        """The role of each completion."""
        role = ChoiceDelta(role="assistant", content="" if self._calls is None else None)
        return [self._chunk([ChunkChoice(index=i, delta=role, finish_reason=None)]) for i in range(num_completions)]

    def chunks(self, delta: TextDelta) -> list[ChatCompletionChunk]:
        """Content and calls with their log-probabilities, then an empty delta with the finish_reason."""
        deltas = self.deltas(delta)
        if delta.tokens and not deltas:
            deltas = [ChoiceDelta(content="")]
        choices = [ChunkChoice(index=delta.index, delta=each, finish_reason=None) for each in deltas]
        if choices and self._with_logprobs:
            choices[0].logprobs = self._logprobs(delta.tokens)
        if delta.finish_reason is not None:
            scanner = self._scanners.get(delta.index)
            finish_reason = _finish_reason(delta.finish_reason, scanner is not None and scanner.num_calls > 0)
            choices.append(ChunkChoice(index=delta.index, delta=ChoiceDelta(), finish_reason=finish_reason))
        return [self._chunk([choice]) for choice in choices]

    def deltas(self, delta: TextDelta) -> list[ChoiceDelta]:
        """What a delta adds to its message: text, the beginning of a call, or arguments."""
        if self._calls is None:
            return [ChoiceDelta(content=delta.text)] if delta.text else []
        scanner = self._scanners.setdefault(delta.index, CallScanner(self._calls))
        parts = [*scanner.push(delta.text)]
        if delta.finish_reason is not None:
            parts += filter(None, [scanner.flush()])
        num_started = scanner.num_calls - sum(isinstance(part, CallStart) for part in parts)
        deltas = []
        for part in parts:
            num_started += isinstance(part, CallStart)
            deltas.append(_delta_of(part, num_started - 1))
        return deltas

    def _message(self, completion: TextDelta) -> AssistantMessage:
        content = ""
        calls: list[AnswerToolCall] = []
        for delta in self.deltas(completion):
            content += delta.content or ""
            for call in delta.tool_calls or ():
                add_to_calls(calls, call)
        return AssistantMessage(content=content if content or not calls else None, tool_calls=calls or None)

    def usage(self, usage: Usage) -> ChatCompletionChunk:
        """A chunk with only `usage`."""
        chunk = self._chunk([])
        chunk.usage = usage
        return chunk

    def _chunk(self, choices: list[ChunkChoice]) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self.completion_id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=choices,
            **self._tier,
        )

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> ChatLogprobs:
        return ChatLogprobs(content=token_logprobs(tokens, self._vocabulary))


def _delta_of(part: AnswerPart, call_index: int) -> ChoiceDelta:
    """A chunk's delta for text, or for the beginning or the arguments of a call."""
    if isinstance(part, str):
        return ChoiceDelta(content=part)
    if isinstance(part, CallStart):
        start = FunctionCallDelta(name=part.name, arguments="")
        call_id = f"call_{uuid.uuid4().hex[:24]}"
        return ChoiceDelta(tool_calls=[ToolCallDelta(index=call_index, id=call_id, type="function", function=start)])
    more = FunctionCallDelta(arguments=part.text)
    return ChoiceDelta(tool_calls=[ToolCallDelta(index=call_index, function=more)])


def _finish_reason(reason: FinishReason, has_calls: bool) -> ChatFinishReason:
    return "tool_calls" if has_calls and reason == "stop" else reason


class CompletionFormatter(ResponseFormatter):
    """`text_completion`, the same for complete responses and for chunks."""

    def complete(self, completions: Sequence[TextDelta], usage: Usage) -> Completion:
        """A response with one choice for each completion."""
        response = self._response([self._choice(completion) for completion in completions])
        response.usage = usage
        return response

    def first_chunks(self, num_completions: int) -> list[BaseModel]:
        """No chunks: a text has no role."""
        return []

    def chunks(self, delta: TextDelta) -> list[Completion]:
        """One chunk with text, log-probabilities and finish_reason."""
        return [self._response([self._choice(delta)])]

    def usage(self, usage: Usage) -> Completion:
        """A chunk with only `usage`."""
        return self.complete([], usage)

    def _response(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self.completion_id,
            object="text_completion",
            created=self._created,
            model=self._model,
            choices=choices,
            **self._tier,
        )

    def _choice(self, delta: TextDelta) -> CompletionChoice:
        return CompletionChoice(
            index=delta.index,
            text=delta.text,
            logprobs=self._logprobs(delta.tokens) if self._with_logprobs else None,
            finish_reason=delta.finish_reason,
        )

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> CompletionLogprobs:
        logprobs = [None if token.logprob is None else max(token.logprob.logprob, MIN_LOGPROB) for token in tokens]
        return CompletionLogprobs(
            tokens=[token_text(token.token_id, self._vocabulary) for token in tokens],
            token_logprobs=logprobs,
            top_logprobs=[self._top(token) for token in tokens],
            text_offset=[token.offset for token in tokens],
        )

    def _top(self, token: ScoredToken) -> dict[str, float] | None:
        """The most likely tokens and the token itself; of two with the same text, the more likely one."""
        if token.logprob is None:
            return None
        top: dict[str, float] = {}
        for token_id, logprob in (*token.logprob.top, (token.token_id, token.logprob.logprob)):
            top.setdefault(token_text(token_id, self._vocabulary), max(logprob, MIN_LOGPROB))
        return top


async def sse_events(
    formatter: ResponseFormatter,
    outputs: Sequence[PromptOutput],
    batches: AsyncGenerator[list[TextDelta], None],
    options: StreamOptions,
) -> AsyncGenerator[str, None]:
    """Format batches of text deltas, which `outputs` produced, as server-sent events: one string for each batch.

    An error before the first string is raised; a later one becomes an event.
    """
    has_started = False
    continuous_usage = options.include_usage and options.continuous_usage_stats
    num_unfinished = sum(output.generation.n for output in outputs)
    events = _to_events(formatter.first_chunks(num_unfinished))
    try:
        async with aclosing(batches):  # when the client disconnects, generation stops at once
            async for deltas in batches:
                chunks = [chunk for delta in deltas for chunk in formatter.chunks(delta)]
                if continuous_usage:
                    usage = usage_of(outputs)
                    for chunk in chunks:
                        chunk.usage = usage
                events += _to_events(chunks)
                num_unfinished -= sum(delta.finish_reason is not None for delta in deltas)
                if not num_unfinished:
                    break
                has_started = True
                yield events
                events = ""
        if options.include_usage:
            events += _to_events([formatter.usage(usage_of(outputs))])
    except Exception as error:
        if not has_started:
            raise
        logger.exception("response %s was aborted", formatter.completion_id)
        events = f"data: {error_response(error)[1].model_dump_json()}\n\n"
    yield events + "data: [DONE]\n\n"


async def peek_first(stream: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """Wait for the first string of a stream, and return the same stream; an error before it is raised here."""
    first = await anext(stream)

    async def resumed() -> AsyncGenerator[str, None]:
        yield first
        async with aclosing(stream):
            async for text in stream:
                yield text

    return resumed()


async def collect(
    formatter: ResponseFormatter, outputs: Sequence[PromptOutput], batches: AsyncGenerator[list[TextDelta], None]
) -> str:
    """Format batches of text deltas, which `outputs` produced, as one JSON text once all have arrived."""
    async with aclosing(batches):
        deltas = [delta async for batch in batches for delta in batch]

    def to_json() -> str:
        return formatter.complete(merge_deltas(deltas), usage_of(outputs)).model_dump_json()

    return await asyncio.to_thread(to_json)  # log-probabilities of a long text take a while


def usage_of(outputs: Sequence[PromptOutput]) -> Usage:
    """Usage of one request so far; each prompt counts once, whatever `n` is."""
    prompt_tokens = sum(len(output.generation.prompt_token_ids) for output in outputs)
    completion_tokens = sum(output.num_tokens for output in outputs)
    cached_tokens = sum(output.num_cached_tokens for output in outputs)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
    )


def _to_events(chunks: Iterable[BaseModel]) -> str:
    return "".join(f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n" for chunk in chunks)
