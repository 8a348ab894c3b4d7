"""ChatIngress: OpenAI's HTTP API in front of the model replicas.

A request is validated (`protocol/`), rendered to token ids (`rendering.py`) and sent to a replica. The replica's token
deltas become text (`outputs.py`) and then OpenAI's formats (`openai_responses.py`, `response_writer.py`). Errors become
status codes before the first byte of a response. `chat` and `models` offer the same to callers inside the cluster, by
handle.
"""

import asyncio
import sys
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal, cast

from fastapi import Path, Query, Response
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
from deployments.api.declared_responses import (
    ADMIN_ERRORS,
    COMPLETION_RESPONSES,
    ERRORS,
    METRICS_RESPONSES,
    STORED_ERRORS,
    TOKENIZER_ERRORS,
)
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
from deployments.api.response_writer import ResponseWriter, new_response
from deployments.api.responses_api import ResponsesApi
from deployments.asgi import CorsMiddleware
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
from deployments.protocol.chat import AnyCompletionRequest, ChatCompletion, ChatCompletionRequest
from deployments.protocol.completions import Completion, CompletionRequest
from deployments.protocol.generation import StreamOptions
from deployments.protocol.models import Model, ModelList
from deployments.protocol.response_items import ItemList
from deployments.protocol.response_request import ResponseRequest
from deployments.protocol.responses import DeletedResponse, ResponseObject
from deployments.protocol.tokenize import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from deployments.protocol.tools import ToolCallDelta
from deployments.responses.client import StoredResponsesClient
from deployments.structured_outputs.compiler import GrammarCompiler
from deployments.text.vocabulary import Vocabulary
from training.base_models.resolve import resolve_base_model
from training.base_models.tokenizer import load_tokenizer
from training.registry.manifest import AdapterManifest
from training.registry.registry import AdapterRegistry

_READY_TIMEOUT_S = 10.0
_STATS_TIMEOUT_S = 2.0


def _replica() -> Any:
    return serve.get_replica_context().servable_object


def _ledger() -> LedgerClient:
    """This replica's client of the ledger."""
    return cast(LedgerClient, _replica().ledger)


def _cors_origins() -> tuple[str, ...]:
    """Whose web pages may use the API."""
    return cast(tuple[str, ...], _replica().cors_origins)


