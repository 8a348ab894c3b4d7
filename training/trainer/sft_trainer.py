"""transformers' Trainer over tokenized rows: documents end to end, the loss where there is something to learn.

`training.trainer.train` builds one and trains with it. Micro-batches hold no padding and no logits but those of
labelled tokens; a step's loss is the mean over its labelled tokens, however they are spread over workers and
micro-batches. Random numbers depend on seed, step and micro-batch alone: a checkpoint needs no random state, and rank 0
writes it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from types import MethodType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from training.data.batch_sampler import StepBatchSampler
from training.data.row_store import IGNORED_LABEL, TokenizedRow
from training.trainer.varlen_attention import cumulative, varlen_forward

_LOGITS_CHUNK = 1024  # labelled tokens whose logits are held at once: 0.5 GB in float32 where 128k tokens are known

Batch = dict[str, torch.Tensor]


class Rows(Protocol):
    """Tokenized rows by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> TokenizedRow: ...


def collate(rows: Sequence[TokenizedRow]) -> Batch:
    """Rows laid end to end.

    Returns:
        input_ids, position_ids: [1, num_tokens].
        labels: [1, num_tokens], of each token the next one's label, -100 at the end of a row.
        cu_seq_lens: [num_rows + 1], see `training.trainer.varlen_attention`.
    No rows give one token without a label, so that a worker without work can take part in the step.
    """
    rows = rows or [{"input_ids": [0], "labels": [IGNORED_LABEL]}]
    lengths = [len(row["input_ids"]) for row in rows]
    return {
        "input_ids": torch.tensor([[token_id for row in rows for token_id in row["input_ids"]]]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "labels": torch.tensor([[label for row in rows for label in [*row["labels"][1:], IGNORED_LABEL]]]),
        "cu_seq_lens": cumulative(lengths),
    }


@contextmanager
def training_forward(model: PeftModel) -> Iterator[None]:
    """In the block, calling `model` with a batch of `collate` gives its summed loss in nats, and nothing else."""
    causal_lm = model.get_base_model()
    assert isinstance(causal_lm, LlamaForCausalLM)
    original = causal_lm.forward
    causal_lm.forward = MethodType(_summed_loss, causal_lm)
    try:
        with varlen_forward(causal_lm):
            yield
    finally:
        causal_lm.forward = original


def _summed_loss(
    self: LlamaForCausalLM,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    labels: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    hidden = self.model(
        input_ids=input_ids, position_ids=position_ids, cu_seq_lens=cu_seq_lens, use_cache=False
    ).last_hidden_state
    labelled = labels[0] != IGNORED_LABEL
    hidden, labels = hidden[0, labelled], labels[0, labelled]  # [labelled tokens, hidden], [labelled tokens]
    if len(labels) <= _LOGITS_CHUNK:
        return _cross_entropy(self.lm_head, hidden, labels)
    chunks = zip(hidden.split(_LOGITS_CHUNK), labels.split(_LOGITS_CHUNK), strict=True)
    losses = [checkpoint(_cross_entropy, self.lm_head, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack(losses).sum()


def _cross_entropy(lm_head: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(lm_head(hidden).float(), labels, reduction="sum")


class PaddingFreeTrainer(Trainer):
    """Trains `model` on `rows` in the order of `batches`; call `train` within `training_forward`."""

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        rows: Rows,
        batches: StepBatchSampler,
        callbacks: Sequence[TrainerCallback],
        *,
        loraplus_lr_ratio: float | None = None,
    ) -> None:
        super().__init__(model=model, args=args, callbacks=[*callbacks])
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = True
        self.accelerator.device_placement = False  # of a sharded base only a part is here to be moved
        self.num_label_tokens = 0  # trained in the last step, over all workers
        self._rows, self._batches, self._loraplus_lr_ratio = rows, batches, loraplus_lr_ratio
        self._micro_batch = 0

    def get_train_dataloader(self) -> DataLoader[TokenizedRow]:
        """This worker's micro-batches; accelerate is not asked to divide them again."""
        rows: Any = self._rows
        return EpochLoader(rows, batch_sampler=self._batches, collate_fn=collate)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | int | None]:
        """The micro-batches of a step, and the number of its labelled tokens over all workers."""
        batches = list(islice(epoch_iterator, num_batches))
        counts = torch.tensor(
            [
                sum(int((batch["labels"] != IGNORED_LABEL).sum()) for batch in batches),
                sum(batch["input_ids"].numel() for batch in batches),
            ],
            device=device,
        )
        if self.args.world_size > 1:
            dist.all_reduce(counts)
        self.num_label_tokens, num_tokens = counts.tolist()
        self.state.num_input_tokens_seen += num_tokens  # part of the checkpoint
        self._micro_batch = 0
        return batches, self.num_label_tokens

    def training_step(self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one micro-batch, with random numbers of its own."""
        place = self._micro_batch * self.args.world_size + self.args.process_index
        torch.manual_seed(hash((self.args.seed, self.state.global_step, place)) % 2**63)
        self._micro_batch += 1
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def compute_loss(
        self, model: torch.nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The micro-batch's share of the step's mean loss; times the workers, whose gradients are averaged."""
        summed: torch.Tensor = model(**inputs)
        mean: torch.Tensor = summed * (self.args.world_size / max(1, int(num_items_in_batch)))
        return mean

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """As `args` say; for LoRA+ (arXiv:2402.12354) B learns `loraplus_lr_ratio` times as fast as A."""
        if self._loraplus_lr_ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        optimizer_cls, options = self.get_optimizer_cls_and_kwargs(self.args)
        options["loraplus_weight_decay"] = self.args.weight_decay
        self.optimizer = create_loraplus_optimizer(
            self.model, optimizer_cls, loraplus_lr_ratio=self._loraplus_lr_ratio, **options
        )
        return self.optimizer

    def _prepare_inputs(self, inputs: Mapping[str, torch.Tensor]) -> Batch:
        # Document boundaries stay where Python reads them.
        return {name: t if name == "cu_seq_lens" else t.to(self.args.device) for name, t in inputs.items()}


class EpochLoader(DataLoader[Any]):
    """Tells its batch sampler of every epoch, so that `StepBatchSampler` shuffles anew."""

    def set_epoch(self, epoch: int) -> None:
        """Of the iterations that follow; transformers' loop calls it."""
        sampler: Any = self.batch_sampler
        sampler.set_epoch(epoch)


@contextmanager
def neftune(model: PeftModel, alpha: float | None) -> Iterator[None]:
    """In the block, training adds noise to embeddings: uniform times alpha / sqrt(length x hidden) (arXiv:2310.05914).

    The length is the document's, as in the paper, also where documents lie end to end.
    """
    if not alpha:
        yield
        return
    causal_lm = model.get_base_model()
    assert isinstance(causal_lm, LlamaForCausalLM)
    lengths: dict[str, torch.Tensor] = {}

    def remember(module: torch.nn.Module, args: Iterable[Any], kwargs: dict[str, Any]) -> None:
        lengths["of each token"] = torch.repeat_interleave(kwargs["cu_seq_lens"].diff(), kwargs["cu_seq_lens"].diff())

    def add_noise(module: torch.nn.Module, args: Iterable[Any], embedded: torch.Tensor) -> torch.Tensor:
        if not model.training:
            return embedded
        length = lengths["of each token"].to(embedded.device)[None, :, None]
        scale = alpha / (length * embedded.shape[-1]).sqrt()
        return embedded + scale.to(embedded.dtype) * torch.empty_like(embedded).uniform_(-1, 1)

    hooks = [
        causal_lm.model.register_forward_pre_hook(remember, with_kwargs=True),
        causal_lm.model.embed_tokens.register_forward_hook(add_noise),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
