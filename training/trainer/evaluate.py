"""Held-out loss, and the evaluation of an adapter from the very files that are published.

The training worker and `corral adapters export` come here. Plain torch, transformers and PEFT: no trainer, no Ray;
where torch.distributed is initialized its ranks share the rows.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from training.base_models.nf4 import quiet_loading
from training.data.row_store import IGNORED_LABEL, Rows, TokenizedRow
from training.errors import AdapterRefused
from training.registry.adapter_files import WEIGHTS_FILE

_BATCH_TOKENS = 2048  # padded tokens in one forward
_NO_LABEL: TokenizedRow = {"input_ids": [0], "labels": [IGNORED_LABEL]}


@dataclass(frozen=True, slots=True)
class HeldOutResult:
    """What came of running an adapter, loaded from its files, on held-out rows.

    Attributes:
        eval_loss: mean cross entropy over `eval_tokens` labelled tokens, in nats, with the adapter.
        base_eval_loss: the same without it.
        eval_tokens: labelled tokens in the rows.
        changes: whether any output differs from the base's.
        adapter_sha256: of the `adapter_model.safetensors` that was loaded.
        figures: what else the method tells, such as eval_reward_margin. With preferences both losses are the method's,
            and the base's is that of the reference.
    """

    eval_loss: float
    base_eval_loss: float
    eval_tokens: int
    changes: bool
    adapter_sha256: str
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """The figures under the names that manifests have them by."""
        return {
            "eval_loss": self.eval_loss,
            "base_eval_loss": self.base_eval_loss,
            "eval_tokens": float(self.eval_tokens),
            **self.figures,
        }


def evaluate_files(adapter_dir: Path, base: LlamaForCausalLM, rows: Sequence[TokenizedRow]) -> HeldOutResult:
    """Load the adapter in `adapter_dir` onto `base` and compute both held-out losses; `base` is left as it was.

    Args:
        adapter_dir: a PEFT folder on this machine, the same files for every rank.
        base: the NF4 base, in eval mode and without adapters (`PeftModel.unload()` takes them off).
        rows: held-out, the same on every rank.

    Raises:
        AdapterRefused: the folder does not hold all tensors of its adapter, or no token of `rows` is labelled.
    """
    if num_labelled(rows) == 0:
        raise AdapterRefused(f"none of the {len(rows)} held-out rows has a token to be judged by: hold out others")
    model, sha256 = load_adapter(adapter_dir, base)
    try:
        eval_loss, eval_tokens = held_out_loss(model, rows)
        with model.disable_adapter():
            base_eval_loss, _ = held_out_loss(model, rows)
    finally:
        model.unload()
    # The same kernels on the same rows: two sums that agree to the last bit come from outputs that all do.
    return HeldOutResult(eval_loss, base_eval_loss, int(eval_tokens), eval_loss != base_eval_loss, sha256)


def load_adapter(adapter_dir: Path, base: LlamaForCausalLM) -> tuple[PeftModel, str]:
    """The adapter in `adapter_dir` on `base`, for inference, and the sha256 of its weights file.

    Raises:
        AdapterRefused: there is no such file, or tensors are missing in it; PEFT alone would only warn.
    """
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules()), "base has an adapter already"
    weights = adapter_dir / WEIGHTS_FILE
    if not weights.is_file():  # PEFT would look for a pickle, and then on the hub
        raise AdapterRefused(f"{adapter_dir} has no {WEIGHTS_FILE}: name a folder that PEFT's save_pretrained wrote")
    with weights.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    with quiet_loading():
        model = PeftModel.from_pretrained(base, str(adapter_dir))
    assert isinstance(model, PeftModel)
    model.eval()
    given, loaded = load_file(weights), get_peft_model_state_dict(model)
    lost = sorted(
        name
        for name in given.keys() | loaded.keys()
        if name not in given or name not in loaded or not torch.equal(given[name].float(), loaded[name].cpu().float())
    )
    if lost:
        model.unload()
        raise AdapterRefused(
            f"{weights} does not hold the adapter that its config describes: {lost[0]!r} is not loaded"
        )
    return model, sha256


@torch.no_grad()
def held_out_loss(model: PeftModel | LlamaForCausalLM, rows: Sequence[TokenizedRow]) -> tuple[float, float]:
    """Mean cross entropy over the labelled tokens of `rows`, and how many there are; ranks share the work.

    Every token counts the same, whatever batch it is in. Computed in the base's dtype, without autocast, as in serving.
    """
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(causal_lm, LlamaForCausalLM)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    total = torch.zeros(2, dtype=torch.float64)  # summed loss, number of tokens
    rows = rows[rank::world_size]
    batches = [*length_batches(_lengths(rows))]
    if world_size > 1:
        most = torch.tensor(len(batches), device=causal_lm.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        batches += [[]] * (int(most) - len(batches))  # a sharded base takes all ranks at every forward
    for numbers in batches:
        batch = [rows[number] for number in numbers] or [_NO_LABEL]  # read only now: all may not fit memory
        input_ids = _padded([row["input_ids"] for row in batch], 0, causal_lm.device)
        labels = _padded([row["labels"] for row in batch], IGNORED_LABEL, causal_lm.device)[:, 1:]
        # Padding is on the right, where causal attention does not look: no mask is needed.
        hidden = causal_lm.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
        labelled = labels != IGNORED_LABEL
        logits = causal_lm.lm_head(hidden[labelled]).float()  # [labelled tokens, vocabulary]
        total[0] += F.cross_entropy(logits, labels[labelled], reduction="sum").item()
        total[1] += int(labelled.sum())
    if world_size > 1:
        total = total.to(causal_lm.device)
        dist.all_reduce(total)
    return float(total[0] / total[1]), float(total[1])


def num_labelled(rows: Sequence[TokenizedRow]) -> int:
    """How many tokens of `rows` are judged: the first of a row is not, nothing predicts it."""
    return sum(label != IGNORED_LABEL for row in rows for label in row["labels"][1:])


def length_batches(lengths: Sequence[int] | NDArray[np.int64]) -> Iterator[list[int]]:
    """Rows of like length by number, as many at once as `_BATCH_TOKENS` hold."""
    batch: list[int] = []
    for row in np.argsort(lengths, kind="stable").tolist():
        if batch and lengths[row] * (len(batch) + 1) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _lengths(rows: Sequence[TokenizedRow]) -> Sequence[int] | NDArray[np.int64]:
    return rows.lengths if isinstance(rows, Rows) else [len(row["input_ids"]) for row in rows]


def _padded(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], device=device)
