"""Configurations of training runs: what is accepted, and what is refused in one line before any heavy import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from training.config.load import load_config, resolved
from training.config.train_config import TrainConfig
from training.errors import ConfigError, TrainingError
from training.planning.resources import check_resources

PROJECT = Path(__file__).parents[3]
RECIPES = sorted((PROJECT / "configs" / "train").rglob("*.yaml"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("adapter: tiny\ndata:\n  path: rows.jsonl\nlora:\n  r: 8\nlearning_rate: 2e-4\n")
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_is_valid_and_opens_with_its_launch_command(path: Path) -> None:
    config = load_config(path)
    assert TrainConfig.model_validate(resolved(config)) == config
    first_line = path.read_text().splitlines()[0]
    assert first_line.startswith(("# corral train ", "# ray job submit "))
    assert first_line.endswith(str(path.relative_to(PROJECT)))
    assert all((PROJECT / data).is_file() for data in config.data.paths if data.startswith("configs/"))


def test_recipes_were_found() -> None:
    assert {"quickstart.yaml", "llama2_7b_guanaco.yaml", "llama2_13b_guanaco.yaml"} <= {path.name for path in RECIPES}


def test_overrides_are_yaml_and_win(recipe: Path) -> None:
    config = load_config(
        recipe, ["lora.r=4", "lora.target_modules=[q_proj, v_proj]", "learning_rate=1e-3", "data.held_out=0.2"]
    )
    assert config.lora.r == 4
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    assert config.learning_rate == 1e-3
    assert config.data.held_out == 0.2
    assert config.data.paths == ["rows.jsonl"]


@pytest.mark.promise("B11")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rat=1", "unknown key 'learning_rat' (value 1): did you mean 'learning_rate'?"),
        ("lora.rr=8", "unknown key 'lora.rr' (value 8): did you mean 'lora.r'?"),
        ("lora_alpha=8", "unknown key 'lora_alpha' (value 8): did you mean 'lora.lora_alpha'?"),
        ("data.heldout=0.1", "unknown key 'data.heldout' (value 0.1): did you mean 'data.held_out'?"),
        ("data.path=[a, {path: b, wieght: 2}]", "'data.path.1.wieght' (value 2): did you mean 'data.path.weight'?"),
        ("data.path={path: b, weight: 0}", "key 'data.path.0.weight' has value 0: "),
        ("data.path=7", "key 'data.path' has value 7: give a file, folder, glob or hub dataset id"),
        ("data.columns={question: q}", "key 'data.columns"),
        ("lora.r=0", "key 'lora.r' has value 0: "),
        ("lora.r=eight", "key 'lora.r' has value 'eight': "),
        ("lora.target_modules=[lm_head]", "key 'lora.target_modules' has value ['lm_head']: "),
        ("use_gpu=perhaps", "key 'use_gpu' has value 'perhaps': "),
        ("per_device_train_batch_size=2.5", "key 'per_device_train_batch_size' has value 2.5: "),
        ("quantization.quant_type=fp4", "key 'quantization.quant_type' has value 'fp4': "),
        ("adapter=../x", "key 'adapter' has value '../x': "),
        ("run_name=a/b", "key 'run_name' has value 'a/b': "),
        ("num_workers=[4, 1]", "key 'num_workers' has value [4, 1]: "),
        ("num_workers=0", "key 'num_workers' has value 0: "),
        ("lora.r.x=1", "'r' is not a section, its value is 8"),
        ("nonsense", "'nonsense' is not of the form key=value"),
        ("data.path=[a", "the value is not valid YAML"),
        ("num_train_epochs=.inf", "key 'num_train_epochs' has value inf: "),
        ("num_train_epochs=1e308", "key 'num_train_epochs' has value 1e+308: "),
        ("early_stopping_threshold=.inf", "key 'early_stopping_threshold' has value inf: input should be a finite"),
        ("early_stopping_threshold=.nan", "key 'early_stopping_threshold' has value nan: "),
        ("data.held_out=0.6", "key 'data.held_out' has value 0.6: give a fraction of the rows up to 0.5, or a whole n"),
        ("data.held_out=.nan", "key 'data.held_out' has value nan: "),
        ("method=orpo", "key 'method' has value 'orpo': "),
        ("preference.beta=0.2", "key 'preference' has value {'beta': 0.2}: method 'sft' does not use preference"),
        ("continue_from=a@b@c", "key 'continue_from' has value 'a@b@c': write NAME, NAME@VERSION or NAME@ALIAS"),
    ],
)
def test_bad_override_is_named_with_value_and_nearest_key(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as exc_info:
        load_config(recipe, [override])
    assert message in str(exc_info.value)
    assert "\n" not in str(exc_info.value)


@pytest.mark.promise("B11")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adapter: a\ndata: {path: x}\nlorra: {r: 8}\n", "unknown key 'lorra' (value {'r': 8}): did you mean 'lora'?"),
        ("adapter: a\ndata: {path: x}\nlora:\n  r: 8\n  r: 9\n", "duplicate key 'r' (line 5)"),
        ("data: {path: x}\n", "key 'adapter' is missing"),
        ("- adapter\n", "expected 'key: value' lines, got list"),
        ("adapter: [\n", "not valid YAML"),
        ("adapter: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("", "expected 'key: value' lines, got NoneType"),
    ],
)
def test_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as exc_info:
        load_config(path)
    assert message in str(exc_info.value)
    assert str(path) in str(exc_info.value)
    assert "\n" not in str(exc_info.value)


@pytest.mark.promise("B11")
def test_what_only_conversations_have_is_refused_with_preferences(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml: packing requires method sft, but method is dpo: remove packing"):
        load_config(recipe, ["method=dpo", "packing=true"])


@pytest.mark.promise("B11")
@pytest.mark.parametrize("warmup", ["10", "0.1"])
def test_a_warm_up_that_would_be_ignored_is_refused(recipe: Path, warmup: str) -> None:
    constant = ["lr_scheduler_type=constant", f"warmup_steps={warmup}"]
    with pytest.raises(ConfigError, match="constant has no warmup_steps: set it to constant_with_warmup") as exc_info:
        load_config(recipe, constant)
    assert "\n" not in str(exc_info.value)
    assert load_config(recipe, [*constant, "lr_scheduler_type=constant_with_warmup"]).warmup_steps == float(warmup)


def test_missing_file_suggests_its_neighbour(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not exist: did you mean '.*run\.yaml'"):
        load_config(recipe.with_name("runn.yaml"))


@pytest.mark.promise("B11")
@pytest.mark.parametrize(
    ("changes", "cpus", "gpus", "message"),
    [
        (["use_gpu=true"], 8, 0, "use_gpu is true, but this machine has no GPU"),
        (["num_workers=9"], 8, 0, "num_workers is 9 with 1 CPU each, but this machine has 8"),
        (["num_workers=4", "resources_per_worker={CPU: 3}"], 8, 0, "with 3 CPU each, .*: set num_workers to 2 or less"),
        (["num_workers=4"], 8, 2, "num_workers is 4 with 1 GPU each, but this machine has 2"),
        (["use_gpu=false", "resources_per_worker={GPU: 1}"], 8, 0, "has 0 GPU"),
        (["quantization.compute_dtype=float16"], 8, 0, "'float16', which needs a GPU"),
    ],
)
def test_combination_that_cannot_run_here_is_refused(
    recipe: Path, changes: list[str], cpus: int, gpus: int, message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        check_resources(load_config(recipe, changes), cpus, gpus, "this machine")


def test_what_fits_is_let_through(recipe: Path) -> None:
    check_resources(load_config(recipe, ["num_workers=8"]), 8, 0, "this machine")
    check_resources(load_config(recipe, ["num_workers=2", "use_gpu=true"]), 2, 2, "this machine")


@pytest.mark.promise("B11")
def test_command_refuses_in_under_five_seconds_without_heavy_imports(recipe: Path) -> None:
    script = (
        "import sys; from training.__main__ import main; "
        f"code = main(['--config', {str(recipe)!r}, 'lora.rr=8']); "
        "print(code, *sorted({'torch', 'transformers', 'ray', 'datasets'} & set(sys.modules)))"
    )
    before = os.times().children_user
    result = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert os.times().children_user - before < 5  # CPU time: other load on the machine does not count
    assert result.stdout.strip() == "2"
    assert result.stderr == "error: override: unknown key 'lora.rr' (value 8): did you mean 'lora.r'?\n"


def test_dry_run_prints_the_whole_configuration(recipe: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "training",
        "--config",
        str(recipe),
        "--dry-run",
        "lora.r=4",
        "data.path=configs/datasets/ranch_hand.jsonl",
    ]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    dumped = yaml.safe_load(result.stdout)
    assert dumped["lora"]["r"] == 4
    assert dumped["max_grad_norm"] == 1.0
    assert dumped.keys() == TrainConfig.model_fields.keys()
