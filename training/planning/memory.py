"""Estimates the memory of one training worker from the dimensions in `config.json`: needs no weights, torch or GPU.

Models the operators of a training step (PEFT's LoRA on bitsandbytes' NF4 under autocast, attention within documents,
logits in chunks), but does not run them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from training.base_models.llama_shape import LlamaDims
from training.base_models.nf4 import ComputeDtype, Quantization
from training.config.train_config import LoraSettings, TrainConfig

Phase = Literal["loss", "backward", "end of backward", "optimizer step", "evaluation"]

DTYPE_BYTES: dict[ComputeDtype, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
# NF4 codes, and per block of 64 a scale: float32, or 8-bit with a float32 for every 256 scales (QLoRA,
# arXiv:2305.14314, section 3): 4.5 and 4.127 bits per parameter.
_NF4_BYTES = 0.5 + 4 / 64
_NF4_DOUBLE_QUANT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# AdamW's two moments, in bytes per trained parameter. Paged moments are in unified memory, which is moved to the host
# when the GPU runs short and which torch does not count.
_OPTIMIZER_BYTES = {"adamw_torch": 8, "adamw_8bit": 2, "paged_adamw_32bit": 8, "paged_adamw_8bit": 2}
_PAGED_FROM = 100_000  # parameters of a matrix: bitsandbytes does not page the moments of smaller ones
LOGITS_CHUNK = 1024  # labelled tokens whose logits `training.trainer.sft_trainer` materializes at a time
EVAL_BATCH_TOKENS = 2048  # in a forward pass of the held-out evaluation, with the logits of all labelled ones at once
SCORES_UP_TO = 512  # tokens of a document: up to here, attention on a CPU (`varlen_attention`) materializes its scores
_CUDA_CONTEXT = 600 << 20  # driver, kernels of cuBLAS and bitsandbytes; A100 and H100, CUDA 12: 450 to 650 MiB
_CUBLAS_WORKSPACE = 32 << 20
_CPU_PROCESS = 650 << 20  # Python, torch, transformers and Ray in a worker without a GPU, before any weights
# Memory that the caching allocator reserves and cannot use: a tenth of what is allocated, as a rule of thumb.
_FRAGMENTATION = 1.1


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Peak memory of one worker, in bytes.

    Attributes:
        phase: when the peak occurs.
        base_4bit: NF4 weights with their scales; with `fsdp` this worker's shard and two complete layers.
        base_other: embeddings, lm_head and norms in the compute dtype.
        adapter: LoRA weights in float32.
        optimizer: AdamW's moments that are not paged; those of small matrices never are.
        gradients: of the adapter.
        activations: saved by the forward pass for the backward pass.
        workspace: of single operators: a dequantized weight, a chunk of logits, gradients of activations.
        paged: moments that may be on the host; not part of any sum.
        context: CUDA's own memory, not counted by `torch.cuda.max_memory_allocated`; without a GPU, the process before
            it loads weights.
        on_gpu: whether all of it is on a GPU.
    """

    phase: Phase
    base_4bit: int
    base_other: int
    adapter: int
    optimizer: int
    gradients: int
    activations: int
    workspace: int
    paged: int
    context: int
    on_gpu: bool

    @property
    def allocated_bytes(self) -> int:
        """What `torch.cuda.max_memory_allocated` reports after a step."""
        persistent = self.base_4bit + self.base_other + self.adapter + self.optimizer + self.gradients
        return persistent + self.activations + self.workspace

    @property
    def total_bytes(self) -> int:
        """The memory that must be available: with fragmentation and CUDA context on a GPU, of the process on a CPU."""
        return int(self.allocated_bytes * (_FRAGMENTATION if self.on_gpu else 1)) + self.context


