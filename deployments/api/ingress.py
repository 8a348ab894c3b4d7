"""ChatIngress: OpenAI's HTTP API in front of the model replicas.

A request is validated (`protocol.py`), rendered to token ids (`rendering.py`) and sent to a replica; what comes back
is turned into text (`answers.py`) and written as OpenAI does (`shapes.py`). Errors become status codes before the first
byte of an answer. The UI calls `chat` and `models` by handle and gets the same treatment.
"""

import asyncio
import sys
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, cast

from fastapi import Path, Response
from fastapi.responses import StreamingResponse
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.accounting.ledger_client import LedgerClient
from deployments.accounting.metrics import CONTENT_TYPE, engine_metrics
from deployments.accounting.middleware import CurrentTrace, RequestTraceMiddleware
from deployments.accounting.request_record import RequestTrace
from deployments.api.adapter_admin import AdapterAdmin
from deployments.api.http_app import RequestId, create_api
from deployments.api.model_catalog import ModelCatalog
from deployments.api.openai_responses import (
    ChatFormatter,
    CompletionFormatter,
    ResponseFormatter,
    collect,
    peek_first,
    sse_events,
    usage_of,
)
from deployments.api.outputs import PromptOutput, TextDelta, interleaved
from deployments.api.rendering import RequestRenderer
from deployments.auth.caller import Caller
from deployments.auth.dependencies import AdminCaller, ChatCaller
from deployments.config import ServeArgs
from deployments.engine.stats import EngineStats
from deployments.errors import EngineFault, NotReady, error_response
from deployments.protocol.adapters import (
    Adapter,
    AdapterChange,
    AdapterList,
    DeletedVersion,
    PromoteRequest,
    RollbackRequest,
)
from deployments.protocol.base import ErrorResponse
from deployments.protocol.chat import AnyCompletionRequest, ChatCompletion, ChatCompletionRequest
from deployments.protocol.completions import Completion, CompletionRequest
from deployments.protocol.models import Model, ModelList
from deployments.protocol.tokenize import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from deployments.structured_outputs.grammars import GrammarCompiler
from deployments.text.vocabulary import Vocabulary
from training.base_models.resolve import resolve_base_model
from training.base_models.tokenizer import load_tokenizer
from training.registry.manifest import AdapterManifest
from training.registry.registry import AdapterRegistry

_READY_TIMEOUT_S = 10.0
_STATS_TIMEOUT_S = 2.0
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The request is not acceptable; `param` names the field."},
    404: {"model": ErrorResponse, "description": "No such model."},
    413: {"model": ErrorResponse, "description": "The body is too large."},
    429: {"model": ErrorResponse, "description": "The key's limits are used up; `Retry-After` says for how long."},
    500: {"model": ErrorResponse, "description": "The server failed."},
    503: {"model": ErrorResponse, "description": "No capacity now; try again."},
}
_TOKENS: dict[int | str, dict[str, Any]] = {status: _ERRORS[status] for status in (400, 404, 413, 500)}
_CHANGES: dict[int | str, dict[str, Any]] = _TOKENS | {
    409: {"model": ErrorResponse, "description": "An alias or a canary stands against it."}
}
_ANSWERS = _ERRORS | {200: {"content": {"text/event-stream": {}}, "description": "The answer."}}

_METRICS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {}}, "description": "Prometheus' text format."},
    503: _ERRORS[503],
}


def _ledger() -> LedgerClient:
    """This replica's."""
    return cast("ChatIngress", serve.get_replica_context().servable_object).ledger