api = create_api()  # complete before the class: `serve.ingress` copies it
api.add_middleware(RequestTraceMiddleware, ledger=_ledger)
api.add_middleware(CorsMiddleware, origins=_cors_origins)


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}, graceful_shutdown_timeout_s=30)
@serve.ingress(api)
class ChatIngress:
    """One replica of the API. Holds tokenizer and chat formats, no weights."""

    def __init__(
        self,
        model: DeploymentHandle[Any],
        ledger: DeploymentHandle[Any],
        stored_responses: DeploymentHandle[Any],
        args: ServeArgs,
    ) -> None:
        sys.setswitchinterval(0.001)  # 1 ms instead of 5: threads that render long prompts yield sooner
        self._model = model
        self.ledger = LedgerClient(ledger)
        self._responses = ResponsesApi(StoredResponsesClient(stored_responses))
        self.cors_origins = args.cors_origins
        self._base = resolve_base_model(args.base_model, args.base_revision)
        self._registry = AdapterRegistry(args.registry)
        max_model_len = args.engine.max_model_len or self._base.context_length
        self._catalog = ModelCatalog(self._base, self._registry, max_model_len)
        tokenizer = load_tokenizer(self._base)
        self._vocabulary = Vocabulary(tokenizer)
        self._renderer = RequestRenderer(
            self._base,
            args.chat_format,
            tokenizer,
            self._vocabulary,
            max_model_len,
            default_system=args.chat.default_system,
        )
        self._grammars = GrammarCompiler(self._base, tokenizer, self._vocabulary)

    async def __del__(self) -> None:
        """Called by Ray Serve before the replica stops."""
        await self.ledger.flush()

    @api.post("/v1/chat/completions", response_model=ChatCompletion, responses=COMPLETION_RESPONSES)
    async def chat_completions(self, body: ChatCompletionRequest, caller: ChatCaller, trace: CurrentTrace) -> Response:
        """Complete a chat with the base model or an adapter, as one response or as server-sent events."""
        completion_id = f"chatcmpl-{uuid.uuid4().hex}"
        manifest = await self._catalog.resolve(body.model, caller.identity(body.end_user))
        trace.model = self._catalog.model_id(manifest)
        output = await self._chat_output(body, manifest, completion_id)
        formatter = self._chat_formatter(body, completion_id, trace.model, output)
        return await self._respond(formatter, [output], body, caller, trace)

    @api.post("/v1/completions", response_model=Completion, responses=COMPLETION_RESPONSES)
    async def completions(self, body: CompletionRequest, caller: ChatCaller, trace: CurrentTrace) -> Response:
        """Continue or score texts with the base model or an adapter, as one response or as server-sent events."""
        completion_id = f"cmpl-{uuid.uuid4().hex}"
        manifest = await self._catalog.resolve(body.model, caller.identity(body.end_user))
        trace.model = self._catalog.model_id(manifest)
        outputs = await asyncio.to_thread(self._text_outputs, body, manifest, completion_id)
        formatter = CompletionFormatter(
            completion_id,
            trace.model,
            self._vocabulary,
            with_logprobs=body.logprobs is not None,
            service_tier=body.service_tier,
        )
        return await self._respond(formatter, outputs, body, caller, trace)

    @api.post("/v1/responses", response_model=ResponseObject, responses=COMPLETION_RESPONSES)
    async def create_response(self, body: ResponseRequest, caller: ChatCaller, trace: CurrentTrace) -> Response:
        """Answer a text or messages, after a stored response if one is named, and store the answer."""
        given = await self._responses.read_input(body, caller)
        manifest = await self._catalog.resolve(body.model, caller.identity(body.end_user))
        trace.model = self._catalog.model_id(manifest)
        response = new_response(body, trace.model)
        with given.placed_errors():
            output = await self._chat_output(given.chat_request(body), manifest, response.id)
        grammar = output.generation.grammar
        writer = ResponseWriter(response, self._vocabulary, calls=None if grammar is None else grammar.calls)
        batches = self._admit_and_generate([output], caller, trace)
        return await self._responses.respond(writer, given, output, batches, body, caller, trace)

    @api.get("/v1/responses/{response_id}", response_model=ResponseObject, responses=STORED_ERRORS)
    async def retrieve_response(
        self, response_id: str, caller: ChatCaller, stream: Literal["false"] = "false"
    ) -> Response:
        """Show a stored response of the caller's key."""
        return await self._responses.retrieve(response_id, caller)

    @api.delete("/v1/responses/{response_id}", responses=STORED_ERRORS)
    async def delete_response(self, response_id: str, caller: ChatCaller) -> DeletedResponse:
        """Delete a stored response. Responses that continue it keep what they need of it."""
        return await self._responses.delete(response_id, caller)

    @api.get("/v1/responses/{response_id}/input_items", responses=STORED_ERRORS)
    async def list_input_items(
        self,
        response_id: str,
        caller: ChatCaller,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: Annotated[str | None, Query(description="id of an item: the page begins after it")] = None,
    ) -> ItemList:
        """List the items that a stored response was made from, those of earlier responses included."""
        return await self._responses.input_items(
            response_id, caller, limit=limit, newest_first=order == "desc", after=after
        )

    @api.post("/v1/responses/{response_id}/cancel", responses=STORED_ERRORS)
    async def cancel_response(self, response_id: str, caller: ChatCaller) -> ResponseObject:
        """Refused: only responses in the background could be cancelled, and there are none."""
        return await self._responses.cancel(response_id, caller)

    @api.get("/v1/models", responses={500: ERRORS[500]})
    async def list_models(self, caller: ChatCaller) -> ModelList:
        """List the base model and every version of its adapters."""
        return ModelList(data=await self._catalog.models())

    @api.get("/v1/models/{model_id:path}", responses={404: ERRORS[404], 500: ERRORS[500]})
    async def retrieve_model(self, model_id: str, caller: ChatCaller) -> Model:
        """Show one model, by any id that a request may name."""
        return await self._catalog.model(model_id)

    @api.post("/tokenize", responses=TOKENIZER_ERRORS)
    async def tokenize(self, body: TokenizeRequest, caller: ChatCaller) -> TokenizeResponse:
        """The token ids that a text or messages become as a prompt."""
        manifest = await self._catalog.resolve(body.model or self._base.name)
        return await asyncio.to_thread(self._renderer.tokenize, body, manifest)

    @api.post("/detokenize", responses=TOKENIZER_ERRORS)
    async def detokenize(self, body: DetokenizeRequest, caller: ChatCaller) -> DetokenizeResponse:
        """The text of token ids."""
        await self._catalog.resolve(body.model or self._base.name)
        return await asyncio.to_thread(self._renderer.detokenize, body)

    @api.get("/v1/adapters", responses={500: ERRORS[500]})
    async def list_adapters(self, caller: AdminCaller) -> AdapterList:
        """List all adapters with their versions, and where their traffic goes."""
        return AdapterList(data=await asyncio.to_thread(self._admin(caller).adapters))

    @api.get("/v1/adapters/{name}", responses={404: ERRORS[404], 500: ERRORS[500]})
    async def show_adapter(self, name: str, caller: AdminCaller) -> Adapter:
        """Show one adapter with its versions, and where its traffic goes."""
        return await asyncio.to_thread(self._admin(caller).adapter, name)

    @api.post("/v1/adapters/{name}/promote", responses=ADMIN_ERRORS)
    async def promote_adapter(
        self, name: str, body: PromoteRequest, caller: AdminCaller, request_id: RequestId = None
    ) -> AdapterChange:
        """Point an alias at a version, on every replica at once; below 100 percent, make it the champion's canary."""
        admin = self._admin(caller, request_id)
        return await asyncio.to_thread(admin.promote, name, body.version, body.alias, body.percent)

    @api.post("/v1/adapters/{name}/rollback", responses=ADMIN_ERRORS)
    async def roll_back_adapter(
        self, name: str, caller: AdminCaller, body: RollbackRequest | None = None, request_id: RequestId = None
    ) -> AdapterChange:
        """End the canary, or point an alias at its previous version."""
        alias = (body or RollbackRequest()).alias
        return await asyncio.to_thread(self._admin(caller, request_id).rollback, name, alias)

    @api.delete("/v1/adapters/{name}/versions/{version}", responses=ADMIN_ERRORS)
    async def delete_adapter_version(
        self,
        name: str,
        version: Annotated[int, Path(ge=1, lt=10**9)],
        caller: AdminCaller,
        request_id: RequestId = None,
    ) -> DeletedVersion:
        """Delete a version that no alias points at. Requests in progress with it run to completion."""
        return await asyncio.to_thread(self._admin(caller, request_id).delete_version, name, version)

    @api.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        """Liveness: the process responds."""
        return {"status": "ok"}

    @api.get("/readyz", responses={503: ERRORS[503]})
    async def readyz(self) -> dict[str, str]:
        """Readiness: a token was generated recently, or can be generated now."""
        try:
            await asyncio.wait_for(self._model.ready.remote(), _READY_TIMEOUT_S)
        except Exception as error:
            raise NotReady("no model replica is ready: wait, or check the status of the Serve application") from error
        return {"status": "ready"}

    @api.get("/metrics", response_class=Response, responses=METRICS_RESPONSES)
    async def metrics(self, caller: ChatCaller) -> Response:
        """Prometheus metrics: requests over all replicas of the API, and the state of every model replica."""
        requests, engines = await asyncio.gather(self.ledger.metrics(), self._engine_metrics())
        return Response(requests + engines, media_type=CONTENT_TYPE)

    async def chat(self, body: ChatCompletionRequest, caller: Caller) -> AsyncGenerator[str | ToolCallDelta, None]:
        """Stream the text and calls of one completion (`n` is 1), for callers inside the cluster.

        Raises:
            CorralError: the same errors as those of `POST /v1/chat/completions`.
        """
        with self.ledger.recorded(RequestTrace(route="ui", caller=caller)) as trace:
            manifest = await self._catalog.resolve(body.model, caller.identity(body.end_user))
            trace.model = self._catalog.model_id(manifest)
            completion_id = f"chatcmpl-{uuid.uuid4().hex}"
            output = await self._chat_output(body, manifest, completion_id)
            formatter = self._chat_formatter(body, completion_id, trace.model, output)
            async with aclosing(self._admit_and_generate([output], caller, trace)) as batches:
                async for deltas in batches:
                    for part in (part for delta in deltas for part in formatter.deltas(delta)):
                        if part.content:
                            yield part.content
                        for call in part.tool_calls or ():
                            yield call
            trace.status = 200

    async def models(self) -> list[Model]:
        """The models of `GET /v1/models`, for callers inside the cluster."""
        return await self._catalog.models()

    def _admin(self, caller: Caller, request_id: str | None = None) -> AdapterAdmin:
        actor = {"key_id": caller.key_id, "name": caller.name, "request_id": request_id}
        return AdapterAdmin(self._registry, actor)

    async def _chat_output(
        self, body: ChatCompletionRequest, manifest: AdapterManifest | None, completion_id: str
    ) -> PromptOutput:
        generation = await asyncio.to_thread(self._renderer.chat, body, manifest, completion_id)
        if generation.grammar is not None:
            await self._grammars.compile(generation.grammar)  # only to refuse it here; the replica compiles its own
        return PromptOutput(generation, self._vocabulary, body.stop_strings)

    def _chat_formatter(
        self, body: ChatCompletionRequest, completion_id: str, model: str, output: PromptOutput
    ) -> ChatFormatter:
        grammar = output.generation.grammar
        return ChatFormatter(
            completion_id,
            model,
            self._vocabulary,
            with_logprobs=body.logprobs,
            service_tier=body.service_tier,
            calls=None if grammar is None else grammar.calls,
        )

    def _text_outputs(
        self, body: CompletionRequest, manifest: AdapterManifest | None, completion_id: str
    ) -> list[PromptOutput]:
        generations = self._renderer.completion(body, manifest, completion_id)
        return [
            PromptOutput(
                generation,
                self._vocabulary,
                body.stop_strings,
                first_index=prompt_index * body.n,
                continues_prompt=True,
                echo=body.echo,
            )
            for prompt_index, generation in enumerate(generations)
        ]

    async def _respond(
        self,
        formatter: ResponseFormatter,
        outputs: Sequence[PromptOutput],
        body: AnyCompletionRequest,
        caller: Caller,
        trace: RequestTrace,
    ) -> Response:
        """Generate the completions, and respond with one JSON object or an event stream, as requested."""
        batches = self._admit_and_generate(outputs, caller, trace)
        if not body.stream:
            content = await collect(formatter, outputs, batches)
            return Response(content, media_type="application/json", headers=trace.headers)
        stream_options = body.stream_options or StreamOptions()
        events = await peek_first(sse_events(formatter, outputs, batches, stream_options))
        headers = {"cache-control": "no-cache"} | trace.headers
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    async def _admit_and_generate(
        self, outputs: Sequence[PromptOutput], caller: Caller, trace: RequestTrace
    ) -> AsyncGenerator[list[TextDelta], None]:
        """Batches of text deltas of all prompts, within the caller's limits; `trace` has their usage at the end."""
        trace.num_completions = sum(output.generation.n for output in outputs)
        max_tokens = sum(output.generation.max_total_tokens for output in outputs)
        min_tokens = sum(output.generation.min_total_tokens for output in outputs)
        async with self.ledger.admitted(caller, max_tokens, min_tokens, trace) as admitted_tokens:
            if admitted_tokens < max_tokens:  # a chat, which is one prompt
                outputs[0].generation = outputs[0].generation.shortened(admitted_tokens)
            streams = [self._generate(output) for output in outputs]
            try:
                async with aclosing(streams[0] if len(streams) == 1 else interleaved(streams)) as batches:
                    async for deltas in batches:
                        trace.mark_token()
                        yield deltas
            except Exception as error:
                trace.status = error_response(error)[0]
                raise
            finally:
                trace.usage = usage_of(outputs)

    async def _generate(self, output: PromptOutput) -> AsyncGenerator[list[TextDelta], None]:
        """Text deltas of one prompt as a replica generates them, until every completion has its finish_reason."""
        token_batches: Any = self._model.options(stream=True).generate.remote(output.generation)
        try:
            async for token_deltas in token_batches:
                if text_deltas := output.add(token_deltas):
                    yield text_deltas
                if output.finished:
                    return
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except RayActorError as error:
            raise EngineFault("the model replica died during generation: send the request again") from error
        finally:
            token_batches.cancel()

    async def _engine_metrics(self) -> str:
        """Metrics of the running model replicas; empty if one of them does not respond in time."""
        try:
            replies = await self._model.broadcast("stats").results_async(
                timeout_s=_STATS_TIMEOUT_S, return_exceptions=True
            )
        except (TimeoutError, DeploymentUnavailableError):
            return ""
        engines: dict[str, EngineStats] = dict(reply for reply in replies if not isinstance(reply, BaseException))
        return engine_metrics(engines)