@dataclass(frozen=True, slots=True)
class TrainStep:
    """What determines the memory of a training step, apart from its number of sequences.

    Attributes:
        max_length: tokens of the longest sequence.
        labelled_share: fraction of the tokens that carry loss.
        num_shards: workers over which the 4-bit base is sharded; 1 if each has a complete copy.
        evaluates: held-out rows are evaluated between or after the steps.
        on_gpu: on a CPU, PEFT casts the input of every adapter separately, dropout saves its factors as floats, and
            attention saves the scores of short documents.
    """

    lora: LoraSettings
    quantization: Quantization
    optim: str
    gradient_checkpointing: bool
    max_length: int
    gradient_accumulation_steps: int = 1
    num_shards: int = 1
    compute_dtype: ComputeDtype = "bfloat16"
    on_gpu: bool = True
    labelled_share: float = 1.0
    evaluates: bool = False

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        *,
        max_length: int,
        compute_dtype: ComputeDtype,
        on_gpu: bool,
        gradient_accumulation_steps: int = 1,
        labelled_share: float = 1.0,
    ) -> "TrainStep":
        """The training step of a configuration."""
        return cls(
            lora=config.lora,
            quantization=config.quantization,
            optim=config.optim,
            gradient_checkpointing=config.gradient_checkpointing is True,
            max_length=max_length,
            gradient_accumulation_steps=gradient_accumulation_steps,
            num_shards=config.min_workers if config.fsdp else 1,
            compute_dtype=compute_dtype,
            on_gpu=on_gpu,
            labelled_share=labelled_share,
            evaluates=bool(config.data.held_out or config.data.held_out_path),
        )


def estimate(llama_config: Mapping[str, Any], step: TrainStep, batch_size: int) -> MemoryEstimate:
    """Peak memory of a training step over `batch_size` sequences of `step.max_length` tokens, without padding.

    Persistent: NF4 weights (4.127 bits per parameter with double quantization, arXiv:2305.14314), everything else
    of the base in the compute dtype, LoRA in float32, AdamW's two moments.

    Activations are counted operator by operator, as arXiv:2205.05198 (Korthikanti et al., section 4) does for GPT,
    for a Llama block whose base is frozen. A frozen linear layer saves nothing; its adapter saves its input and the
    r values between A and B. With c bytes of the compute dtype, h hidden, a = heads x head_dim, k = kv heads x
    head_dim, f intermediate, in bytes per token and layer:

        two RMSNorms, computed in float32        2 (4h + 4)
        their outputs, inputs of adapters        2 c h
        q, k, v and the output of attention      c (2a + 2k) + 4 heads   (flash: no scores, but their log-sum-exp)
        gate, silu(gate), up, their product      4 c f
        between A and B of every adapter         c r
        dropout: per adapter its own input and mask instead of the shared input, (c + 1) in

    With gradient checkpointing a layer saves its input only, c h, and one layer at a time has all of the above.
    Under autocast there are copies of A and B in the compute dtype: all of them during the forward pass, those that
    the graph saves in the backward pass. Logits exist for `LOGITS_CHUNK` labelled tokens at a time, in float32:
    log-probabilities, their gradient and the gradient of the logits.

    Workspace is the largest of: the logits and the gradient of the last hidden state; or the largest weight,
    dequantized, and the gradients that flow through an MLP. The peak is the largest of four phases of a step and
    the held-out evaluation, whose logits are in the compute dtype, in float32 and as log-probabilities.
    """
    dims, lora, c = LlamaDims.of(llama_config), step.lora, DTYPE_BYTES[step.compute_dtype]
    tokens = batch_size * step.max_length
    labelled = round(tokens * step.labelled_share)
    num_trainable = dims.num_trainable(lora.r, lora.targets)
    nf4_bytes = _NF4_DOUBLE_QUANT_BYTES if step.quantization.double_quant else _NF4_BYTES
    base_4bit = dims.num_linear_parameters * nf4_bytes
    if step.num_shards > 1:  # plus the current layer and the prefetched one, see `training.trainer.fsdp_qlora`
        base_4bit = base_4bit / step.num_shards + 2 * base_4bit / dims.num_layers
    states = num_trainable * _OPTIMIZER_BYTES[step.optim]
    paged = 0
    if step.optim.startswith("paged") and step.on_gpu:  # without a GPU, nothing is paged
        paged = dims.num_trainable(lora.r, lora.targets, matrices_from=_PAGED_FROM) * _OPTIMIZER_BYTES[step.optim]
    gradients = 4 * num_trainable  # data parallelism reduces them in place

    layer = tokens * _layer_bytes_per_token(dims, step)
    adapter_copies = 0 if c == 4 else c * num_trainable
    last = tokens * (4 * dims.hidden + 4) + labelled * c * dims.hidden  # final norm, labelled positions
    if step.gradient_checkpointing:
        saved = dims.num_layers * tokens * c * dims.hidden
        one_layer, in_graph = layer, adapter_copies // dims.num_layers
    else:
        saved, one_layer, in_graph = dims.num_layers * layer, 0, adapter_copies
        # The embeddings have no gradient: the first norm and the dropout before the first q, k, v save nothing.
        into_first = sum(dims.linears[name][0] for name in lora.targets if name in ("q_proj", "k_proj", "v_proj"))
        saved -= tokens * (4 * dims.hidden + 4 + (_noise_bytes(step) * into_first if lora.lora_dropout else 0))

    logits = min(labelled, LOGITS_CHUNK) * dims.vocab * 3 * 4
    loss_workspace = logits + (labelled + tokens) * dims.hidden * c
    dequantized = max(a * b for a, b in dims.linears.values()) * c
    mlp_gradients = tokens * (c if step.on_gpu else 4) * 2 * (dims.hidden + dims.intermediate)
    accumulated = gradients if step.gradient_accumulation_steps > 1 else 0  # of earlier micro-batches
    # torch's AdamW materializes the denominators of all parameters at once; bitsandbytes updates in place.
    adamw = 4 * num_trainable if step.on_gpu and step.optim == "adamw_torch" else 0
    eval_logits = round(EVAL_BATCH_TOKENS * step.labelled_share) * dims.vocab * (c + 2 * 4)
    phases: dict[Phase, tuple[int, int, int]] = {  # gradients, activations, workspace
        "loss": (accumulated, saved + adapter_copies + last, loss_workspace),
        "backward": (accumulated, saved + in_graph + one_layer, dequantized + mlp_gradients),
        "end of backward": (gradients, layer + tokens * c * dims.hidden, dequantized + mlp_gradients),
        "optimizer step": (gradients, 0, adamw),
    }
    if step.evaluates:
        phases["evaluation"] = (0, 0, eval_logits + dequantized)
    peak_phase = max(phases, key=lambda phase: sum(phases[phase]))
    gradient_bytes, activation_bytes, workspace_bytes = phases[peak_phase]
    return MemoryEstimate(
        phase=peak_phase,
        base_4bit=int(base_4bit),
        base_other=dims.num_other_parameters * c,
        adapter=4 * num_trainable,
        optimizer=states - paged,
        gradients=gradient_bytes,
        activations=activation_bytes,
        workspace=workspace_bytes + (_CUBLAS_WORKSPACE if step.on_gpu else 0),
        paged=paged,
        context=_CUDA_CONTEXT if step.on_gpu else _CPU_PROCESS,
        on_gpu=step.on_gpu,
    )


