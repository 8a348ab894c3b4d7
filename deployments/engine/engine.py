"""The engine: token ids in, token ids out, many sequences and many adapters at once over one NF4 base.

One thread calls `step()` in a loop (`run()` does); any thread may add and cancel requests or load adapters.
Knows nothing of Ray, HTTP or text.
"""

import logging
import threading
import time
from collections.abc import Callable

import torch
from transformers import LlamaForCausalLM

from deployments.engine.kv_cache import KVCache
from deployments.engine.llama import Llama
from deployments.engine.lora import NO_ADAPTER, AdapterSlots, LoraWeights
from deployments.engine.request import Delta, EngineRequest
from deployments.engine.sampling import random_stream, sample
from deployments.engine.scheduler import Scheduler, Sequence

logger = logging.getLogger(__name__)


class Engine:
    """Continuous batching over one base model and its adapters.

    Args:
        model: a transformers Llama with 4-bit linears, in eval mode.
        max_model_len: longest prompt plus answer, in tokens.
        max_num_seqs: sequences that run at once; more wait.
        max_num_batched_tokens: tokens of one step; longer prompts are cut into chunks of this size.
        max_loras: adapters loaded at once.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        *,
        max_model_len: int,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 512,
        max_loras: int = 8,
    ) -> None:
        self._llama = Llama(model, max_model_len)
        self._cache = KVCache(model.config, max_num_seqs, max_model_len, self._llama.dtype, self._llama.device)
        self._scheduler = Scheduler(max_num_seqs, max_num_batched_tokens)
        self._adapters = AdapterSlots(max_loras)
        self._sequences: dict[str, Sequence] = {}
        self._lock = threading.Lock()  # guards scheduler, adapters and sequences; never held during a forward
        self._work = threading.Condition(self._lock)
        self._stopped = False
        self.max_model_len = max_model_len
        self.last_token_at: float | None = None  # time.monotonic() of the newest token

    @property
    def num_running(self) -> int:
        """Sequences that hold a row of the KV cache."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for one."""
        return len(self._scheduler.waiting)

    @property
    def num_adapter_references(self) -> int:
        """Adapter references held by sequences that have not ended."""
        return self._adapters.num_in_use

    def loaded_adapters(self) -> list[str]:
        """Keys of the loaded adapters."""
        with self._lock:
            return self._adapters.loaded

    def lora_weights(self, tensors: dict[str, torch.Tensor], scaling: float) -> LoraWeights:
        """PEFT's tensors as this engine takes them (its dtype and device, scaling folded in)."""
        return LoraWeights.from_peft(tensors, scaling, self._llama.dtype, self._llama.device)

    def load_adapter(self, key: str, weights: LoraWeights) -> bool:
        """Make an adapter usable as `key`; False while every slot is in use by running sequences."""
        with self._lock:
            return self._adapters.load(key, weights)

    def unload_adapter(self, key: str) -> bool:
        """Free an adapter's slot; False if it is in use or not loaded."""
        with self._lock:
            return self._adapters.unload(key)

    def add_request(self, request: EngineRequest, on_delta: Callable[[Delta], None]) -> None:
        """Queue a request; `on_delta` is called from the engine's thread, the last time with a finish_reason.

        Raises:
            ValueError: the prompt is empty or prompt plus max_tokens does not fit max_model_len.
            KeyError: the adapter is not loaded.
        """
        num_tokens = len(request.prompt_token_ids) + request.sampling.max_tokens
        if not request.prompt_token_ids or request.sampling.max_tokens < 1 or num_tokens > self.max_model_len:
            raise ValueError(
                f"a prompt of {len(request.prompt_token_ids)} tokens and max_tokens {request.sampling.max_tokens} "
                f"do not fit max_model_len {self.max_model_len}"
            )
        sequence = Sequence(
            request_id=request.request_id,
            token_ids=list(request.prompt_token_ids),
            num_prompt_tokens=len(request.prompt_token_ids),
            sampling=request.sampling,
            adapter=request.adapter,
            on_delta=on_delta,
            generator=random_stream(request.sampling),
        )
        with self._work:
            if request.adapter is not None:
                sequence.adapter_slot = self._adapters.acquire(request.adapter)
            self._sequences[request.request_id] = sequence
            self._scheduler.waiting.append(sequence)
            self._work.notify()

    def cancel(self, request_id: str) -> None:
        """Stop a request before the next step, without another delta; unknown ids are ignored."""
        with self._lock:
            sequence = self._sequences.get(request_id)
            if sequence is not None:
                self._end(sequence)

    def run(self) -> None:
        """Step until `stop()`, sleeping while there is nothing to do."""
        while True:
            with self._work:
                self._work.wait_for(lambda: self._stopped or self._sequences)
                if self._stopped:
                    return
            self.step()

    def stop(self) -> None:
        """Make `run()` return after the current step."""
        with self._work:
            self._stopped = True
            self._work.notify_all()

    def step(self) -> int:
        """Run one batch; returns its number of tokens. A fault ends the requests that were in the batch, no others."""
        with self._lock:
            scheduled = self._scheduler.schedule()
            slots = [s.adapter_slot for s, chunk in scheduled for _ in chunk.token_ids]
            lora = self._adapters.batch(slots, self._llama.device)
        if not scheduled:
            return 0
        chunks = [chunk for _, chunk in scheduled]
        try:
            hidden = self._llama.forward(chunks, self._cache, lora)
            ends = torch.tensor([len(chunk.token_ids) for chunk in chunks]).cumsum(0) - 1
            sampling = [i for i, (s, chunk) in enumerate(scheduled) if chunk.end == len(s.token_ids)]
            logits = self._llama.logits(hidden[ends[sampling]])
            tokens = {
                i: sample(row, scheduled[i][0].sampling, scheduled[i][0].token_ids, scheduled[i][0].generator)
                for i, row in zip(sampling, logits, strict=True)
            }
        except Exception:
            logger.exception("a step with %d sequences failed", len(scheduled))
            self._fail([sequence for sequence, _ in scheduled])
            return len(slots)
        for i, (sequence, chunk) in enumerate(scheduled):
            self._advance(sequence, chunk.end, tokens.get(i))
        return len(slots)

    def _advance(self, sequence: Sequence, num_computed: int, token: int | None) -> None:
        with self._lock:
            if sequence.request_id not in self._sequences:  # cancelled while the step ran
                return
            sequence.num_computed = num_computed
            if token is None:
                return
            self.last_token_at = time.monotonic()
            sampling = sequence.sampling
            if token in sampling.stop_token_ids and not sampling.ignore_eos:
                delta = Delta([], "stop")
            else:
                sequence.token_ids.append(token)
                delta = Delta([token], "length" if sequence.num_output_tokens >= sampling.max_tokens else None)
            if delta.finish_reason is not None:
                self._end(sequence)
        sequence.on_delta(delta)

    def _fail(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            with self._lock:
                alive = sequence.request_id in self._sequences
                if alive:
                    self._end(sequence)
            if alive:
                sequence.on_delta(Delta([], "error"))

    def _end(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        self._scheduler.remove(sequence)
        if sequence.adapter is not None:
            self._adapters.release(sequence.adapter)
            sequence.adapter_slot = NO_ADAPTER
