"""ChatIngress: OpenAI's HTTP API in front of the model replicas.

A request is validated, its dialog rendered to token ids with the adapter's own chat format, checked against the
context, and sent to a replica; what comes back is turned into text. Errors become status codes here, before the
first byte of an answer. The UI calls `chat` and `models` by handle and gets the same treatment.
"""

import asyncio
import difflib
import logging
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.handle import DeploymentHandle

from deployments.config import ServeArgs
from deployments.detokenizer import Detokenizer
from deployments.engine.request import SamplingParams
from deployments.errors import (
    ContextLengthExceeded,
    EngineFault,
    ModelNotFound,
    NotReady,
    error_response,
)
from deployments.generation import GenerationRequest
from deployments.http_app import create_api
from deployments.protocol import (
    AssistantMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Choice,
    ChoiceDelta,
    ChunkChoice,
    ErrorResponse,
    FinishReason,
    Model,
    ModelList,
    Usage,
)
from training.base_models import load_tokenizer, resolve_base_model
from training.chat_format import ChatFormat, load_chat_format
from training.errors import RegistryError
from training.registry import AdapterManifest, AdapterRegistry, parse_model_id

_READY_TIMEOUT_S = 10.0
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The request is not acceptable; `param` names the field."},
    404: {"model": ErrorResponse, "description": "No such model."},
    413: {"model": ErrorResponse, "description": "The body is too large."},
    500: {"model": ErrorResponse, "description": "The server failed."},
    503: {"model": ErrorResponse, "description": "No capacity now; try again."},
}