def largest_batch(llama_config: Mapping[str, Any], step: TrainStep, memory_bytes: int, limit: int = 1024) -> int:
    """The largest power of two, up to `limit`, whose `total_bytes` fit into `memory_bytes`; 0 if not even 1 does."""
    largest = 0
    batch_size = 1
    while batch_size <= limit and estimate(llama_config, step, batch_size).total_bytes <= memory_bytes:
        largest, batch_size = batch_size, 2 * batch_size
    return largest


def _layer_bytes_per_token(dims: LlamaDims, step: TrainStep) -> int:
    """Bytes that one block saves per token for the backward pass; see `estimate`."""
    lora, c = step.lora, DTYPE_BYTES[step.compute_dtype]
    norms = 2 * (4 * dims.hidden + 4)
    kv = dims.num_kv_heads * dims.head_dim
    holds_scores = not step.on_gpu and step.max_length <= SCORES_UP_TO
    # Attention weights in float32 and in c bytes (one copy where both are the same), or their log-sum-exp.
    per_head = (4 + c % 4) * step.max_length if holds_scores else 4
    attention = c * (2 * dims.attention + 2 * kv) + per_head * dims.num_heads
    mlp = 3 * c * dims.intermediate  # gate, silu(gate), up
    between_a_and_b = c * lora.r * len(lora.targets)
    if lora.lora_dropout:
        inputs = (c + _noise_bytes(step)) * sum(dims.linears[name][0] for name in lora.targets)
    elif not step.on_gpu and c == 2:
        inputs = c * sum(dims.linears[name][0] for name in lora.targets)
    else:  # one copy for all adapters with the same input; that of o_proj is counted as the output of attention
        inputs_of = {"q_proj": "attn", "k_proj": "attn", "v_proj": "attn", "gate_proj": "mlp", "up_proj": "mlp"}
        widths = {inputs_of.get(name, name): dims.linears[name][0] for name in lora.targets if name != "o_proj"}
        inputs = c * sum(widths.values())
    return norms + attention + mlp + between_a_and_b + inputs


def _noise_bytes(step: TrainStep) -> int:
    """Bytes that dropout saves per value: a bool in CUDA's fused kernel, otherwise the factor in float32."""
    return 1 if step.on_gpu else 4
