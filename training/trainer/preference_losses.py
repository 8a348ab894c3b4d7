"""Preference losses, and the held-out figures of an adapter against its reference, for `method: dpo` and `method: kto`.

`training.trainer.preference_trainer` and `training.trainer.train` come here. Formulas in plain torch, each with its
source; the loss that trains is TRL's, and a test holds that both are the same. Knows neither TRL nor Ray.
"""

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from training.config.train_config import PreferenceSettings
from training.data.row_store import PreferenceRow, UnpairedRow
from training.trainer.evaluate import HeldOutResult, length_batches, load_adapter

PreferenceRows = Sequence[PreferenceRow] | Sequence[UnpairedRow]
Pair = tuple[list[int], list[int]]  # prompt ids, completion ids


class HeldOutPreferences:
    """Held-out rows, at least one, and the log-probabilities that the reference gives them.

    Made before the first step, when `model` is as the run starts.
    """

    def __init__(self, model: PeftModel, settings: PreferenceSettings, rows: PreferenceRows) -> None:
        self._settings = settings
        self._pairs = ScoredPairs(rows)
        labels = [row["label"] for row in cast("Sequence[UnpairedRow]", rows)] if "label" in rows[0] else []
        self._labels = torch.tensor(labels, dtype=torch.bool)  # [num_rows], of kto only
        self._lengths = torch.from_numpy(self._pairs.completion_lengths).chunk(2)
        self._reference = reference_logps(model, settings, self._pairs)

    def metrics(self, model: PeftModel) -> dict[str, float]:
        """What the adapter on `model` makes of the rows.

        Returns:
            eval_loss, base_eval_loss: the method's loss with the adapter, and with the reference in its place
                (ln 2 for the sigmoid loss of DPO, half the mean weight for KTO).
            eval_reward_margin: mean reward of the preferred minus that of the rejected answers.
            eval_preference_accuracy: share of pairs in which the preferred answer has the higher reward; for KTO, whose
                rows are not paired, of all pairs of a desirable and an undesirable row.
        """
        ratios = completion_logps(model, self._pairs) - self._reference
        metrics = {
            "eval_loss": self._loss(ratios),
            "base_eval_loss": self._loss(torch.zeros_like(ratios)),
        }
        first, second = ratios.chunk(2)
        if not len(self._labels):
            differences = first - second
        else:
            differences = (first[self._labels][:, None] - first[~self._labels][None, :]).flatten()
        if len(differences):
            metrics["eval_reward_margin"] = self._settings.beta * float(differences.mean())
            metrics["eval_preference_accuracy"] = float((differences > 0).double().mean())
        return metrics

    def of_files(self, adapter_dir: Path, base: LlamaForCausalLM) -> HeldOutResult:
        """`metrics` of the adapter in `adapter_dir`, loaded from its files; `base` is left as it was.

        Raises:
            AdapterRefused: the folder does not hold all tensors of its adapter.
        """
        model, sha256 = load_adapter(adapter_dir, base)
        try:
            figures = self.metrics(model)
        finally:
            model.unload()
        loss, base_loss = figures["eval_loss"], figures["base_eval_loss"]
        num_tokens = int(self._pairs.completion_lengths.sum())
        return HeldOutResult(loss, base_loss, num_tokens, loss != base_loss, sha256, figures)

    def _loss(self, ratios: Tensor) -> float:
        first, second = ratios.chunk(2)
        if not len(self._labels):
            return float(dpo_losses(self._settings, first, second, *self._lengths).mean())
        return float(kto_losses(self._settings, first, self._labels, second.mean().clamp(min=0)).mean())


def loss_at_reference(settings: PreferenceSettings, method: str) -> float:
    """The loss of one pair or row of the dearer kind before the first step, where adapter and reference are one."""
    if method == "kto":
        return max(settings.desirable_weight, settings.undesirable_weight) / 2
    zero, one = torch.zeros(1), torch.ones(1)
    return float(dpo_losses(settings, zero, zero, one, one))


def dpo_losses(
    settings: PreferenceSettings, chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> Tensor:
    """The loss of each pair, [num_pairs].

    Args:
        chosen, rejected: log-ratios of adapter to reference, summed over the answer's tokens, [num_pairs].
        chosen_lengths, rejected_lengths: tokens of the answers, [num_pairs].
    """
    beta = settings.beta
    difference = beta * (chosen - rejected)
    if settings.loss_type == "sigmoid":  # arXiv:2305.18290, eq. 7
        return -F.logsigmoid(difference)
    if settings.loss_type == "hinge":  # SLiC, arXiv:2305.10425
        return F.relu(1 - difference)
    if settings.loss_type == "ipo":  # arXiv:2310.12036, eq. 17, per token as TRL agreed with its authors
        return (chosen / chosen_lengths - rejected / rejected_lengths - 1 / (2 * beta)) ** 2
    if settings.loss_type == "robust":  # arXiv:2403.00409
        flipped = settings.label_smoothing
        return ((flipped - 1) * F.logsigmoid(difference) + flipped * F.logsigmoid(-difference)) / (1 - 2 * flipped)
    if settings.loss_type == "apo_zero":  # arXiv:2408.06266, eq. 7
        return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)
    return torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(difference)  # apo_down, eq. 8


