"""How long a run takes: floating-point operations of its steps, from shapes alone, over what a GPU is assumed to do.

`training.planning.plan` prints it for a dry run, beside the estimate of `training.planning.memory`. Nothing of it is
measured.
"""

from dataclasses import dataclass

from training.base_models.llama_shape import LlamaDims
from training.config.train_config import LoraSettings

GPU = "A100"
GPU_FLOPS = 312e12  # a second, dense bfloat16 (NVIDIA A100 data sheet)
# What is assumed to be left of that by dequantizing, small batches and everything that is no matrix product. The QLoRA
# paper (arXiv:2305.14314, abstract) has 65B done in 24 hours on one GPU of 48 GB, which is about as much of what the
# fastest of that time could do.
UTILISATION = 0.3


@dataclass(frozen=True, slots=True)
class TimeEstimate:
    """An estimate of a run's training, without loading, evaluation and samples.

    Attributes:
        flops: over all steps.
        seconds: on `num_gpus` of `GPU` at `UTILISATION`, whose links keep up.
    """

    flops: float
    num_gpus: int
    seconds: float

    def __str__(self) -> str:
        minutes = self.seconds / 60
        time = f"{minutes / 60:,.1f} hours" if minutes >= 90 else f"{minutes:,.0f} minutes"
        return (
            f"about {time} on {self.num_gpus} x {GPU}: an estimate, {self.flops:.2g} operations at {UTILISATION:.0%} "
            f"of {GPU_FLOPS / 1e12:.0f} TFLOP/s each"
        )


def estimate_time(flops: float, num_gpus: int) -> TimeEstimate:
    """The time that `flops` take when `num_gpus` share them evenly."""
    return TimeEstimate(flops, num_gpus, flops / (num_gpus * GPU_FLOPS * UTILISATION))


def training_flops(
    shape: LlamaDims,
    lora: LoraSettings,
    num_tokens: float,
    length: float,
    *,
    labelled_share: float,
    checkpointing: bool,
) -> float:
    """Operations to train on `num_tokens` tokens of documents of `length` tokens.

    A matrix of n parameters costs a token 2n in the forward pass, and 2n each for the gradients of its input and of
    itself in the backward pass (arXiv:2001.08361, section 2.1). The frozen base has no gradients of its own: 4n instead
    of 6n; the adapter has. Checkpointing adds a forward pass of the layers, 2n. Attention multiplies two activations,
    each causal: 2 x attention width x length in a layer's forward pass (arXiv:2104.04473, appendix, halved), twice that
    backward. Logits are computed for labelled tokens.
    """
    base, adapter = shape.num_linear_parameters, shape.num_trainable(lora.r, lora.targets)
    attention = 2 * shape.num_layers * shape.attention * length
    layers = 2 * (base + adapter) + attention
    backward = 2 * base + 4 * adapter + 2 * attention
    head = 4 * shape.vocab * shape.hidden * labelled_share
    return num_tokens * (layers * (2 if checkpointing else 1) + backward + head)
