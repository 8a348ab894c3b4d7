"""`TrainConfig`: the schema of a training run's configuration, with every default.

Unknown keys and values of the wrong type are rejected before anything heavy is imported. Knows nothing of Ray, nor
of the machine that a run will get.
"""

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from training.base_models.embedded import EMBEDDED_MODEL
from training.base_models.llama_shape import LLAMA_LINEARS, LlamaLinear
from training.base_models.nf4 import Quantization
from training.chat.default_system import ChatSettings
from training.config.data_config import DataConfig
from training.names import ADAPTER_NAME, RUN_NAME

TrackerName = Literal["tensorboard", "mlflow", "wandb"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class LoraSettings(_Section):
    """The adapter's shape (arXiv:2106.09685); `use_rslora` scales by 1/sqrt(r) (arXiv:2312.03732)."""

    r: int = Field(default=16, ge=1, le=1024)
    lora_alpha: int | float = Field(default=32, gt=0)
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[LlamaLinear] = "all-linear"
    use_rslora: bool = False
    # default: A random, B zero; loftq: A and B approximate the base's quantization error (arXiv:2310.08659)
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
        names = LLAMA_LINEARS if self.target_modules == "all-linear" else self.target_modules
        return [name for name in LLAMA_LINEARS if name in names]


class PreferenceSettings(_Section):
    """Settings of `method: dpo` (arXiv:2305.18290) and `method: kto` (arXiv:2402.01306); TRL's names and defaults.

    The reward is `beta` x the log-ratio of adapter to reference. Dropout is off in both, as in TRL.
    """

    beta: float = Field(default=0.1, gt=0)  # the higher, the closer the adapter stays to the reference
    reference: Literal["initial", "base"] = "initial"  # initial: what the run starts from: the parent adapter, if any
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down"] = "sigmoid"  # dpo
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)  # loss_type robust: fraction of pairs labelled wrongly
    desirable_weight: float = Field(default=1.0, gt=0)  # kto: raise the weight of the rarer label
    undesirable_weight: float = Field(default=1.0, gt=0)


class GateConfig(_Section):
    """When an adapter may be registered: its held-out loss must be at least `min_improvement` below the base's.

    With `continue_from` it must also be no higher than the parent's, on the same rows and by the same method.

    For `method` dpo and kto, the loss is the method's own and is compared with the reference instead of the base.
    """

    min_improvement: float = Field(default=0.0, ge=0)  # nats per token; 0: no worse than the base


