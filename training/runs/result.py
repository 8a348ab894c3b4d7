"""What a finished run returns, and how its directory keeps it: `result.json`."""

from dataclasses import dataclass
from pathlib import Path

from training.base_models.nf4 import Quantization
from training.config.train_config import TrainConfig
from training.data.run_inputs import RunInputs
from training.registry.manifest import AdapterManifest, Environment
from training.runs.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run.

    Attributes:
        run_dir: where everything of the run lies.
        inputs: base, chat format and data that were trained on.
        metrics: see `training.trainer.train.TrainResult`.
        samples: held-out prompts answered by base and adapter, as `training.trainer.samples.Sample` has them.
        quantization: of the base, with the compute dtype that was used.
        adapter_dir: the trained adapter, a PEFT folder on this machine.
        adapter_sha256: of the weights that were evaluated on held-out rows, None if there were none.
        changes: whether the adapter changed any output on them.
        config: as it ran, with the parent's version and shape written out.
        parent: the adapter that the run went on from.
        environment: code, libraries and devices of the workers.
    """

    run_dir: RunDir
    inputs: RunInputs
    metrics: dict[str, float]
    samples: list[dict[str, str]]
    quantization: Quantization
    adapter_dir: Path
    adapter_sha256: str | None
    changes: bool
    config: TrainConfig
    parent: AdapterManifest | None
    environment: Environment

    @property
    def run_name(self) -> str:
        """The name that resumes the run."""
        return self.run_dir.name


def read_result(config: TrainConfig, run_dir: RunDir, inputs: RunInputs, parent: AdapterManifest | None) -> RunResult:
    """What a run with a `result.json` left."""
    result = run_dir.read_json("result.json")
    return RunResult(
        run_dir=run_dir,
        inputs=inputs,
        metrics=result["metrics"],
        samples=result["samples"],
        quantization=config.quantization.model_copy(update={"compute_dtype": result["compute_dtype"]}),
        adapter_dir=run_dir.fetch("adapter"),
        adapter_sha256=result["adapter_sha256"],
        changes=result["changes"],
        config=config,
        parent=parent,
        environment=Environment.model_validate(run_dir.read_json("environment.json")),
    )
