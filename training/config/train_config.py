"""What a training run is told: `TrainConfig`, and `load_config`, which reads it from YAML and `key=value` overrides.

Every default lives here. A key that is unknown, misspelt, doubled or of the wrong type is refused before anything
heavy is imported. Knows nothing of Ray: `check_resources` takes plain numbers.
"""

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from training.base_models.embedded import EMBEDDED_MODEL
from training.base_models.llama_shape import LLAMA_LINEARS, LlamaLinear
from training.base_models.nf4 import Quantization
from training.config.data_config import DataConfig
from training.names import ADAPTER_NAME, RUN_NAME

TrackerName = Literal["tensorboard", "mlflow", "wandb"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class LoraSettings(_Section):
    """The adapter's shape (arXiv:2106.09685); `use_rslora` scales by 1/sqrt(r) (arXiv:2312.03732)."""

    r: int = Field(default=16, ge=1, le=1024)
    lora_alpha: int = Field(default=32, ge=1)
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[LlamaLinear] = "all-linear"
    use_rslora: bool = False
    # default: A random, B zero; loftq: both take up what 4 bits lose of the base's weights (arXiv:2310.08659)
    init_lora_weights: Literal["default", "gaussian", "loftq"] = "default"

    @field_validator("target_modules")
    @classmethod
    def _not_empty(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError(f"name at least one of {', '.join(LLAMA_LINEARS)}, or 'all-linear'")
        return value

    @property
    def targets(self) -> list[LlamaLinear]:
        """The linear layers that get an adapter, in the order of a Llama block."""
        chosen = LLAMA_LINEARS if self.target_modules == "all-linear" else self.target_modules
        return [name for name in LLAMA_LINEARS if name in chosen]


class PreferenceSettings(_Section):
    """What `method: dpo` (arXiv:2305.18290) and `method: kto` (arXiv:2402.01306) optimize; TRL's names and defaults.

    Their reward is `beta` x the log-ratio of adapter to reference. Dropout is off in both, as in TRL.
    """

    beta: float = Field(default=0.1, gt=0)  # the higher, the closer the adapter stays to the reference
    reference: Literal["initial", "base"] = "initial"  # initial: what the run starts from, so the parent if it has one
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down"] = "sigmoid"  # of dpo
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)  # of loss_type robust: share of pairs labelled wrongly
    desirable_weight: float = Field(default=1.0, gt=0)  # of kto: where one kind of row is rarer, weigh it more
    undesirable_weight: float = Field(default=1.0, gt=0)


class GateConfig(_Section):
    """When an adapter may be registered: its held-out loss must be at least `min_improvement` below the base's.

    With `continue_from` it must not be above the parent's either, on the same rows and by the same method.

    With `method` dpo and kto that is the method's loss, and the reference stands in for the base.
    """

    min_improvement: float = Field(default=0.0, ge=0)  # nats per token; 0: no worse than the base


class TrainConfig(_Section):
    """One training run. Names are those of transformers, PEFT and Ray Train wherever they have one."""

    run_name_prefix: ClassVar[str] = ""  # of names that are made up

    base_model: str = EMBEDDED_MODEL
    base_revision: str | None = None
    adapter: str  # name in the registry
    method: Literal["sft", "dpo", "kto"] = "sft"  # on conversations, pairs of answers, or answers with a verdict
    preference: PreferenceSettings = PreferenceSettings()  # of dpo and kto
    continue_from: str | None = None  # NAME, NAME@VERSION or NAME@ALIAS: a registered adapter instead of a new one
    chat_format: Literal["auto", "llama-2", "llama-3", "chatml"] = "auto"
    data: DataConfig
    quantization: Quantization = Quantization()
    lora: LoraSettings = LoraSettings()

    # Examples at once: rows, or with `packing` packs of rows. auto: what fits the device; a step keeps its size.
    per_device_train_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 8
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    train_batch_size: int | None = Field(default=None, ge=1)  # of a step, over all workers; None: from the two above
    packing: bool = False  # an example is as many rows as fit into max_length; they do not see each other
    group_by_length: bool = False
    num_train_epochs: float = Field(default=3.0, gt=0, le=1e6)
    max_steps: int = Field(default=-1, ge=-1)  # -1: as many as num_train_epochs needs
    learning_rate: float = Field(default=2e-4, gt=0, lt=1)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: float = Field(default=0, ge=0)  # below 1: a fraction of all steps
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta2: float = Field(default=0.999, gt=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = "adamw_torch"
    max_length: int = Field(default=1024, ge=8)  # tokens of one conversation
    gradient_checkpointing: bool | Literal["auto"] = "auto"  # auto: where the device has too little memory without
    neftune_noise_alpha: float | None = Field(default=None, gt=0)  # noise on embeddings (arXiv:2310.05914), such as 5
    loraplus_lr_ratio: float | None = Field(default=None, ge=1)  # B's learning rate over A's (arXiv:2402.12354)
    eval_steps: int | None = Field(default=None, ge=1)  # held-out loss every so many steps; None: at the end only
    load_best_model_at_end: bool = False  # publish the adapter of the lowest held-out loss among those
    early_stopping_patience: int | None = Field(default=None, ge=1)  # stop after so many without a better one
    early_stopping_threshold: float = Field(default=0.0, ge=0)  # nats by which a better one is better
    seed: int = Field(default=0, ge=0, lt=2**32)
    logging_steps: int = Field(default=1, ge=1)
    save_steps: int = Field(default=100, ge=1)
    sample_prompts: int = Field(default=3, ge=0, le=100)  # held-out prompts answered after training
    report_to: list[TrackerName] = ["tensorboard"]  # beside metrics.jsonl and Ray's Prometheus endpoint; [] for none
    price_per_hour: float | None = Field(default=None, ge=0)  # of all workers together, in any currency; for the report

    gate: GateConfig = GateConfig()

    num_workers: int | list[int] = 1  # [1, 4]: as many as there are at the moment, between the two
    fsdp: bool = False  # each worker holds its part of the 4-bit base only, and gathers a layer when it needs it
    use_gpu: bool | Literal["auto"] = "auto"
    resources_per_worker: dict[str, float] | None = None  # None: an equal share of the CPUs, and a GPU where used
    max_failures: int = Field(default=1, ge=0)  # times a run goes on from its last checkpoint after a worker died
    storage_path: str | None = None  # a directory or fsspec address that all workers see; None: CORRAL_HOME/runs
    run_name: str | None = None  # None: a fresh one; the name of an earlier run resumes it

    @field_validator("adapter")
    @classmethod
    def _adapter_name(cls, value: str) -> str:
        if not re.fullmatch(ADAPTER_NAME, value):
            raise ValueError("use 1 to 63 lower-case letters, digits, '.', '_' or '-', starting with a letter or digit")
        return value

    @field_validator("preference")
    @classmethod
    def _preference(cls, value: PreferenceSettings, info: ValidationInfo) -> PreferenceSettings:
        if info.data.get("method") == "sft" and value != PreferenceSettings():
            raise ValueError("method is 'sft', which has no preferences: set method to dpo or kto")
        return value

    @field_validator("continue_from")
    @classmethod
    def _continue_from(cls, value: str | None) -> str | None:
        name, at, ref = (value or "").partition("@")
        if value is not None and not (ADAPTER_NAME.fullmatch(name) and (not at or ADAPTER_NAME.fullmatch(ref))):
            raise ValueError("write NAME, NAME@VERSION or NAME@ALIAS of a registered adapter, such as ranch-hand@2")
        return value

    @field_validator("num_workers")
    @classmethod
    def _num_workers(cls, value: int | list[int]) -> int | list[int]:
        low, high = value if isinstance(value, list) and len(value) == 2 else (value, value)
        if isinstance(low, list) or isinstance(high, list) or not 1 <= low <= high:
            raise ValueError("write a number from 1, or two as in [1, 4], the lower first")
        return value

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.train_batch_size is not None and self.gradient_accumulation_steps != 1:
            raise ValueError("train_batch_size decides how often gradients accumulate: leave the other one out")
        for key in ("packing", "group_by_length", "neftune_noise_alpha", "loraplus_lr_ratio"):
            if self.method != "sft" and getattr(self, key):
                raise ValueError(f"{key} is of method sft, and method is {self.method}: leave it out")
        if self.fsdp and self.min_workers < 2:
            raise ValueError(
                f"fsdp shares the base among workers, and num_workers is {self.num_workers}: use 2 or more"
            )
        if self.fsdp and self.method != "sft":
            raise ValueError(f"fsdp is of method sft, and method is {self.method}: leave it out")
        if self.fsdp and self.lora.init_lora_weights == "loftq":
            raise ValueError("fsdp leaves no worker the whole base, which lora.init_lora_weights 'loftq' compares with")
        if self.lr_scheduler_type == "constant" and self.warmup_steps:
            raise ValueError("lr_scheduler_type constant knows no warmup_steps: set it to constant_with_warmup")
        for key in ("load_best_model_at_end", "early_stopping_patience"):
            if getattr(self, key) and self.eval_steps is None:
                raise ValueError(f"{key} needs held-out losses during training: set eval_steps")
            if getattr(self, key) and not self.data.held_out and not self.data.held_out_path:
                raise ValueError(f"{key} needs held-out rows: set data.held_out above 0")
        return self

    @property
    def min_workers(self) -> int:
        """The fewest workers that a run goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that a run takes."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def micro_batch_size(self) -> int:
        """Examples that a worker takes at once; 8 where that is not decided yet."""
        size = self.per_device_train_batch_size
        return 8 if isinstance(size, str) else size

    @property
    def step_size(self) -> int:
        """Examples in an optimizer step, over all workers, however many there are at the moment."""
        return self.train_batch_size or self.micro_batch_size * self.gradient_accumulation_steps * self.max_workers

    @field_validator("run_name")
    @classmethod
    def _run_name(cls, value: str | None) -> str | None:
        if value is not None and not RUN_NAME.fullmatch(value):
            raise ValueError("use 1 to 128 letters, digits, '.', '_' or '-', starting with a letter or digit")
        return value

    @field_validator("max_steps")
    @classmethod
    def _max_steps(cls, value: int) -> int:
        if value == 0:
            raise ValueError("use -1 for all steps of num_train_epochs, or a positive number")
        return value

    @field_validator("resources_per_worker")
    @classmethod
    def _resources(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for resource, amount in (value or {}).items():
            if amount <= 0:
                raise ValueError(f"{resource} must be above 0")
        return value
