"""TRL's DPOTrainer and KTOTrainer over rows that are tokenized already, dealt to workers as in `sft_trainer`.

`training.trainer.train` comes here for `method: dpo` and `method: kto`. The reference's log-probabilities are computed
once, before the first step: no second copy of the adapter is kept, saved or run. A step has the same rows, the same
weight for each of them and, in KTO, the same KL for every number of workers and micro-batches.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import trl.trainer.utils as trl_utils
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from training.config.train_config import PreferenceSettings, TrainConfig
from training.data.batch_sampler import StepBatchSampler
from training.data.row_store import Rows
from training.data.run_inputs import RunInputs
from training.trainer.preference_losses import ScoredPairs, kto_losses, loss_at_reference, reference_logps
from training.trainer.qlora import exact_adapters
from training.trainer.sft_trainer import EpochLoader

Row = dict[str, Any]


class _ScoredRows:
    """Rows as TRL's collators take them; each is read when asked for, as all may not fit memory.

    Args:
        pairs: of `rows`.
        columns: what the reference gives the rows, by the collator's name for it, each [num_rows].
    """

    def __init__(self, rows: Rows[Any], pairs: ScoredPairs, columns: dict[str, torch.Tensor]) -> None:
        self._rows, self._pairs, self._columns = rows, pairs, columns

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, at: int) -> Row:
        row: Row = self._rows[at] | {name: float(column[at]) for name, column in self._columns.items()}
        if "label" in row:
            _, row["KL_completion_ids"] = self._pairs[len(self) + at]
        return row


class _StepTrainer(Trainer, ABC):
    """Takes the rows of a step from `batches`; its loss is their mean, however they are dealt.

    TRL gives the mean of a micro-batch, and wants equally many rows on every worker. So micro-batches are filled up
    with answers of no tokens: their loss is a constant, which is taken off again, and they have no gradient.
    """

    batches: StepBatchSampler
    settings: PreferenceSettings
    filler: ClassVar[Row]
    loss_is_scaled_for_ga = True
    _num_micro_batches: int  # of this step

    def get_train_dataloader(self) -> DataLoader[Row]:
        """This worker's micro-batches as lists of rows; accelerate is not asked to divide them again."""
        rows: Any = self.train_dataset
        return EpochLoader(rows, batch_sampler=self.batches, collate_fn=list)

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Row]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], int]:
        """The micro-batches of a step, and the number of its rows over all workers."""
        dealt = list(islice(epoch_iterator, num_batches))
        self._num_micro_batches = len(dealt)
        sizes = torch.tensor([len(rows) for rows in dealt], device=device)
        num_rows, most = sizes.sum(), sizes.clone()
        if self.args.world_size > 1:
            dist.all_reduce(num_rows)
            dist.all_reduce(most, dist.ReduceOp.MAX)
        batches = []
        for rows, size in zip(dealt, most.tolist(), strict=True):
            fillers = [self.filler] * (size - len(rows))
            batches.append({**self.data_collator(rows + fillers), "size": size, "num_fillers": len(fillers)})
        return batches, int(num_rows)

    def compute_loss(
        self, model: torch.nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The micro-batch's share of the step's mean loss; times the workers, whose gradients are averaged."""
        batch = dict(inputs)
        size, num_fillers = batch.pop("size"), batch.pop("num_fillers")
        mean: Any = super().compute_loss(model, batch)
        summed = mean * size - num_fillers * self.filler_loss()
        share: torch.Tensor = summed * (self.args.world_size / int(num_items_in_batch))
        return share

    @abstractmethod
    def filler_loss(self) -> float:
        """What a filler adds to the sum."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class _DPOTrainer(_StepTrainer, DPOTrainer):  # type: ignore[misc]  # TRL has no types
    filler: ClassVar[Row] = {
        "prompt_ids": [0, 0], "chosen_ids": [], "rejected_ids": [], "ref_chosen_logps": 0, "ref_rejected_logps": 0,
    }  # fmt: skip

    def filler_loss(self) -> float:
        return loss_at_reference(self.settings, "dpo")

    def compute_loss(
        self, model: torch.nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """As for every method; rewards become shares of the step's mean too, in which fillers have none."""
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        share = inputs["size"] * self.args.world_size / int(num_items_in_batch)
        for name, values in self._metrics["train"].items():
            if name.startswith("rewards/"):  # TRL logs the mean over the micro-batches of a step
                values[-1] *= share * self._num_micro_batches
        return loss


class _KTOTrainer(_StepTrainer, KTOTrainer):  # type: ignore[misc]  # TRL has no types
    filler: ClassVar[Row] = {
        "prompt_ids": [0, 0], "completion_ids": [], "KL_completion_ids": [], "label": True,
        "ref_logps": 0, "ref_KL_logps": 0,
    }  # fmt: skip
    _kl: float  # of the step, before it is cut at 0

    def filler_loss(self) -> float:
        kl = torch.tensor(self._kl).clamp(min=0)
        return float(kto_losses(self.settings, torch.zeros(1), torch.tensor([True]), kl))

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Row]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], int]:
        """As for every method; and the KL is estimated on all rows of the step, where TRL takes a micro-batch's."""
        batches, num_rows = super().get_batch_samples(epoch_iterator, num_batches, device)
        kl = torch.zeros(1, device=device)
        with self.compute_loss_context_manager():
            for batch in map(self._prepare_inputs, batches):
                logps = KTOTrainer._compute_kl_logps(self, self.model, batch)
                kl += (logps - batch["ref_KL_logps"]).sum()
        if self.args.world_size > 1:
            dist.all_reduce(kl)
        self._kl = float(kl) / num_rows
        return batches, num_rows

    def _compute_kl_logps(self, model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        estimated: torch.Tensor = batch["ref_KL_logps"] + self._kl  # TRL takes the reference's off again
        return estimated


def preference_trainer(
    config: TrainConfig,
    inputs: RunInputs,
    model: PeftModel,
    batches: StepBatchSampler,
    arguments: dict[str, Any],
    callbacks: Sequence[TrainerCallback],
) -> DPOTrainer | KTOTrainer:
    """The trainer of `config.method`, with the reference's log-probabilities beside the rows.

    Args:
        model: as the run starts; that is the reference, unless `preference.reference` is `base`.
        batches: this worker's, of `inputs.train_rows`.
        arguments: what the trainer of any method is told.
    """
    settings = config.preference
    arguments = arguments | {"beta": settings.beta, "max_length": None}  # rows are checked before
    common = {
        "model": model,
        "processing_class": AutoTokenizer.from_pretrained(inputs.base.path, local_files_only=True),
        "callbacks": [*callbacks],
    }
    # On CUDA, TRL projects only labelled positions onto the vocabulary; on the CPU too it pays.
    setattr(trl_utils, "_use_triton", lambda device: device.type in ("cuda", "cpu"))  # noqa: B010
    trainer: DPOTrainer | KTOTrainer
    first_row = Dataset.from_list([inputs.train_rows[0]])  # TRL wants a dataset; it looks at the first row's columns
    with exact_adapters(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that transformers is about to change
        if config.method == "dpo":
            columns = ("ref_chosen_logps", "ref_rejected_logps")
            args = DPOConfig(**arguments, loss_type=[settings.loss_type], label_smoothing=settings.label_smoothing)
            trainer = _DPOTrainer(args=args, train_dataset=first_row, **common)
        else:
            columns = ("ref_logps", "ref_KL_logps")
            weights = {name: getattr(settings, name) for name in ("desirable_weight", "undesirable_weight")}
            trainer = _KTOTrainer(args=KTOConfig(**arguments, **weights), train_dataset=first_row, **common)
    pairs = ScoredPairs(inputs.train_rows)
    model.delete_adapter("ref")  # the copy that TRL makes of the adapter to be the reference
    with trainer.accelerator.autocast():  # as the loss is computed
        logps = reference_logps(model, settings, pairs)
    trainer.train_dataset = _ScoredRows(inputs.train_rows, pairs, dict(zip(columns, logps.chunk(2), strict=True)))
    trainer.batches, trainer.settings = batches, settings
    trainer.precompute_ref_logps = True
    trainer.remove_callback(PrinterCallback)
    return trainer
