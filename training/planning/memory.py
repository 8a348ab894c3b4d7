"""How much memory one worker's training takes, from the shapes in `config.json`: no weights, no torch, no GPU.

`corral train --dry-run` prints it, the run report puts it beside what was measured, and `largest_batch` chooses batch
sizes with it. It knows the ops that `training.trainer.train` runs (PEFT's LoRA on bitsandbytes' NF4 under autocast,
attention within documents, logits in chunks), not how they are called.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from training.base_models.llama_shape import LlamaDims
from training.base_models.nf4 import ComputeDtype, Quantization
from training.config.train_config import LoraSettings, TrainConfig

Phase = Literal["loss", "backward", "end of backward", "optimizer step", "evaluation"]

DTYPE_BYTES: dict[ComputeDtype, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
# NF4 codes, and per block of 64 a scale: float32, or 8 bit with a float32 for every 256 scales (QLoRA,
# arXiv:2305.14314, section 3): 4.5 and 4.127 bits a parameter.
_NF4_BYTES = 0.5 + 4 / 64
_NF4_DOUBLE_QUANT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Two moments of AdamW, in bytes a trained parameter. Paged ones lie in unified memory, which moves to the host
# when the GPU is short of it and which torch does not count.
_OPTIMIZER_BYTES = {"adamw_torch": 8, "adamw_8bit": 2, "paged_adamw_32bit": 8, "paged_adamw_8bit": 2}
_PAGED_FROM = 100_000  # parameters of a matrix: bitsandbytes pages the moments of no smaller one
LOGITS_CHUNK = 1024  # labelled tokens whose logits `training.trainer.sft_trainer` holds at once
EVAL_BATCH_TOKENS = 2048  # in one forward of the held-out loss, which has the logits of all labelled ones at once
SCORES_UP_TO = 512  # on a CPU `training.trainer.varlen_attention` holds all scores of documents of up to so many tokens
_CUDA_CONTEXT = 600 << 20  # driver, kernels of cuBLAS and bitsandbytes; A100 and H100, CUDA 12: 450 to 650 MiB
_CUBLAS_WORKSPACE = 32 << 20
_CPU_PROCESS = 650 << 20  # Python, torch, transformers and Ray in a worker without a GPU, before any weights
# Blocks that the caching allocator holds and cannot use: a tenth of what it hands out, a rule of thumb.
_FRAGMENTATION = 1.1


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one worker at the moment when it holds most.

    Attributes:
        phase: that moment.
        base_4bit: NF4 weights with their scales; with `fsdp` this worker's part, and two layers that are whole.
        base_other: embeddings, lm_head and norms in the compute dtype.
        adapter: LoRA weights in float32.
        optimizer: AdamW's moments, where they are not paged; those of small matrices never are.
        gradients: of the adapter.
        activations: what the forward pass leaves for the backward pass.
        workspace: what single operators need: a dequantized weight, tiles of logits, gradients of activations.
        paged: moments that may lie on the host; not in any sum.
        context: what CUDA takes for itself, not counted by `torch.cuda.max_memory_allocated`; without a GPU what the
            process takes before it has weights.
        on_gpu: where all of it lies.
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
        """What `torch.cuda.max_memory_allocated` shows after a step."""
        held = self.base_4bit + self.base_other + self.adapter + self.optimizer + self.gradients
        return held + self.activations + self.workspace

    @property
    def total_bytes(self) -> int:
        """What there must be: on a GPU with fragmentation and the CUDA context, else in the whole process."""
        return int(self.allocated_bytes * (_FRAGMENTATION if self.on_gpu else 1)) + self.context


@dataclass(frozen=True, slots=True)
class TrainStep:
    """What a training step computes, apart from how many sequences it takes at once.

    Attributes:
        max_length: tokens of the longest sequence.
        labelled_share: part of the tokens that has a loss.
        num_shards: workers that share the 4-bit base; 1 where each has the whole.
        evaluates: held-out rows are evaluated between or after the steps.
        on_gpu: on a CPU PEFT casts every adapter's input by itself, dropout keeps its factors as numbers, and short
            documents keep their attention scores.
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
        """A step of a configured run."""
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

    Held throughout: NF4 weights (4.127 bits a parameter with double quantization, arXiv:2305.14314), everything else
    of the base in the compute dtype, LoRA in float32, AdamW's two moments.

    Activations are counted operator by operator, as arXiv:2205.05198 (Korthikanti et al., section 4) does for GPT,
    for a Llama block whose base is frozen. A frozen linear layer keeps nothing; its adapter keeps its input and the
    r values between A and B. With c bytes of the compute dtype, h hidden, a = heads x head_dim, k = kv heads x
    head_dim, f intermediate, in bytes a token and layer:

        two RMSNorms, computed in float32        2 (4h + 4)
        their outputs, inputs of adapters        2 c h
        q, k, v and the output of attention      c (2a + 2k) + 4 heads   (flash: no scores, but their log-sum-exp)
        gate, silu(gate), up, their product      4 c f
        between A and B of every adapter         c r
        dropout: per adapter its own input and mask instead of the shared input, (c + 1) in

    With gradient checkpointing a layer keeps its input only, c h, and one layer at a time has all of the above.
    Under autocast there are copies of A and B in the compute dtype: all of them while the forward pass lasts, in the
    backward pass those that the graph keeps. Logits exist for `LOGITS_CHUNK` labelled
    tokens at once, in float32: log-probabilities, their gradient and the gradient of the logits.

    Workspace is the largest of: the logits and the gradient of the last hidden state; or the largest weight,
    dequantized, and the gradients that flow through an MLP. The peak is the largest of four moments of a step and
    the held-out evaluation, whose logits are in the compute dtype, in float32 and as log-probabilities.
    """
    shape, lora, c = LlamaDims.of(llama_config), step.lora, DTYPE_BYTES[step.compute_dtype]
    tokens = batch_size * step.max_length
    labelled = round(tokens * step.labelled_share)
    num_trainable = shape.num_trainable(lora.r, lora.targets)
    nf4_bytes = _NF4_DOUBLE_QUANT_BYTES if step.quantization.double_quant else _NF4_BYTES
    base_4bit = shape.num_linear_parameters * nf4_bytes
    if step.num_shards > 1:  # the layer that runs and the one on its way, see `training.trainer.fsdp_qlora`
        base_4bit = base_4bit / step.num_shards + 2 * base_4bit / shape.num_layers
    states = num_trainable * _OPTIMIZER_BYTES[step.optim]
    paged = 0
    if step.optim.startswith("paged") and step.on_gpu:  # without a GPU they are ordinary ones
        paged = shape.num_trainable(lora.r, lora.targets, matrices_from=_PAGED_FROM) * _OPTIMIZER_BYTES[step.optim]
    gradients = 4 * num_trainable  # data parallelism exchanges them where they lie

    layer = tokens * _layer_bytes_per_token(shape, step)
    adapter_copies = 0 if c == 4 else c * num_trainable
    last = tokens * (4 * shape.hidden + 4) + labelled * c * shape.hidden  # final norm, positions that are scored
    if step.gradient_checkpointing:
        kept = shape.num_layers * tokens * c * shape.hidden
        one_layer, in_graph = layer, adapter_copies // shape.num_layers
    else:
        kept, one_layer, in_graph = shape.num_layers * layer, 0, adapter_copies
        # Nothing flows back into the embeddings: the first norm and the dropout before the first q, k, v keep nothing.
        into_first = sum(shape.linears[name][0] for name in lora.targets if name in ("q_proj", "k_proj", "v_proj"))
        kept -= tokens * (4 * shape.hidden + 4 + (_noise_bytes(step) * into_first if lora.lora_dropout else 0))

    logits = min(labelled, LOGITS_CHUNK) * shape.vocab * 3 * 4
    loss_workspace = logits + (labelled + tokens) * shape.hidden * c
    dequantized = max(a * b for a, b in shape.linears.values()) * c
    flowing = tokens * (c if step.on_gpu else 4) * 2 * (shape.hidden + shape.intermediate)
    earlier = gradients if step.gradient_accumulation_steps > 1 else 0  # of the micro-batches before
    # torch's AdamW has the denominators of all parameters at once; bitsandbytes updates in place.
    adamw = 4 * num_trainable if step.on_gpu and step.optim == "adamw_torch" else 0
    evaluated = round(EVAL_BATCH_TOKENS * step.labelled_share) * shape.vocab * (c + 2 * 4)
    moments: dict[Phase, tuple[int, int, int]] = {  # gradients, activations, workspace
        "loss": (earlier, kept + adapter_copies + last, loss_workspace),
        "backward": (earlier, kept + in_graph + one_layer, dequantized + flowing),
        "end of backward": (gradients, layer + tokens * c * shape.hidden, dequantized + flowing),
        "optimizer step": (gradients, 0, adamw),
    }
    if step.evaluates:
        moments["evaluation"] = (0, 0, evaluated + dequantized)
    phase = max(moments, key=lambda moment: sum(moments[moment]))
    at_peak = moments[phase]
    return MemoryEstimate(
        phase=phase,
        base_4bit=int(base_4bit),
        base_other=shape.num_other_parameters * c,
        adapter=4 * num_trainable,
        optimizer=states - paged,
        gradients=at_peak[0],
        activations=at_peak[1],
        workspace=at_peak[2] + (_CUBLAS_WORKSPACE if step.on_gpu else 0),
        paged=paged,
        context=_CUDA_CONTEXT if step.on_gpu else _CPU_PROCESS,
        on_gpu=step.on_gpu,
    )


def largest_batch(llama_config: Mapping[str, Any], step: TrainStep, memory_bytes: int, limit: int = 1024) -> int:
    """The largest power of two, up to `limit`, whose `total_bytes` fit into `memory_bytes`; 0 where not even 1 does."""
    fitting = 0
    batch_size = 1
    while batch_size <= limit and estimate(llama_config, step, batch_size).total_bytes <= memory_bytes:
        fitting, batch_size = batch_size, 2 * batch_size
    return fitting


def _layer_bytes_per_token(shape: LlamaDims, step: TrainStep) -> int:
    """What one block keeps of one token for the backward pass; see `estimate`."""
    lora, c = step.lora, DTYPE_BYTES[step.compute_dtype]
    norms = 2 * (4 * shape.hidden + 4)
    kv = shape.num_kv_heads * shape.head_dim
    holds_scores = not step.on_gpu and step.max_length <= SCORES_UP_TO
    # Weights in float32 and in c bytes (one copy where both are the same), or their log-sum-exp.
    per_head = (4 + c % 4) * step.max_length if holds_scores else 4
    attention = c * (2 * shape.attention + 2 * kv) + per_head * shape.num_heads
    mlp = 3 * c * shape.intermediate  # gate, silu(gate), up
    between = c * lora.r * len(lora.targets)
    if lora.lora_dropout:
        inputs = (c + _noise_bytes(step)) * sum(shape.linears[name][0] for name in lora.targets)
    elif not step.on_gpu and c == 2:
        inputs = c * sum(shape.linears[name][0] for name in lora.targets)
    else:  # one copy for all adapters that share an input; that of o_proj is the output of attention
        inputs_of = {"q_proj": "attn", "k_proj": "attn", "v_proj": "attn", "gate_proj": "mlp", "up_proj": "mlp"}
        widths = {inputs_of.get(name, name): shape.linears[name][0] for name in lora.targets if name != "o_proj"}
        inputs = c * sum(widths.values())
    return norms + attention + mlp + between + inputs


def _noise_bytes(step: TrainStep) -> int:
    """What dropout remembers of a value: a bool from CUDA's fused kernel, else the factor in float32."""
    return 1 if step.on_gpu else 4