def kto_losses(settings: PreferenceSettings, ratios: Tensor, labels: Tensor, kl: Tensor) -> Tensor:
    """The loss of each row, [num_rows]: lambda_y - v(x, y) of arXiv:2402.01306, section 4.1.

    Args:
        ratios: log-ratios of adapter to reference, summed over the answer's tokens, [num_rows].
        labels: True where the answer is desirable, [num_rows].
        kl: how far the adapter is from the reference, estimated on mismatched prompts and answers; not below 0.
    """
    beta = settings.beta
    desirable = settings.desirable_weight * (1 - torch.sigmoid(beta * (ratios - kl)))
    undesirable = settings.undesirable_weight * (1 - torch.sigmoid(beta * (kl - ratios)))
    return torch.where(labels, desirable, undesirable)


class ScoredPairs:
    """Two pairs of each row, of which there is at least one; read when asked for, as all may not fit memory.

    Pair i is the prompt of row i with its chosen answer, pair num_rows + i with the rejected one; of KTO's rows with
    their answer, and with that of another row, from which the KL is estimated.

    Attributes:
        lengths: tokens of each pair, [num_pairs].
        completion_lengths: those of the completion alone, [num_pairs].
    """

    def __init__(self, rows: PreferenceRows) -> None:
        unpaired = "label" in rows[0]
        self._rows = cast("Sequence[Any]", rows)
        self._names = ("completion_ids", "completion_ids") if unpaired else ("chosen_ids", "rejected_ids")
        # The row whose answer a row's second pair has, [num_rows].
        self._answered = mismatched_rows(len(rows)) if unpaired else np.arange(len(rows))
        of_each = (tuple(len(row[name]) for name in ("prompt_ids", *self._names)) for row in self._rows)
        prompts, firsts, seconds = np.fromiter(of_each, dtype=np.dtype((np.int64, 3)), count=len(rows)).T
        self.completion_lengths: NDArray[np.int64] = np.concatenate((firsts, seconds[self._answered]))
        self.lengths: NDArray[np.int64] = np.tile(prompts, 2) + self.completion_lengths

    def __len__(self) -> int:
        return 2 * len(self._rows)

    def __getitem__(self, index: int) -> Pair:
        second, at = divmod(index, len(self._rows))
        row = self._rows[at]
        answer = self._rows[self._answered[at]] if second else row
        return row["prompt_ids"], answer[self._names[second]]


def mismatched_rows(num_rows: int) -> NDArray[np.int64]:
    """For each row another whose completion is put after its prompt, each taken once, [num_rows]: the row before it in
    a shuffled order, the last one for the first. In the order of a file neighbours often answer the same prompt."""
    order = np.array(random.Random(0).sample(range(num_rows), num_rows), dtype=np.int64)
    before = np.empty_like(order)
    before[order] = np.roll(order, 1)
    return before


def reference_logps(model: PeftModel, settings: PreferenceSettings, pairs: ScoredPairs) -> Tensor:
    """What the reference gives each completion, [num_pairs]: the base, or the adapter as it is now, at the start."""
    model.eval()
    off = settings.reference == "base"
    context: AbstractContextManager[None] = model.disable_adapter() if off else nullcontext()
    with context:
        return completion_logps(model, pairs)


@torch.no_grad()
def completion_logps(model: PeftModel, pairs: ScoredPairs) -> Tensor:
    """Log-probability of each completion after its prompt, summed over tokens, [num_pairs]; ranks share the work."""
    causal_lm = model.get_base_model()
    assert isinstance(causal_lm, LlamaForCausalLM)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    logps = torch.zeros(len(pairs), dtype=torch.float64)
    mine = range(rank, len(pairs), world_size)
    for places in length_batches(pairs.lengths[rank::world_size]):
        batch = [mine[place] for place in places]
        read = [pairs[index] for index in batch]
        texts = [prompt + completion for prompt, completion in read]
        width = max(map(len, texts))
        input_ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=model.device)
        spans = [(len(prompt), len(text)) for (prompt, _), text in zip(read, texts, strict=True)]
        answered = torch.tensor([[start <= at < end for at in range(1, width)] for start, end in spans])
        # Padding is on the right, where causal attention does not look: no mask is needed.
        hidden = causal_lm.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
        answered = answered.to(model.device)  # [rows, width - 1]
        logits = causal_lm.lm_head(hidden[answered]).float()  # [answered tokens, vocabulary]
        losses = F.cross_entropy(logits, input_ids[:, 1:][answered], reduction="none")
        sums = torch.zeros(len(batch), device=model.device).index_add(0, answered.nonzero()[:, 0], losses)
        logps[batch] = -sums.double().cpu()
    if world_size > 1:
        shared = logps.to(model.device)
        dist.all_reduce(shared)
        logps = shared.cpu()
    return logps
