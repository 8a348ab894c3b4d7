"""Estimates how long a run takes: the floating-point operations of its steps over an assumed GPU throughput.

Computed from the model's dimensions alone; nothing is measured.
"""

from dataclasses import dataclass

from training.base_models.llama_shape import LlamaDims
from training.config.train_config import LoraSettings

GPU = "A100"
GPU_FLOPS = 312e12  # per second, dense bfloat16 (NVIDIA A100 data sheet)
# The assumed fraction of it that is reached, given dequantization, small batches and everything but matrix products.
# The QLoRA paper (arXiv:2305.14314, abstract) trains 65B in 24 hours on one 48 GB GPU, which is about this fraction of
# what the fastest of that time could do.
UTILISATION = 0.3


@dataclass(frozen=True, slots=True)
class TimeEstimate:
    """The estimated duration of a run's training steps, without loading, evaluation and samples.

    Attributes:
        flops: over all steps.
        seconds: on `num_gpus` of `GPU` at `UTILISATION`, not limited by their interconnect.
    """

    flops: float
    num_gpus: int
    seconds: float

    def __str__(self) -> str:
        minutes = self.seconds / 60
        time = f"{minutes / 60:,.1f} hours" if minutes >= 90 else f"{minutes:,.0f} minutes"
        return (
            f"about {time} on {self.num_gpus} x {GPU} (estimated: {self.flops:.2g} operations at {UTILISATION:.0%} "
            f"of {GPU_FLOPS / 1e12:.0f} TFLOP/s each)"
        )


def estimate_time(flops: float, num_gpus: int) -> TimeEstimate:
    """The time for `flops`, split evenly over `num_gpus`."""
    return TimeEstimate(flops, num_gpus, flops / (num_gpus * GPU_FLOPS * UTILISATION))


def training_flops(
    dims: LlamaDims,
    lora: LoraSettings,
    num_tokens: float,
    length: float,
    *,
    labelled_share: float,
    checkpointing: bool,
) -> float:
    """Operations to train on `num_tokens` tokens in sequences of `length` tokens.

    Per token, a matrix of n parameters takes 2n in the forward pass, and in the backward pass 2n each for the gradients
    of its input and of its weights (arXiv:2001.08361, section 2.1). The frozen base has no weight gradients, so it
    takes 4n instead of 6n; the adapter takes 6n. Checkpointing adds a forward pass of the layers, 2n. Attention
    multiplies two activations, causally: 2 x attention width x length in a layer's forward pass (arXiv:2104.04473,
    appendix, halved), twice that in the backward pass. Logits are computed for labelled tokens only.
    """
    base, adapter = dims.num_linear_parameters, dims.num_trainable(lora.r, lora.targets)
    attention = 2 * dims.num_layers * dims.attention * length
    layers = 2 * (base + adapter) + attention
    backward = 2 * base + 4 * adapter + 2 * attention
    head = 4 * dims.vocab * dims.hidden * labelled_share
    return num_tokens * (layers * (2 if checkpointing else 1) + backward + head)
