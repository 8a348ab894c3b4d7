"""LlamaModel, the autoscaled replica: one engine over one 4-bit base, and the adapters it has loaded.

The ingress calls `generate` with token ids and gets token ids back. Knows nothing of HTTP or text.
"""

import asyncio
import json
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable

import torch
from ray import serve
from safetensors.torch import load_file

from deployments.config import ServeArgs
from deployments.engine.engine import Engine
from deployments.engine.lora import LoraWeights
from deployments.engine.request import Delta, EngineRequest, SamplingParams
from deployments.errors import EngineFault, NotReady
from deployments.generation import GenerationRequest
from training.base_models import load_quantized, load_tokenizer, resolve_base_model
from training.registry import AdapterManifest, AdapterRegistry, check_base

_FRESH_S = 5.0  # a token this young proves that the engine works
_SLOT_POLL_S = 0.02


@serve.deployment(
    max_ongoing_requests=256,
    health_check_period_s=5,
    health_check_timeout_s=20,
    graceful_shutdown_timeout_s=30,
    ray_actor_options={"num_cpus": 1},
)
class LlamaModel:
    """Owns one engine on its own thread, and loads adapters into it on first use."""

    def __init__(self, args: ServeArgs) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(args.engine.num_threads or os.cpu_count() or 1)
        self._base = resolve_base_model(args.base_model, args.base_revision)
        self._registry = AdapterRegistry(args.registry)
        self._engine = Engine(
            load_quantized(self._base, args.quantization, device),
            max_model_len=args.engine.max_model_len or self._base.context_length,
            max_num_seqs=args.engine.max_num_seqs,
            max_num_batched_tokens=args.engine.max_num_batched_tokens,
            max_loras=args.engine.max_loras,
        )
        self._probe_token = load_tokenizer(self._base).encode("a").ids[0]
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._thread = threading.Thread(target=self._engine.run, name="engine", daemon=True)
        self._thread.start()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        """Continue the prompt; deltas that wait for the consumer are merged into one.

        Raises:
            AdapterRefused: the adapter's files are not what the manifest says, or fit another base.
            AdapterNotFound: the version was deleted meanwhile.
            EngineFault: the engine failed on this request.
        """
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[Delta] = asyncio.Queue()

        def deliver(delta: Delta) -> None:
            loop.call_soon_threadsafe(deltas.put_nowait, delta)

        await self._add(request, deliver)
        try:
            while True:
                delta = await deltas.get()
                token_ids = list(delta.token_ids)
                while not deltas.empty():
                    delta = deltas.get_nowait()
                    token_ids += delta.token_ids
                if delta.finish_reason == "error":
                    raise EngineFault("the engine failed on this request: the replica's log has the cause")
                yield Delta(token_ids, delta.finish_reason)
                if delta.finish_reason is not None:
                    return
        finally:
            self._engine.cancel(request.request_id)

    async def ready(self) -> None:
        """Return when a token was made lately or can be made now.

        Raises:
            NotReady: the engine's thread has ended.
        """
        self.check_health()
        last = self._engine.last_token_at
        if last is None or time.monotonic() - last > _FRESH_S:
            sampling = SamplingParams(max_tokens=1, temperature=0)
            probe = GenerationRequest(f"ready-{uuid.uuid4().hex}", [self._probe_token], sampling, None)
            async for _ in self.generate(probe):
                pass

    def check_health(self) -> None:
        """Ray Serve's health check: the engine's thread is alive.

        Raises:
            NotReady: it is not.
        """
        if not self._thread.is_alive():
            raise NotReady("the engine has stopped")

    async def _add(self, request: GenerationRequest, deliver: Callable[[Delta], None]) -> None:
        key = None
        while True:
            if request.adapter is not None:
                key = request.adapter.model_id
                await self._ensure_loaded(key, request.adapter)
            try:
                self._engine.add_request(
                    EngineRequest(request.request_id, request.prompt_token_ids, request.sampling, key), deliver
                )
                return
            except KeyError:  # evicted for another adapter between loading and adding
                continue

    async def _ensure_loaded(self, key: str, manifest: AdapterManifest) -> None:
        """Load an adapter once, however many requests wait for it; a caller that leaves does not stop the others."""
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
            config = json.loads((directory / "adapter_config.json").read_text())
            scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
            return self._engine.lora_weights(load_file(directory / "adapter_model.safetensors"), scaling)

        weights = await asyncio.to_thread(read)
        while not self._engine.load_adapter(key, weights):  # every slot is in use: wait for one
            await asyncio.sleep(_SLOT_POLL_S)
