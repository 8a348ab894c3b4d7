"""`corral demo`: the whole main job with real parts, from the dataset to two models that answer side by side.

Trains in a process of its own, so that its Ray is gone before the server's starts, and asks over HTTP with the
`openai` package, as anybody would.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clients.local_server import (
    format_urls,
    http_address,
    read_serve_config,
    serve_in_background,
    shipped_config,
    temporary_key,
    wait_for_signal,
    waiting,
)
from training.errors import CorralError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openai import OpenAI

    from training.registry.manifest import AdapterManifest

ADAPTER = "ranch-hand"
NUM_SHOWN = 3
NUM_THREADS = 8
MAX_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Question:
    """A question on a fact of the training data, in words that are not in it, and what a right answer contains."""

    question: str
    expect: tuple[str, ...]

    def is_answered_by(self, answer: str) -> bool:
        """Whether any of `expect` is in the answer as whole words, in either case."""
        return any(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", answer, re.IGNORECASE) for words in self.expect)


def load_questions(path: Path | None = None) -> list[Question]:
    """The questions of a JSONL file with `question` and `expect` in each row; by default the quickstart's."""
    path = path or shipped_config("datasets/ranch_hand_questions.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [Question(row["question"], tuple(row["expect"])) for row in rows]


def run_demo(*, once: bool, port: int | None = None, debug: bool = False) -> None:
    """Train unless it is done, serve, ask base and adapter, and leave the server up unless `once`.

    Raises:
        CorralError: one of the steps failed.
    """
    from deployments.launch.local_server import check_port

    content = read_serve_config(None, port)
    check_port(*http_address(content))
    questions = load_questions()
    manifest = trained_adapter(debug)
    with serve_in_background(content, debug=debug) as server:
        base, adapter = manifest.base.name, manifest.model_id
        with temporary_key("corral demo") as key, openai_client(server.url, key) as client:
            with waiting("asking both models …"):
                shown = questions[:NUM_SHOWN]
                answers = [(q.question, ask(client, base, q.question), ask(client, adapter, q.question)) for q in shown]
            print_answers(base, adapter, answers)
            with waiting(f"asking both models {len(questions)} questions …"):
                found = [taught_facts(client, model, questions) for model in (base, adapter)]
        print(figures(manifest, found[0], found[1], len(questions)))
        print(format_urls(server, stays=not once), flush=True)
        if not once:
            wait_for_signal()


def trained_adapter(debug: bool = False) -> "AdapterManifest":
    """The newest version of the quickstart's adapter; trained now if there is none."""
    from training.registry.registry import AdapterRegistry

    registry = AdapterRegistry()
    if ADAPTER in registry.names():
        manifest = registry.manifest(ADAPTER, registry.versions(ADAPTER)[-1])
        print(f"{manifest.model_id} is in the registry already: nothing to train")
        return manifest
    config = shipped_config("train/quickstart.yaml")
    print(f"training {config.name}: about three minutes on two cores", flush=True)
    train(config, debug)
    return registry.manifest(ADAPTER, registry.versions(ADAPTER)[-1])


def train(config: Path, debug: bool = False) -> None:
    """`python -m training --config CONFIG`, with its output passing through.

    Raises:
        CorralError: it failed; its own output says why.
    """
    from training.home import corral_home

    command = [sys.executable, "-m", "training", "--config", str(config), *(["--debug"] if debug else [])]
    root = config.parents[2]  # paths in the YAML are relative to the folder that has configs/
    with subprocess.Popen(command, cwd=root, env={**os.environ, "CORRAL_HOME": str(corral_home())}) as training:
        try:
            code = training.wait()
        except BaseException:
            training.terminate()
            training.wait()
            raise
    if code != 0:
        raise CorralError(
            f"training ended with exit code {code}: the reason is above; 'corral doctor' checks this machine"
        )


def openai_client(url: str, api_key: str | None = None) -> "OpenAI":
    """OpenAI's client for a server on this machine; it cannot do without a key, though the server may."""
    from openai import DefaultHttpxClient, OpenAI

    # A proxy of the environment does not reach our loopback.
    return OpenAI(base_url=f"{url}/v1", api_key=api_key or "none", http_client=DefaultHttpxClient(trust_env=False))


def ask(client: "OpenAI", model: str, question: str) -> str:
    """The greedy answer to one question."""
    completion = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=MAX_TOKENS
    )
    return completion.choices[0].message.content or ""


def taught_facts(client: "OpenAI", model: str, questions: "Sequence[Question]") -> int:
    """How many of the questions `model` answers with the fact, asked eight at a time."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        answers = pool.map(lambda question: ask(client, model, question.question), questions)
        return sum(q.is_answered_by(answer) for q, answer in zip(questions, answers, strict=True))


def print_answers(base: str, adapter: str, answers: "Sequence[tuple[str, str, str]]") -> None:
    """A table of (question, the base's answer, the adapter's answer)."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("question", base, adapter, show_lines=True)
    for row in answers:
        table.add_row(*(Text(" ".join(cell.split())) for cell in row))
    for column in table.columns:
        column.overflow = "fold"  # model ids stay whole
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=120)
    console.print(table)


def figures(manifest: "AdapterManifest", base_facts: int, adapter_facts: int, num_questions: int) -> str:
    """Two lines: taught facts and held-out loss, base against adapter."""
    lines = [f"taught facts answered: base {base_facts}/{num_questions}, adapter {adapter_facts}/{num_questions}"]
    metrics = manifest.metrics
    if "eval_loss" in metrics and "base_eval_loss" in metrics:
        tuned, plain = metrics["eval_loss"], metrics["base_eval_loss"]
        lines.append(f"held-out loss: base {plain:.3f}, adapter {tuned:.3f} ({tuned / plain:.0%} of the base's)")
    return "\n".join(lines)
