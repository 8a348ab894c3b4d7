"""TRL's DPOTrainer and KTOTrainer over rows that are tokenized already.

`training.sft` comes here for `method: dpo` and `method: kto`. The reference's log-probabilities are computed once,
before the first step: no second copy of the adapter is kept, saved or run.
"""

import random
import warnings
from collections.abc import Sequence
from typing import Any

import trl.trainer.utils as trl_utils
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from training.config import TrainConfig
from training.inputs import RunInputs
from training.preferences import mismatched_completions, reference_logps, scored_pairs
from training.qlora import exact_adapters


class _DPOTrainer(DPOTrainer):  # type: ignore[misc]
    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class _KTOTrainer(KTOTrainer):  # type: ignore[misc]
    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def preference_trainer(
    config: TrainConfig,
    inputs: RunInputs,
    model: PeftModel,
    arguments: dict[str, Any],
    callbacks: Sequence[TrainerCallback],
) -> DPOTrainer | KTOTrainer:
    """The trainer of `config.method`, with the reference's log-probabilities beside the rows.

    Args:
        model: as the run starts; that is the reference, unless `preference.reference` is `base`.
        arguments: what the trainer of any method is told.
    """
    settings, batch_size = config.preference, config.per_device_train_batch_size
    arguments = arguments | {"beta": settings.beta, "max_length": None}  # rows are checked before
    common = {
        "model": model,
        "processing_class": AutoTokenizer.from_pretrained(inputs.base.path, local_files_only=True),
        "callbacks": [*callbacks],
    }
    # On CUDA, TRL projects only labelled positions onto the vocabulary; on the CPU too it pays.
    setattr(trl_utils, "_use_triton", lambda device: device.type in ("cuda", "cpu"))  # noqa: B010
    trainer: DPOTrainer | KTOTrainer
    with exact_adapters(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that transformers is about to change
        if config.method == "dpo":
            columns = ("ref_chosen_logps", "ref_rejected_logps")
            rows = [*inputs.train_rows]
            dataset = Dataset.from_list(rows)
            args = DPOConfig(**arguments, loss_type=[settings.loss_type], label_smoothing=settings.label_smoothing)
            trainer = _DPOTrainer(args=args, train_dataset=dataset, **common)
        else:
            columns = ("ref_logps", "ref_KL_logps")
            # TRL takes KTO's rows in their order: who shares a batch decides whose answers are the mismatched ones.
            rows = random.Random(config.seed).sample([*inputs.train_rows], len(inputs.train_rows))
            dataset = Dataset.from_list(rows)
            dataset = dataset.add_column("KL_completion_ids", mismatched_completions(rows, batch_size))
            weights = {name: getattr(settings, name) for name in ("desirable_weight", "undesirable_weight")}
            trainer = _KTOTrainer(args=KTOConfig(**arguments, **weights), train_dataset=dataset, **common)
    model.delete_adapter("ref")  # the copy that TRL makes of the adapter to be the reference
    with trainer.accelerator.autocast():  # as the loss is computed
        logps = reference_logps(model, settings, scored_pairs(rows, batch_size))
    for name, column in zip(columns, logps.chunk(2), strict=True):
        dataset = dataset.add_column(name, column.tolist())
    trainer.train_dataset = dataset
    trainer.precompute_ref_logps = True
    trainer.remove_callback(PrinterCallback)
    return trainer