class TrainConfig(_Section):
    """The configuration of one training run, with the names of transformers, PEFT and Ray Train where they exist."""

    run_name_prefix: ClassVar[str] = ""  # of generated run names

    base_model: str = EMBEDDED_MODEL
    base_revision: str | None = None
    adapter: str  # name in the registry
    method: Literal["sft", "dpo", "kto"] = "sft"  # trains on conversations, preference pairs, or labelled answers
    preference: PreferenceSettings = PreferenceSettings()  # dpo and kto
    continue_from: str | None = None  # NAME, NAME@VERSION or NAME@ALIAS of a registered adapter to start from
    chat_format: Literal["auto", "llama-2", "llama-3", "chatml"] = "auto"
    chat: ChatSettings = ChatSettings()
    data: DataConfig
    quantization: Quantization = Quantization()
    lora: LoraSettings = LoraSettings()

    # Examples per forward pass: rows, or with `packing` packs of rows. auto: what fits the device; the size of a step
    # does not change.
    per_device_train_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 8
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    train_batch_size: int | None = Field(default=None, ge=1)  # per step, over all workers; None: from the two above
    packing: bool = False  # an example is as many rows as fit into max_length; they do not attend to each other
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
    gradient_checkpointing: bool | Literal["auto"] = "auto"  # auto: only where the device's memory requires it
    neftune_noise_alpha: float | None = Field(default=None, gt=0)  # noise on embeddings (arXiv:2310.05914), such as 5
    loraplus_lr_ratio: float | None = Field(default=None, ge=1)  # learning rate of B over that of A (arXiv:2402.12354)
    eval_steps: int | None = Field(default=None, ge=1)  # steps between held-out evaluations; None: at the end only
    load_best_model_at_end: bool = False  # publish the adapter of the evaluation with the lowest held-out loss
    early_stopping_patience: int | None = Field(default=None, ge=1)  # stop after this many evaluations without a gain
    early_stopping_threshold: float = Field(default=0.0, ge=0)  # nats that count as a gain
    seed: int = Field(default=0, ge=0, lt=2**32)
    logging_steps: int = Field(default=1, ge=1)
    save_steps: int = Field(default=100, ge=1)
    sample_prompts: int = Field(default=3, ge=0, le=100)  # held-out prompts answered after training
    report_to: list[TrackerName] = ["tensorboard"]  # besides metrics.jsonl and Ray's Prometheus endpoint; [] for none
    price_per_hour: float | None = Field(default=None, ge=0)  # of all workers together, in any currency; for the report

    gate: GateConfig = GateConfig()

    num_workers: int | list[int] = 1  # [1, 4]: elastic, as many as the cluster has room for, within these bounds
    fsdp: bool = False  # shard the 4-bit base over the workers; each gathers a layer when it is needed
    use_gpu: bool | Literal["auto"] = "auto"
    resources_per_worker: dict[str, float] | None = None  # None: an equal share of the CPUs, and a GPU where used
    max_failures: int = Field(default=1, ge=0)  # how often a run resumes from its last checkpoint after a worker died
    storage_path: str | None = None  # a directory or fsspec address that all workers see; None: CORRAL_HOME/runs
    run_name: str | None = None  # None: a new name; the name of an earlier run resumes it

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
            raise ValueError("method 'sft' does not use preference settings: set method to dpo or kto")
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
            raise ValueError("give a number of at least 1, or two as in [1, 4], the lower first")
        return value

    @model_validator(mode="after")
    def _check_conflicts(self) -> Self:
        if self.train_batch_size is not None and self.gradient_accumulation_steps != 1:
            raise ValueError("train_batch_size already determines gradient_accumulation_steps: remove one of them")
        for key in ("packing", "group_by_length", "neftune_noise_alpha", "loraplus_lr_ratio"):
            if self.method != "sft" and getattr(self, key):
                raise ValueError(f"{key} requires method sft, but method is {self.method}: remove {key}")
        if self.fsdp and self.min_workers < 2:
            raise ValueError(
                f"fsdp shards the base over the workers, but num_workers is {self.num_workers}: use 2 or more"
            )
        if self.fsdp and self.method != "sft":
            raise ValueError(f"fsdp requires method sft, but method is {self.method}: remove fsdp")
        if self.fsdp and self.lora.init_lora_weights == "loftq":
            raise ValueError(
                "lora.init_lora_weights 'loftq' needs the complete base, of which fsdp gives each worker only a shard: "
                "remove one of them"
            )
        if self.lr_scheduler_type == "constant" and self.warmup_steps:
            raise ValueError("lr_scheduler_type constant has no warmup_steps: set it to constant_with_warmup")
        for key in ("load_best_model_at_end", "early_stopping_patience"):
            if getattr(self, key) and self.eval_steps is None:
                raise ValueError(f"{key} needs held-out losses during training: set eval_steps")
            if getattr(self, key) and not self.data.held_out and not self.data.held_out_path:
                raise ValueError(f"{key} needs held-out rows: set data.held_out above 0")
        return self

    @property
    def min_workers(self) -> int:
        """The fewest workers that a run trains with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that a run trains with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def micro_batch_size(self) -> int:
        """Examples in a worker's forward pass; 8 while `auto` is not resolved."""
        size = self.per_device_train_batch_size
        return 8 if isinstance(size, str) else size

    @property
    def step_size(self) -> int:
        """Examples in an optimizer step, over all workers; the same whatever their current number."""
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
