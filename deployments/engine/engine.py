"""The engine: token ids in, token ids out, many sequences and many adapters at once over one NF4 base.

One thread calls `step()` in a loop (`run()` does); any thread may add and cancel requests or load adapters.
Knows nothing of Ray, HTTP or text, and runs where Ray is not installed.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from transformers import LlamaForCausalLM

from deployments.engine.adapter_slots import AdapterSlots
from deployments.engine.batch import constraint_masks, forward_batch
from deployments.engine.kv_cache import BlockPool
from deployments.engine.llama.load import load_llama
from deployments.engine.llama.lora import NO_ADAPTER, LoraWeights
from deployments.engine.request import Delta, EngineRequest, FinishReason, TokenLogprob
from deployments.engine.sampling import SamplingRow, forbid, random_stream, sample, token_logprobs
from deployments.engine.scheduler import Chunk, Scheduler
from deployments.engine.sequence import Sequence
from deployments.engine.stats import EngineStats

logger = logging.getLogger(__name__)

OnDeltas = Callable[[list[Delta]], None]
_LOGITS_ROWS = 64  # rows of the vocabulary's width that are held at once when a prompt is scored


class Engine:
    """Continuous batching over one base model and its adapters.

    Args:
        model: a transformers Llama with 4-bit linears, never run before; the engine takes its weights over.
        max_model_len: longest prompt plus answer, in tokens.
        max_num_seqs: sequences that run at once; more wait.
        max_num_batched_tokens: tokens of one step; longer prompts are cut into chunks, so that running answers never
            wait longer than one such step.
        max_loras: adapters loaded at once.
        kv_cache_bytes: memory for keys and values of all sequences, by default a gibibyte on a CPU and on CUDA most of
            what the weights leave; at least one sequence of max_model_len fits.
        deliver: called after each step with what it made; the default calls each request's `on_deltas`.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        *,
        max_model_len: int,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 256,
        max_loras: int = 8,
        kv_cache_bytes: int | None = None,
        deliver: Callable[[list[tuple[OnDeltas, list[Delta]]]], None] | None = None,
    ) -> None:
        self.max_model_len = max_model_len
        self._llama = load_llama(
            model,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            kv_cache_bytes=kv_cache_bytes,
            max_loras=max_loras,
        )
        self._pool = BlockPool(self._llama.num_blocks, self._llama.block_size)
        self._scheduler = Scheduler(self._pool, max_num_seqs, max_num_batched_tokens)
        self._adapters = AdapterSlots(max_loras)
        self._requests: dict[str, list[Sequence]] = {}  # sequences that have not ended
        self._callbacks: dict[str, OnDeltas] = {}
        self._prompt_logprobs: dict[str, list[TokenLogprob | None]] = {}
        self._deliver = deliver or _call_each
        self._lock = threading.Lock()  # guards all of the above; never held during a forward
        self._work = threading.Condition(self._lock)
        self._stopped = False
        self.unhealthy_adapters: set[str] = set()  # gave NaN; never used again
        self.last_token_at: float | None = None  # time.monotonic() of the newest token
        self.last_step_at = time.monotonic()  # when the last step ended, or work arrived after none

    @property
    def num_running(self) -> int:
        """Sequences that hold KV blocks."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for blocks or for their turn."""
        return len(self._scheduler.waiting)

    @property
    def num_adapter_references(self) -> int:
        """Adapter references held by sequences that have not ended."""
        return self._adapters.num_in_use

    @property
    def num_free_blocks(self) -> int:
        """KV blocks that no sequence holds."""
        return self._pool.num_free

    @property
    def num_blocks(self) -> int:
        """KV blocks in all."""
        return self._llama.num_blocks

    def stats(self) -> EngineStats:
        """How it is doing; any thread, while steps run."""
        with self._lock:
            return EngineStats(
                num_running=self.num_running,
                num_waiting=self.num_waiting,
                kv_cache_usage=1 - self.num_free_blocks / self.num_blocks,
                num_loaded_adapters=len(self._adapters.loaded),
                prefix_cache_queries=self._scheduler.prefix_cache_queries,
                prefix_cache_hits=self._scheduler.prefix_cache_hits,
                num_preemptions=self._scheduler.num_preemptions,
            )

    def loaded_adapters(self) -> list[str]:
        """Keys of the loaded adapters."""
        with self._lock:
            return self._adapters.loaded

    def lora_weights(self, tensors: dict[str, torch.Tensor], scaling: float) -> LoraWeights:
        """PEFT's tensors as this engine takes them (its dtype and device); any thread, while steps run."""
        return LoraWeights.from_peft(tensors, scaling, self._llama.dtype, self._llama.device)

    def load_adapter(self, key: str, weights: LoraWeights) -> bool:
        """Make an adapter usable as `key`; False while every slot is in use by sequences that have not ended."""
        with self._lock:
            if key in self._adapters:
                return True
            slot = self._adapters.take(key)
            if slot is None:
                return False
            self._llama.set_adapter(slot, weights)  # a step that runs now does not use this slot
            return True

    def unload_adapter(self, key: str) -> bool:
        """Free an adapter's slot; False if it is in use or not loaded."""
        with self._lock:
            slot = self._adapters.drop(key)
            if slot is None:
                return False
            self._llama.set_adapter(slot, None)
            return True

    def add_request(self, request: EngineRequest, on_deltas: OnDeltas) -> None:
        """Queue a request; `on_deltas` is called after each step that made something of it.

        Each answer's last delta has a finish_reason.

        Raises:
            ValueError: the prompt is empty, or prompt plus max_tokens can never fit.
            KeyError: the adapter is not loaded.
        """
        sampling, num_prompt_tokens = request.sampling, len(request.prompt_token_ids)
        num_tokens = num_prompt_tokens + sampling.max_tokens
        if sampling.max_tokens < 1 and sampling.prompt_logprobs is None:
            raise ValueError(f"max_tokens is {sampling.max_tokens}: nothing is asked for")
        if not num_prompt_tokens or num_tokens > self.max_model_len or not self._scheduler.fits(num_tokens):
            raise ValueError(
                f"a prompt of {num_prompt_tokens} tokens and max_tokens {sampling.max_tokens} "
                f"do not fit max_model_len {self.max_model_len}"
            )
        sequences: list[Sequence] = []
        for i in range(request.n):
            sequences.append(
                Sequence(
                    request_id=request.request_id,
                    index=i,
                    token_ids=list(request.prompt_token_ids),
                    num_prompt_tokens=num_prompt_tokens,
                    sampling=sampling if i == 0 else replace(sampling, prompt_logprobs=None),
                    adapter=request.adapter,
                    generator=random_stream(sampling, i),
                    constraint=request.constraint.copy() if request.constraint else None,
                    prefix_donor=sequences[0] if i else None,
                )
            )
        with self._work:
            for sequence in sequences:
                if request.adapter is not None:
                    sequence.adapter_slot = self._adapters.acquire(request.adapter)
                self._scheduler.add(sequence)
            if not self._requests:
                self.last_step_at = time.monotonic()
            self._requests[request.request_id] = sequences
            self._callbacks[request.request_id] = on_deltas
            if sampling.prompt_logprobs is not None:
                self._prompt_logprobs[request.request_id] = [None] * num_prompt_tokens
            self._work.notify()

    def cancel(self, request_id: str) -> None:
        """Stop a request before the next step, without another delta; unknown ids are ignored."""
        with self._lock:
            for sequence in list(self._requests.get(request_id, ())):
                self._end(sequence)

    def run(self) -> None:
        """Step until `stop()`, sleeping while there is nothing to do."""
        while True:
            with self._work:
                self._work.wait_for(lambda: self._stopped or self._requests)
                if self._stopped:
                    return
            self.step()

    def stop(self) -> None:
        """Make `run()` return after the current step."""
        with self._work:
            self._stopped = True
            self._work.notify_all()

    def stalled_for_s(self) -> float:
        """Seconds since the last step ended while requests are there; 0 when there are none."""
        return time.monotonic() - self.last_step_at if self._requests else 0.0

    def step(self) -> int:
        """Run one batch; returns its number of tokens. A fault ends the requests that were in the batch, no others."""
        chunks = self._schedule()
        if not chunks:
            return 0
        outputs = self._compute(chunks)
        self._deliver(self._collect(outputs))
        return sum(chunk.num_tokens for chunk in chunks)

    def _schedule(self) -> list[Chunk]:
        with self._lock:
            return self._scheduler.schedule()

    def _compute(self, chunks: list[Chunk]) -> list[tuple[Sequence, Delta]]:
        """What the step gives each sequence whose tokens are all computed now; an error for all if it fails."""
        try:
            return self._forward(chunks)
        except Exception:
            logger.exception("a step with %d sequences failed", len(chunks))
            return [(chunk.sequence, Delta([], "error", chunk.sequence.index)) for chunk in chunks]

    def _collect(self, outputs: list[tuple[Sequence, Delta]]) -> list[tuple[OnDeltas, list[Delta]]]:
        """The deltas of each request with its callback; sequences with a finish_reason end here."""
        by_request: dict[str, list[Delta]] = {}
        with self._lock:
            self.last_step_at = time.monotonic()
            callbacks = {}
            for sequence, delta in outputs:
                if sequence.ended:  # cancelled while the step ran
                    continue
                by_request.setdefault(sequence.request_id, []).append(delta)
                callbacks[sequence.request_id] = self._callbacks[sequence.request_id]
                if delta.finish_reason is not None:
                    self._end(sequence)
        return [(callbacks[request_id], deltas) for request_id, deltas in by_request.items()]

    def _forward(self, chunks: list[Chunk]) -> list[tuple[Sequence, Delta]]:
        """The forward of one step and what it gives each sequence whose tokens are all computed now."""
        batch, scored = forward_batch(chunks, self._llama.block_size)
        hidden = self._llama.forward(batch)
        with self._lock:
            for chunk in chunks:
                if not chunk.sequence.ended:
                    self._scheduler.mark_computed(chunk)
        num_scored = sum(len(positions) for _, positions in scored)
        self._score_prompts(scored, hidden[:num_scored])
        complete = [chunk.sequence for chunk in chunks if chunk.end == len(chunk.sequence.token_ids)]
        if not complete:
            return []
        hidden = hidden[num_scored:]
        generating = [i for i, sequence in enumerate(complete) if sequence.sampling.max_tokens]
        deltas = {id(s): Delta([], "length", s.index) for s in complete if not s.sampling.max_tokens}
        if generating:
            logits = self._llama.logits(hidden if len(generating) == len(complete) else hidden[generating])
            deltas |= self._sample([complete[i] for i in generating], logits)
        return [(sequence, self._first_delta(sequence, deltas[id(sequence)])) for sequence in complete]

    def _sample(self, sequences: list[Sequence], logits: torch.Tensor) -> dict[int, Delta]:
        masks, ended = constraint_masks(sequences)
        forbid(logits, masks)
        rows = [SamplingRow(s.sampling, s.token_ids, s.num_prompt_tokens, s.generator) for s in sequences]
        tokens = sample(logits, rows)
        asked = [i for i, s in enumerate(sequences) if s.sampling.logprobs is not None and tokens[i] >= 0]
        logprobs: dict[int, TokenLogprob] = {}
        if asked:
            nums_top = [sequences[i].sampling.logprobs or 0 for i in asked]
            logprobs = dict(
                zip(asked, token_logprobs(logits[asked], [tokens[i] for i in asked], nums_top), strict=True)
            )
        self.last_token_at = time.monotonic()
        return {
            id(sequence): ended.get(i) or self._advance(sequence, token, logprobs.get(i))
            for i, (sequence, token) in enumerate(zip(sequences, tokens, strict=True))
        }

    def _advance(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> Delta:
        """Append the token, or end the answer because of it."""
        sampling = sequence.sampling
        if token < 0:
            logger.error("request %s: the logits are NaN", sequence.request_id)
            if sequence.adapter is not None:
                self.unhealthy_adapters.add(sequence.adapter)
            return Delta([], "error", sequence.index)
        if token in sampling.stop_token_ids and not sampling.ignore_eos:
            return Delta([], "stop", sequence.index)
        sequence.token_ids.append(token)
        num_new = len(sequence.token_ids) - sequence.num_prompt_tokens
        reason: FinishReason | None = "length" if num_new >= sampling.max_tokens else None
        if sequence.constraint is not None:
            try:
                sequence.constraint.accept(token)
            except Exception:  # of the library too: it ends this answer, and no other
                logger.exception("request %s: its constraint failed", sequence.request_id)
                return Delta([], "error", sequence.index)
            if sequence.constraint.complete:
                reason = "stop"
        return Delta([token], reason, sequence.index, (logprob,) if logprob is not None else ())

    def _first_delta(self, sequence: Sequence, delta: Delta) -> Delta:
        """What only the first delta of an answer tells."""
        if len(sequence.token_ids) - len(delta.token_ids) > sequence.num_prompt_tokens:
            return delta
        prompt_logprobs = self._prompt_logprobs.get(sequence.request_id) if sequence.index == 0 else None
        return replace(
            delta,
            num_cached_tokens=sequence.num_cached_tokens,
            prompt_logprobs=None if prompt_logprobs is None else tuple(prompt_logprobs),
        )

    def _score_prompts(self, scored: list[tuple[Sequence, list[int]]], hidden: torch.Tensor) -> None:
        """Log-probabilities of prompt tokens; row i of `hidden` is the state before the i-th of `scored`."""
        places = [(sequence, position) for sequence, positions in scored for position in positions]
        for start in range(0, len(places), _LOGITS_ROWS):
            part = places[start : start + _LOGITS_ROWS]
            found = token_logprobs(
                self._llama.logits(hidden[start : start + len(part)]),
                [sequence.token_ids[position] for sequence, position in part],
                [sequence.sampling.prompt_logprobs or 0 for sequence, _ in part],
            )
            for (sequence, position), logprob in zip(part, found, strict=True):
                kept = self._prompt_logprobs.get(sequence.request_id)
                if kept is not None:  # not cancelled meanwhile
                    kept[position] = logprob

    def _end(self, sequence: Sequence) -> None:
        sequence.ended = True
        self._scheduler.remove(sequence)
        if sequence.adapter is not None:
            self._adapters.release(sequence.adapter)
            sequence.adapter_slot = NO_ADAPTER
        alive = self._requests[sequence.request_id]
        alive.remove(sequence)
        if not alive:
            del self._requests[sequence.request_id], self._callbacks[sequence.request_id]
            self._prompt_logprobs.pop(sequence.request_id, None)


def _call_each(delivered: Iterable[tuple[OnDeltas, list[Delta]]]) -> None:
    for on_deltas, deltas in delivered:
        on_deltas(deltas)
