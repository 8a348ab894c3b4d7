"""The manifest of an adapter version: what is recorded about it, and its model id."""

from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from training.base_models.nf4 import Quantization
from training.base_models.resolve import BaseCheckpoint
from training.chat.default_system import DefaultSystem
from training.errors import AdapterRefused
from training.registry.adapter_files import WEIGHTS_FILE, LoraParams

Method = Literal["sft", "dpo", "kto"]

MANIFEST_FILE = "manifest.json"


class Record(BaseModel):
    """A frozen record, stored as JSON; unknown keys are rejected."""

    # Metrics of a forced version may be NaN, which JSON has no number for.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class BaseRef(Record):
    """The base model that an adapter was trained on."""

    name: str
    source: str
    revision: str | None
    weights_sha256: str


class DatasetRef(Record):
    """The data that an adapter was trained and evaluated on. Older manifests lack the fields that have defaults.

    Attributes:
        num_rows: rows of one epoch, with source weights applied, plus the held-out rows.
        weights: weight of each source, in order.
        num_duplicates: rows that duplicate an earlier one.
        num_skipped: rows that could not be used.
        num_tokens: tokens of one epoch.
    """

    sources: list[str]
    sha256: str
    num_rows: int
    num_held_out: int
    weights: list[float] = []
    formats: list[str] = []
    num_duplicates: int = 0
    num_skipped: int = 0
    num_tokens: int | None = None


class ParentRef(Record):
    """The adapter version that training continued from."""

    name: str
    version: int
    weights_sha256: str
    other_split: str | None = None  # why it may have been trained on rows that are held out here

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


class Environment(Record):
    """Code, libraries and devices of a run."""

    code_version: str | None  # of the installed distribution
    git_commit: str | None  # if the code is a checkout; ends in -dirty if its files were modified
    libraries: dict[str, str]  # name: version
    devices: list[str]  # one for each worker


class SampleAnswer(Record):
    """A held-out prompt, the dataset's answer, and the greedy answers of base and adapter."""

    prompt: str
    reference: str
    base: str
    adapter: str


class FileRef(Record):
    """One published file."""

    sha256: str
    size: int  # bytes


class AdapterManifest(Record):
    """Everything that is recorded about one version; written once, as `manifest.json`.

    Fields that schema version 1 lacked are optional, and None if unknown.
    """

    schema_version: Literal[1, 2] = 2
    name: str
    version: int = Field(ge=1, lt=10**9)
    base: BaseRef
    quantization: Quantization
    chat_format: str
    default_system: DefaultSystem | None = None  # None, as in older manifests: nothing is added to a dialog
    lora: LoraParams
    dataset: DatasetRef | None
    config: dict[str, Any] | None
    metrics: dict[str, float]
    forced: bool
    forced_because: str | None = None  # the reason that `force` overrode
    evaluated_sha256: str | None = None  # of the weights file that eval_loss was computed with
    files: dict[Literal["adapter_config.json", "adapter_model.safetensors"], FileRef] = Field(min_length=2)
    created: AwareDatetime
    run_name: str | None
    method: Method | None = None
    parent: ParentRef | None = None
    environment: Environment | None = None
    samples: list[SampleAnswer] = Field(default_factory=list)

    @property
    def weights_sha256(self) -> str:
        """Hash of the published adapter_model.safetensors."""
        return self.files[WEIGHTS_FILE].sha256

    @property
    def model_id(self) -> str:
        """The id that requests use for exactly this version."""
        return f"{self.base.name}:{self.name}@{self.version}"


def check_base(manifest: AdapterManifest, base: BaseCheckpoint) -> None:
    """Check that `base` is the base that the adapter was trained on: same name, weights and revision.

    Revisions are compared only if both sides have one; a copy in a local directory has none.

    Raises:
        AdapterRefused: it is a different base.
    """
    trained_on = manifest.base
    sha256 = base.weights_sha256()
    differences = [
        f"{field} {theirs!r:.80} and not {ours!r:.80}"
        for field, theirs, ours in (
            ("base", trained_on.name, base.name),
            ("revision", trained_on.revision or base.revision, base.revision or trained_on.revision),
            ("weights with sha256", trained_on.weights_sha256[:12], sha256[:12]),
        )
        if theirs != ours
    ]
    if differences or trained_on.weights_sha256 != sha256:
        raise AdapterRefused(
            f"adapter {manifest.model_id} was trained on {', '.join(differences)}: "
            "serve it on that base, or train it again"
        )
