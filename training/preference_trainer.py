"""TRL's DPOTrainer and KTOTrainer over rows that are tokenized already.

`training.sft.train` comes here for `method: dpo` and `method: kto`, instead of to its SFTTrainer. The reference's
log-probabilities are computed once, before the first step: no second copy of the adapter is kept, saved or run.
"""

import random
from typing import Any, cast

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from training.config import TrainConfig
from training.data import UnpairedRow
from training.preferences import PreferenceRows, mismatched_completions, reference_logps, scored_pairs
from training.qlora import exact_adapters
from training.sft import LengthBucketSampler


class _DPOTrainer(DPOTrainer):  # type: ignore[misc]
    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthBucketSampler:
        rows: Any = self.train_dataset
        answers = zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)
        lengths = [len(prompt) + max(map(len, pair)) for prompt, pair in zip(rows["prompt_ids"], answers, strict=True)]
        return LengthBucketSampler(lengths, self.args.train_batch_size, self.args.seed)


class _KTOTrainer(KTOTrainer):  # type: ignore[misc]
    """Takes the rows in their order: whose answers serve as mismatched ones is decided by who shares a batch."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def preference_trainer(
    config: TrainConfig,
    model: PeftModel,
    rows: PreferenceRows,
    *,
    arguments: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    callbacks: list[TrainerCallback],
) -> DPOTrainer | KTOTrainer:
    """The trainer of `config.method`, with the reference's log-probabilities beside the rows.

    Args:
        model: as the run starts; that is the reference, unless `preference.reference` is `base`.
        arguments: the TrainingArguments that every method has.
    """
    settings, batch_size = config.preference, config.per_device_train_batch_size
    common: dict[str, Any] = {"model": model, "processing_class": tokenizer, "callbacks": callbacks}
    arguments = arguments | {"beta": settings.beta, "max_length": None}  # rows are checked before
    trainer: DPOTrainer | KTOTrainer
    with exact_adapters(model):
        if config.method == "dpo":
            columns = ("ref_chosen_logps", "ref_rejected_logps")
            dataset = Dataset.from_list([dict(row) for row in rows])
            args = DPOConfig(**arguments, loss_type=[settings.loss_type], label_smoothing=settings.label_smoothing)
            trainer = _DPOTrainer(args=args, train_dataset=dataset, **common)
        else:
            columns = ("ref_logps", "ref_KL_logps")
            unpaired = cast("list[UnpairedRow]", rows)
            rows = random.Random(config.seed).sample(unpaired, len(unpaired))
            dataset = Dataset.from_list([dict(row) for row in rows])
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
    return trainer
