"""What is recorded of an adapter version, and the model ids that name one.

`training.registry.registry` writes and reads these records; serving and clients use them through it.
"""

from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from training.base_models.nf4 import Quantization
from training.base_models.resolve import BaseCheckpoint
from training.errors import AdapterRefused
from training.registry.adapter_files import WEIGHTS_FILE, LoraParams

Method = Literal["sft", "dpo", "kto"]

MANIFEST_FILE = "manifest.json"


class Record(BaseModel):
    """Closed, frozen, JSON on disk."""

    # Metrics of a forced version may be NaN, which plain JSON cannot say.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class BaseRef(Record):
    """The base that an adapter was trained on."""

    name: str
    source: str
    revision: str | None
    weights_sha256: str


class DatasetRef(Record):
    """What an adapter was trained and evaluated on. The later fields are missing from older manifests.

    Attributes:
        num_rows: of one epoch, weights included, and the held-out ones.
        weights: of the sources, in their order.
        num_duplicates: rows that said the same as an earlier one.
        num_skipped: rows that could not be used.
        num_tokens: of one epoch.
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
    """The version of an adapter that training went on from."""

    name: str
    version: int
    weights_sha256: str
    other_split: str | None = None  # why it may have been trained on rows that were held out here

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


class Environment(Record):
    """What a run was computed with; `training.ray_train.environment` fills it in."""

    code_version: str | None  # of the installed distribution
    git_commit: str | None  # where the code is a checkout; ends in -dirty if files in it were changed
    libraries: dict[str, str]  # name: version
    devices: list[str]  # one for each worker


class SampleAnswer(Record):
    """A held-out prompt, the answer in the dataset, and what base and adapter said to it (greedy)."""

    prompt: str
    reference: str
    base: str
    adapter: str


class FileRef(Record):
    """One published file."""

    sha256: str
    size: int  # bytes


class AdapterManifest(Record):
    """All that is known of one version; written once, as `manifest.json`.

    What schema version 1 had not is optional, and None where it is not known.
    """

    schema_version: Literal[1, 2] = 2
    name: str
    version: int = Field(ge=1, lt=10**9)
    base: BaseRef
    quantization: Quantization
    chat_format: str
    lora: LoraParams
    dataset: DatasetRef | None
    config: dict[str, Any] | None
    metrics: dict[str, float]
    forced: bool
    forced_because: str | None = None  # what `force` overrode
    evaluated_sha256: str | None = None  # of the weights that eval_loss was computed with, loaded from their file
    files: dict[Literal["adapter_config.json", "adapter_model.safetensors"], FileRef] = Field(min_length=2)
    created: AwareDatetime
    run_name: str | None
    method: Method | None = None
    parent: ParentRef | None = None
    environment: Environment | None = None
    samples: list[SampleAnswer] = Field(default_factory=list)

    @property
    def weights_sha256(self) -> str:
        """Of the published adapter_model.safetensors."""
        return self.files[WEIGHTS_FILE].sha256

    @property
    def model_id(self) -> str:
        """The id that requests use for exactly this version."""
        return f"{self.base.name}:{self.name}@{self.version}"


def check_base(manifest: AdapterManifest, base: BaseCheckpoint) -> None:
    """Make sure that `base` is what the adapter was trained on: same name, same weights, same revision.

    The revision is compared where both sides have one; a copy in a local directory has none.

    Raises:
        AdapterRefused: it is another base.
    """
    trained_on = manifest.base
    sha256 = base.weights_sha256()
    differences = [
        f"{what} {theirs!r:.80} and not {ours!r:.80}"
        for what, theirs, ours in (
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
