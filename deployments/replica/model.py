"""LlamaModel, the autoscaled replica: one engine over one 4-bit base, and the adapters loaded into it.

Token ids in, token ids out. Knows nothing of HTTP or text.
"""

import asyncio
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator

import torch
from ray import serve
from safetensors.torch import load_file

from deployments.config import ServeArgs
from deployments.engine.engine import Engine, OnDeltas
from deployments.engine.llama.lora import LoraWeights
from deployments.engine.request import Delta, EngineRequest, SamplingParams
from deployments.engine.stats import EngineStats
from deployments.errors import EngineFault, NotReady
from deployments.replica.delta_buffer import DeltaBuffer
from deployments.replica.request import GenerationRequest
from deployments.structured_outputs.compiler import GrammarCompiler
from deployments.text.vocabulary import Vocabulary
from training.base_models.nf4 import load_quantized
from training.base_models.resolve import resolve_base_model
from training.base_models.tokenizer import load_tokenizer
from training.errors import AdapterRefused
from training.registry.adapter_files import WEIGHTS_FILE
from training.registry.manifest import AdapterManifest, check_base
from training.registry.registry import AdapterRegistry

_FRESH_S = 5.0  # a token generated this recently proves that the engine works
_STALLED_S = 60.0  # a step takes milliseconds; with the largest models, seconds
_SLOT_POLL_S = 0.02
_CHUNKS_PER_S_AND_CPU = 50  # costs about 10 % of the throughput at 8 and 32 streams on two cores


@serve.deployment(
    max_ongoing_requests=256,
    health_check_period_s=5,
    health_check_timeout_s=20,
    graceful_shutdown_timeout_s=30,
    ray_actor_options={"num_cpus": 1},
)
class LlamaModel:
    """Runs one engine on its own thread and loads adapters into it on first use."""

    def __init__(self, args: ServeArgs) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(args.engine.num_threads or os.cpu_count() or 1)
        self._base = resolve_base_model(args.base_model, args.base_revision)
        self._registry = AdapterRegistry(args.registry)
        model = load_quantized(self._base, args.quantization, device)
        self._engine = Engine(
            model,
            max_model_len=args.engine.max_model_len or self._base.context_length,
            max_num_seqs=args.engine.max_num_seqs,
            max_num_batched_tokens=args.engine.max_num_batched_tokens,
            max_loras=args.engine.max_loras,
            kv_cache_bytes=None if args.engine.kv_cache_gib is None else int(args.engine.kv_cache_gib * 2**30),
            deliver=self._deliver,
        )
        self._chunks_per_s = args.engine.chunks_per_s or _CHUNKS_PER_S_AND_CPU * (os.cpu_count() or 1)
        tokenizer = load_tokenizer(self._base)
        self._probe_token = tokenizer.encode("a").ids[0]
        self._grammars = GrammarCompiler(self._base, tokenizer, Vocabulary(tokenizer))
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._thread = threading.Thread(target=self._engine.run, name="engine", daemon=True)
        self._thread.start()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        """Continue the prompt; each item holds at most one delta per answer.

        Raises:
            AdapterRefused: the adapter's files do not match its manifest, are for another base, or produce NaN.
            AdapterNotFound: the version was deleted in the meantime.
            ResponseFormatRefused: the grammar does not compile.
            EngineFault: the engine failed on this request.
        """
        self._loop = asyncio.get_running_loop()  # all requests share it
        buffer = DeltaBuffer(self._pause_s)
        key = await self._add(request, buffer.add)
        num_open = request.n
        try:
            while num_open:
                deltas = await buffer.next()
                if any(delta.finish_reason == "error" for delta in deltas):
                    self._check_healthy(key)
                    raise EngineFault("the engine failed on this request: the replica's log has the cause")
                num_open -= sum(delta.finish_reason is not None for delta in deltas)
                yield deltas
        finally:
            self._engine.cancel(request.request_id)

    async def stats(self) -> tuple[str, EngineStats]:
        """This replica's id and the statistics of its engine."""
        return serve.get_replica_context().replica_id.unique_id, self._engine.stats()

    async def ready(self) -> None:
        """Return once a token was generated recently or can be generated now.

        Raises:
            NotReady: the engine has stopped, or its step does not end.
        """
        self.check_health()
        last = self._engine.last_token_at
        if last is None or time.monotonic() - last > _FRESH_S:
            sampling = SamplingParams(max_tokens=1, temperature=0)
            probe = GenerationRequest(f"ready-{uuid.uuid4().hex}", [self._probe_token], sampling, None)
            async for _ in self.generate(probe):
                pass

    def check_health(self) -> None:
        """Ray Serve's health check.

        Raises:
            NotReady: the engine's thread has stopped, or its step does not end.
        """
        if not self._thread.is_alive():
            raise NotReady("the engine has stopped")
        if self._engine.stalled_for_s() > _STALLED_S:
            raise NotReady(f"the engine's step has not ended for {self._engine.stalled_for_s():.0f} s")

    def _pause_s(self) -> float:
        """Pause between two chunks of a stream, so that all streams together stay below `chunks_per_s`."""
        return (self._engine.num_running + self._engine.num_waiting) / self._chunks_per_s

    def _check_healthy(self, key: str | None) -> None:
        if key in self._engine.unhealthy_adapters:
            raise AdapterRefused(f"adapter {key!r} produced NaN and is disabled: roll back to the previous version")

    async def _add(self, request: GenerationRequest, on_deltas: OnDeltas) -> str | None:
        """Load the request's adapter, queue the request, and return the adapter's key."""
        constraint = None if request.grammar is None else await self._grammars.compile(request.grammar)
        key = None
        while True:
            if request.adapter is not None:
                key = request.adapter.model_id
                self._check_healthy(key)
                await self._ensure_loaded(key, request.adapter)
            try:
                self._engine.add_request(
                    EngineRequest(
                        request.request_id, request.prompt_token_ids, request.sampling, key, request.n, constraint
                    ),
                    on_deltas,
                )
                return key
            except KeyError:  # the adapter was evicted between loading and adding
                continue

    def _deliver(self, deliveries: list[tuple[OnDeltas, list[Delta]]]) -> None:
        """Pass a step's deltas to the event loop, waking it up once for all of them."""

        def call_each() -> None:
            for on_deltas, deltas in deliveries:
                on_deltas(deltas)

        if deliveries:
            self._loop.call_soon_threadsafe(call_each)

    async def _ensure_loaded(self, key: str, manifest: AdapterManifest) -> None:
        """Load an adapter once for all requests that wait for it; a cancelled caller does not stop the load."""
        if key in self._engine.loaded_adapters():
            return
        task = self._loads.get(key)
        if task is None:
            task = asyncio.create_task(self._load(key, manifest))
            self._loads[key] = task
            task.add_done_callback(lambda _: self._loads.pop(key))
        await asyncio.shield(task)

    async def _load(self, key: str, manifest: AdapterManifest) -> None:
        def read() -> LoraWeights:
            check_base(manifest, self._base)
            directory = self._registry.fetch(manifest)
            try:
                return self._engine.lora_weights(load_file(directory / WEIGHTS_FILE), manifest.lora.scaling)
            except ValueError as error:
                raise AdapterRefused(f"adapter {key!r}: {error}: train again with a lower learning rate") from error

        weights = await asyncio.to_thread(read)
        while not self._engine.load_adapter(key, weights):  # every slot is in use: wait for a free one
            await asyncio.sleep(_SLOT_POLL_S)