api = create_api()  # whole before the class: Ray Serve takes a copy of it when it decorates
api.add_middleware(RequestTraceMiddleware, ledger=_ledger)


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}, graceful_shutdown_timeout_s=30)
@serve.ingress(api)
class ChatIngress:
    """One replica of the API. Holds tokenizer and chat formats, no weights."""

    def __init__(self, model: DeploymentHandle[Any], ledger: DeploymentHandle[Any], args: ServeArgs) -> None:
        sys.setswitchinterval(0.001)  # threads that render long prompts hand the interpreter back sooner than in 5 ms
        self._model = model
        self.ledger = LedgerClient(ledger)
        self._base = resolve_base_model(args.base_model, args.base_revision)
        self._registry = AdapterRegistry(args.registry)
        max_model_len = args.engine.max_model_len or self._base.context_length
        self._catalog = ModelCatalog(self._base, self._registry, max_model_len)
        tokenizer = load_tokenizer(self._base)
        self._vocabulary = Vocabulary(tokenizer)
        self._renderer = RequestRenderer(self._base, args.chat_format, tokenizer, self._vocabulary, max_model_len)
        self._grammars = GrammarCompiler(self._base, tokenizer, self._vocabulary)

    async def __del__(self) -> None:
        """Ray Serve calls this before the replica ends."""
        await self.ledger.flush()

    @api.post("/v1/chat/completions", response_model=ChatCompletion, responses=_ANSWERS)
    async def chat_completions(self, body: ChatCompletionRequest, caller: ChatCaller, trace: CurrentTrace) -> Response:
        """Answer a dialog with the base or an adapter, at once or as server-sent events."""
        answer_id = f"chatcmpl-{uuid.uuid4().hex}"
        manifest = await self._catalog.resolve(body.model, caller.identity(body.user))
        trace.model = self._catalog.model_id(manifest)
        answers = await self._chat_answers(body, manifest, answer_id, caller.limits.tpm)
        shape = ChatFormatter(answer_id, trace.model, self._vocabulary, with_logprobs=body.logprobs)
        return await self._respond(shape, [answers], body, caller, trace)

    @api.post("/v1/completions", response_model=Completion, responses=_ANSWERS)
    async def completions(self, body: CompletionRequest, caller: ChatCaller, trace: CurrentTrace) -> Response:
        """Continue or score texts with the base or an adapter, at once or as server-sent events."""
        answer_id = f"cmpl-{uuid.uuid4().hex}"
        manifest = await self._catalog.resolve(body.model, caller.identity(body.user))
        trace.model = self._catalog.model_id(manifest)
        answers = await asyncio.to_thread(self._text_answers, body, manifest, answer_id)
        with_logprobs = body.logprobs is not None
        shape = CompletionFormatter(answer_id, trace.model, self._vocabulary, with_logprobs=with_logprobs)
        return await self._respond(shape, answers, body, caller, trace)

    @api.get("/v1/models", responses={500: _ERRORS[500]})
    async def list_models(self, caller: ChatCaller) -> ModelList:
        """The base and every adapter version that it can serve."""
        return ModelList(data=await self._catalog.models())

    @api.get("/v1/models/{model_id:path}", responses={404: _ERRORS[404], 500: _ERRORS[500]})
    async def retrieve_model(self, model_id: str, caller: ChatCaller) -> Model:
        """One model, by any id that a request could use."""
        return await self._catalog.model(model_id)

    @api.post("/tokenize", responses=_TOKENS)
    async def tokenize(self, body: TokenizeRequest, caller: ChatCaller) -> TokenizeResponse:
        """The token ids of a text or a dialog, as an answer to it would begin from."""
        manifest = await self._catalog.resolve(body.model or self._base.name)
        return await asyncio.to_thread(self._renderer.tokenize, body, manifest)

    @api.post("/detokenize", responses=_TOKENS)
    async def detokenize(self, body: DetokenizeRequest, caller: ChatCaller) -> DetokenizeResponse:
        """The text of token ids."""
        await self._catalog.resolve(body.model or self._base.name)
        return await asyncio.to_thread(self._renderer.detokenize, body)

    @api.get("/v1/adapters", responses={500: _ERRORS[500]})
    async def list_adapters(self, caller: AdminCaller) -> AdapterList:
        """Every adapter with its versions, and where its traffic goes."""
        return AdapterList(data=await asyncio.to_thread(self._admin(caller).adapters))

    @api.get("/v1/adapters/{name}", responses={404: _ERRORS[404], 500: _ERRORS[500]})
    async def show_adapter(self, name: str, caller: AdminCaller) -> Adapter:
        """One adapter with its versions, and where its traffic goes."""
        return await asyncio.to_thread(self._admin(caller).adapter, name)

    @api.post("/v1/adapters/{name}/promote", responses=_CHANGES)
    async def promote_adapter(
        self, name: str, body: PromoteRequest, caller: AdminCaller, request_id: RequestId = None
    ) -> AdapterChange:
        """Let an alias point at a version, on every replica at once; below 100 percent, as the champion's canary."""
        admin = self._admin(caller, request_id)
        return await asyncio.to_thread(admin.promote, name, body.version, body.alias, body.percent)

    @api.post("/v1/adapters/{name}/rollback", responses=_CHANGES)
    async def roll_back_adapter(
        self, name: str, caller: AdminCaller, body: RollbackRequest | None = None, request_id: RequestId = None
    ) -> AdapterChange:
        """End the canary, or let an alias point at what it pointed at before."""
        alias = (body or RollbackRequest()).alias
        return await asyncio.to_thread(self._admin(caller, request_id).rollback, name, alias)

    @api.delete("/v1/adapters/{name}/versions/{version}", responses=_CHANGES)
    async def delete_adapter_version(
        self,
        name: str,
        version: Annotated[int, Path(ge=1, lt=10**9)],
        caller: AdminCaller,
        request_id: RequestId = None,
    ) -> DeletedVersion:
        """Remove a version that no alias points at. PromptOutput in progress with it run to their end."""
        return await asyncio.to_thread(self._admin(caller, request_id).delete_version, name, version)

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

    @api.get("/metrics", response_class=Response, responses=_METRICS)
    async def metrics(self, caller: ChatCaller) -> Response:
        """Requests over all replicas of the API, and the state of every model replica, for Prometheus."""
        requests, engines = await asyncio.gather(self.ledger.metrics(), self._engine_metrics())
        return Response(requests + engines, media_type=CONTENT_TYPE)

    async def chat(self, body: ChatCompletionRequest, caller: Caller) -> AsyncGenerator[str, None]:
        """The text of one answer (`n` is 1), piece by piece, for callers inside the cluster.

        Raises:
            CorralError: as `POST /v1/chat/completions` would answer.
        """
        with self.ledger.recorded(RequestTrace(route="ui", caller=caller)) as trace:
            manifest = await self._catalog.resolve(body.model, caller.identity(body.user))
            trace.model = self._catalog.model_id(manifest)
            answer_id = f"chatcmpl-{uuid.uuid4().hex}"
            answers = await self._chat_answers(body, manifest, answer_id, caller.limits.tpm)
            async with aclosing(self._admitted([answers], caller, trace)) as batches:
                async for pieces in batches:
                    yield "".join(piece.text for piece in pieces)
            trace.status = 200

    async def models(self) -> list[Model]:
        """As `GET /v1/models` lists them, for callers inside the cluster."""
        return await self._catalog.models()

    def _admin(self, caller: Caller, request_id: str | None = None) -> AdapterAdmin:
        actor = {"key_id": caller.key_id, "name": caller.name, "request_id": request_id}
        return AdapterAdmin(self._registry, actor)

    async def _chat_answers(
        self, body: ChatCompletionRequest, manifest: AdapterManifest | None, answer_id: str, tpm: int | None
    ) -> PromptOutput:
        generation = await asyncio.to_thread(self._renderer.chat, body, manifest, answer_id, tpm)
        if generation.grammar is not None:
            await self._grammars.compile(generation.grammar)  # to refuse it here; the replica has its own
        return PromptOutput(generation, self._vocabulary, body.stop_strings)

    def _text_answers(
        self, body: CompletionRequest, manifest: AdapterManifest | None, answer_id: str
    ) -> list[PromptOutput]:
        generations = self._renderer.completion(body, manifest, answer_id)
        return [
            PromptOutput(
                generation,
                self._vocabulary,
                body.stop_strings,
                first_index=prompt * body.n,
                continues_prompt=True,
                echo=body.echo,
            )
            for prompt, generation in enumerate(generations)
        ]

    async def _respond(
        self,
        shape: ResponseFormatter,
        answers: Sequence[PromptOutput],
        body: AnyCompletionRequest,
        caller: Caller,
        trace: RequestTrace,
    ) -> Response:
        batches = self._admitted(answers, caller, trace)
        if not body.stream:
            content = await collect(shape, answers, batches)
            return Response(content, media_type="application/json", headers=trace.headers)
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        stream = await peek_first(sse_events(shape, answers, batches, include_usage=include_usage))
        headers = {"cache-control": "no-cache"} | trace.headers
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    async def _admitted(
        self, answers: Sequence[PromptOutput], caller: Caller, trace: RequestTrace
    ) -> AsyncGenerator[list[TextDelta], None]:
        """Pieces of all answers, within the caller's limits; what they used is settled however this generator ends."""
        trace.num_answers = sum(prompt.generation.n for prompt in answers)
        max_total_tokens = sum(prompt.generation.max_total_tokens for prompt in answers)
        async with self.ledger.admitted(caller, max_total_tokens, trace):
            streams = [self._generate(prompt) for prompt in answers]
            try:
                async with aclosing(streams[0] if len(streams) == 1 else interleaved(streams)) as batches:
                    async for pieces in batches:
                        trace.mark_token()
                        yield pieces
            except Exception as error:
                trace.status = error_response(error)[0]
                raise
            finally:
                trace.usage = usage_of(answers)

    async def _generate(self, answers: PromptOutput) -> AsyncGenerator[list[TextDelta], None]:
        """Pieces as the replica makes them, until every answer to the prompt has its finish_reason."""
        replies: Any = self._model.options(stream=True).generate.remote(answers.generation)
        try:
            async for deltas in replies:
                if pieces := answers.add(deltas):
                    yield pieces
                if answers.finished:
                    return
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except RayActorError as error:
            raise EngineFault("the model replica died while it answered: send the request again") from error
        finally:
            replies.cancel()

    async def _engine_metrics(self) -> str:
        """Of the model replicas that are there now; nothing while one of them does not answer."""
        try:
            asked = self._model.broadcast("stats")
            replies = await asked.results_async(timeout_s=_STATS_TIMEOUT_S, return_exceptions=True)
        except (TimeoutError, DeploymentUnavailableError):
            return ""
        engines: dict[str, EngineStats] = dict(reply for reply in replies if not isinstance(reply, BaseException))
        return engine_metrics(engines)
