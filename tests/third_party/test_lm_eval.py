"""lm-evaluation-harness through `local-completions`: its figures are the ones computed here from the API's scores."""

import json
from typing import Any

import httpx
import lm_eval
import pytest
import yaml
from lm_eval.tasks import TaskManager

from tests.conftest import RunningServer
from training.base_models.resolve import BaseCheckpoint
from training.base_models.tokenizer import encode_text, load_tokenizer

QUESTIONS = [  # the right choice is not always the likeliest to a model of this size
    ("The capital of France is", ["Paris", "Berlin", "a horse", "seven"], 0),
    ("Two plus two is", ["five", "four", "a cow", "Monday"], 1),
    ("The day after Monday is", ["Sunday", "Friday", "Tuesday", "winter"], 2),
    ("Cows eat", ["stones", "gold", "music", "grass"], 3),
    ("The sky on a clear day is", ["green", "blue", "loud", "wooden"], 1),
    ("Water freezes at zero degrees", ["Kelvin", "Celsius", "north", "o'clock"], 1),
    ("A triangle has", ["three sides", "four sides", "nine sides", "no sides"], 0),
    ("The opposite of hot is", ["warm", "tall", "cold", "early"], 2),
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    """Two tasks over a local file: a multiple choice that is scored, and a text that is generated."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in QUESTIONS]
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choice = common | {
        "task": "ranch_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    generated = common | {
        "task": "ranch_generated",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 6, "temperature": 0},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (choice, generated):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluated(server: RunningServer, base: BaseCheckpoint, model: str, tasks: TaskManager, task: str) -> dict[str, Any]:
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": model,
            "base_url": f"{server.url}/v1/completions",
            "tokenizer": str(base.path),
            "num_concurrent": 1,
            "batch_size": 8,
        },
        tasks=[task],
        task_manager=tasks,
        log_samples=True,
        bootstrap_iters=0,
    )
    assert results is not None
    return dict(results)


def post(server: RunningServer, **body: Any) -> list[dict[str, Any]]:
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    choices: list[dict[str, Any]] = answer.json()["choices"]
    return choices


@pytest.mark.promise("A2")
@pytest.mark.parametrize("which", ["base_model", "adapter"])
def test_multiple_choice_by_echo_scoring(
    server: RunningServer, embedded_base: BaseCheckpoint, tasks: TaskManager, which: str
) -> None:
    model = getattr(server, which)
    tokenizer = load_tokenizer(embedded_base)
    right, sums = 0, []
    for question, choices, answer in QUESTIONS:
        context = encode_text(tokenizer, question)
        prompts = [context + encode_text(tokenizer, f" {choice}") for choice in choices]
        scored = post(server, model=model, prompt=prompts, max_tokens=0, echo=True, logprobs=0)
        sums.append([sum(choice["logprobs"]["token_logprobs"][len(context) :]) for choice in scored])
        right += max(range(4), key=sums[-1].__getitem__) == answer
    results = evaluated(server, embedded_base, model, tasks, "ranch_choice")
    assert results["results"]["ranch_choice"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    print(f"\nlm-eval on {model}: {right} of {len(QUESTIONS)} right")
    if which == "base_model":
        assert right >= 5
    samples = sorted(results["samples"]["ranch_choice"], key=lambda sample: int(sample["doc_id"]))
    for sample, own in zip(samples, sums, strict=True):
        theirs = [float(response[0][0]) for response in sample["resps"]]
        assert theirs == pytest.approx(own, abs=0.15)  # batches of another shape, in bf16


@pytest.mark.promise("A2")
def test_generate_until(server: RunningServer, embedded_base: BaseCheckpoint, tasks: TaskManager) -> None:
    results = evaluated(server, embedded_base, server.base_model, tasks, "ranch_generated")
    samples = {sample["doc"]["question"]: sample["resps"][0][0] for sample in results["samples"]["ranch_generated"]}
    own = {}
    for question, _, _ in QUESTIONS:
        (choice,) = post(
            server, model=server.base_model, prompt=question, max_tokens=6, temperature=0, stop=["\n", "."]
        )
        own[question] = choice["text"]
    assert len(samples) == len(QUESTIONS)
    assert sum(samples[question] == text for question, text in own.items()) >= len(QUESTIONS) - 1  # bf16 batches