logger = logging.getLogger("ray.serve")
api = create_api()  # whole before the class: Ray Serve takes a copy of it when it decorates


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of an answer: its text, the answer's tokens so far, and in the last piece the finish_reason."""

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that was accepted: what the replica gets, and what the answer needs."""

    model: str
    generation: GenerationRequest
    stop: list[str]

    def usage(self, num_tokens: int) -> Usage:
        """Counts for an answer of `num_tokens` tokens."""
        num_prompt_tokens = len(self.generation.prompt_token_ids)
        return Usage(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=num_tokens,
            total_tokens=num_prompt_tokens + num_tokens,
        )


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}, graceful_shutdown_timeout_s=30)
@serve.ingress(api)
class ChatIngress:
    """One replica of the API. Holds tokenizer and chat formats, no weights."""

    def __init__(self, model: DeploymentHandle[Any], args: ServeArgs) -> None:
        self._model = model
        self._base = resolve_base_model(args.base_model, args.base_revision)
        self._registry = AdapterRegistry(args.registry)
        self._tokenizer = load_tokenizer(self._base)
        self._base_format = load_chat_format(args.chat_format, self._base, self._tokenizer)
        self._formats: dict[str, ChatFormat] = {self._base_format.name: self._base_format}
        self._max_model_len = args.engine.max_model_len or self._base.context_length
        self._started = int(time.time())

    @api.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=_ERRORS | {200: {"content": {"text/event-stream": {}}, "description": "The answer."}},
    )
    async def chat_completions(self, request: Request, body: ChatCompletionRequest) -> Response:
        """Answer a dialog with the base or an adapter, at once or as server-sent events."""
        prepared = await self._prepare(body, f"chatcmpl-{uuid.uuid4().hex}")
        deltas = self._deltas(prepared)
        first = await anext(deltas)  # an error up to here is still a status code
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            events = self._events(prepared, first, deltas, include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        text, last = first.text, first
        async for last in deltas:
            text += last.text
        assert last.finish_reason is not None
        completion = ChatCompletion(
            id=prepared.generation.request_id,
            created=int(time.time()),
            model=prepared.model,
            choices=[Choice(message=AssistantMessage(content=text), finish_reason=last.finish_reason)],
            usage=prepared.usage(last.num_tokens),
        )
        return Response(completion.model_dump_json(), media_type="application/json")

    @api.get("/v1/models", responses={500: _ERRORS[500]})
    async def list_models(self) -> ModelList:
        """The base and every adapter version that it can serve."""
        return ModelList(data=await self.models())

    @api.get("/v1/models/{model_id:path}", responses={404: _ERRORS[404], 500: _ERRORS[500]})
    async def retrieve_model(self, model_id: str) -> Model:
        """One model, by any id that a request could use."""
        manifest = await self._resolve(model_id)
        if manifest is None:
            return self._base_card()
        return self._adapter_card(manifest, await asyncio.to_thread(self._registry.aliases, manifest.name))

    @api.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @api.get("/readyz", responses={503: _ERRORS[503]})
    async def readyz(self) -> dict[str, str]:
        """A token was generated lately, or can be."""
        try:
            await asyncio.wait_for(self._model.ready.remote(), _READY_TIMEOUT_S)
        except Exception as error:
            raise NotReady("no model replica is ready: wait, or see the status of the Serve application") from error
        return {"status": "ready"}

    async def chat(self, body: ChatCompletionRequest) -> AsyncGenerator[str, None]:
        """The text of an answer, piece by piece, for callers inside the cluster.

        Raises:
            CorralError: as `POST /v1/chat/completions` would answer.
        """
        prepared = await self._prepare(body, f"chatcmpl-{uuid.uuid4().hex}")
        async with aclosing(self._deltas(prepared)) as deltas:
            async for delta in deltas:
                yield delta.text

    async def models(self) -> list[Model]:
        """The base first, then every adapter version that it can serve, newest first."""

        def adapters() -> list[Model]:
            served = [m for m in self._registry.list() if m.base.name == self._base.name]
            aliases = {name: self._registry.aliases(name) for name in {m.name for m in served}}
            newest_first = sorted(served, key=lambda m: (m.name, -m.version))
            return [self._adapter_card(manifest, aliases[manifest.name]) for manifest in newest_first]

        return [self._base_card(), *await asyncio.to_thread(adapters)]

    def _base_card(self) -> Model:
        base = self._base
        return Model(id=base.name, created=self._started, root=base.source, max_model_len=self._max_model_len)

    def _adapter_card(self, manifest: AdapterManifest, aliases: dict[str, int]) -> Model:
        return Model(
            id=manifest.model_id,
            created=int(manifest.created.timestamp()),
            parent=self._base.name,
            root=manifest.name,
            version=manifest.version,
            aliases=sorted(alias for alias, version in aliases.items() if version == manifest.version),
            max_model_len=self._max_model_len,
        )

    async def _resolve(self, model: str) -> AdapterManifest | None:
        """The adapter version that a model id means, None for the base."""
        try:
            wanted = parse_model_id(model)
        except RegistryError as error:
            raise ModelNotFound(str(error), "model") from error
        if wanted.base != self._base.name:
            near = difflib.get_close_matches(wanted.base, [self._base.name], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"this server has {self._base.name!r} and its adapters"
            raise ModelNotFound(f"model {model!r} is not served here: {hint}", "model")
        if wanted.adapter is None:
            return None
        return await asyncio.to_thread(self._registry.resolve, wanted.adapter, wanted.ref)

    async def _prepare(self, body: ChatCompletionRequest, request_id: str) -> Prepared:
        manifest = await self._resolve(body.model)
        chat_format = self._base_format if manifest is None else self._chat_format(manifest.chat_format)
        prompt_token_ids = await asyncio.to_thread(chat_format.render_prompt, body.dialog())
        room = self._max_model_len - len(prompt_token_ids)
        max_tokens = body.max_tokens or body.max_completion_tokens
        if room < (max_tokens or 1):
            asked = f" and {max_tokens} for the answer" if max_tokens else ""
            raise ContextLengthExceeded(
                f"the context is {self._max_model_len} tokens, and the messages take {len(prompt_token_ids)}{asked}: "
                "shorten the messages or lower max_tokens",
                "messages" if room < 1 or max_tokens is None else "max_tokens",
            )
        sampling = SamplingParams(
            max_tokens=max_tokens or room,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            repetition_penalty=body.repetition_penalty,
            seed=body.seed,
            stop_token_ids=chat_format.stop_token_ids,
            ignore_eos=body.ignore_eos,
        )
        generation = GenerationRequest(request_id, prompt_token_ids, sampling, manifest)
        return Prepared(self._base.name if manifest is None else manifest.model_id, generation, body.stop_strings)

    def _chat_format(self, name: str) -> ChatFormat:
        if name not in self._formats:
            self._formats[name] = load_chat_format(name, self._base, self._tokenizer)
        return self._formats[name]

    async def _deltas(self, prepared: Prepared) -> AsyncGenerator[TextDelta, None]:
        """Text as the replica makes it; at least one item, the last with a finish_reason."""
        detokenizer = Detokenizer(self._tokenizer, prepared.stop)
        num_tokens = 0
        answer: Any = self._model.options(stream=True).generate.remote(prepared.generation)
        try:
            async for delta in answer:
                text = ""
                for token_id in delta.token_ids:
                    num_tokens += 1
                    text += detokenizer.push([token_id])
                    if detokenizer.stopped:
                        yield TextDelta(text, num_tokens, "stop")
                        return
                if delta.finish_reason is not None:
                    text += detokenizer.flush()
                if text or delta.finish_reason is not None:
                    yield TextDelta(text, num_tokens, delta.finish_reason)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except RayActorError as error:
            raise EngineFault("the model replica died while it answered: send the request again") from error
        finally:
            answer.cancel()

    async def _events(
        self, prepared: Prepared, first: TextDelta, deltas: AsyncGenerator[TextDelta, None], include_usage: bool
    ) -> AsyncGenerator[str, None]:
        created = int(time.time())

        def event(choices: list[ChunkChoice], **more: Usage) -> str:
            chunk = ChatCompletionChunk(
                id=prepared.generation.request_id,
                object="chat.completion.chunk",
                created=created,
                model=prepared.model,
                choices=choices,
                **more,
            )
            return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"

        def choice(delta: ChoiceDelta, finish_reason: FinishReason | None = None) -> list[ChunkChoice]:
            return [ChunkChoice(index=0, delta=delta, finish_reason=finish_reason)]

        yield event(choice(ChoiceDelta(role="assistant", content="")))
        last = first
        try:
            if first.text:
                yield event(choice(ChoiceDelta(content=first.text)))
            async with aclosing(deltas):  # a client that leaves here stops the replica at once
                async for last in deltas:
                    if last.text:
                        yield event(choice(ChoiceDelta(content=last.text)))
            yield event(choice(ChoiceDelta(), last.finish_reason))
            if include_usage:
                yield event([], usage=prepared.usage(last.num_tokens))
        except Exception as error:
            logger.exception("answer %s broke off", prepared.generation.request_id)
            yield f"data: {error_response(error)[1].model_dump_json()}\n\n"
        yield "data: [DONE]\n\n"
