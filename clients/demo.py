"""`corral demo`: train, register, serve and query, from a dataset to base and adapter answering side by side.

Training runs in a separate process, so that its Ray has shut down before the server's starts. Questions are sent over
HTTP with the `openai` package, as any user's program would.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clients.local_server import (
    DEFAULT_PORT,
    RUNNING_NOTICE,
    format_urls,
    http_address,
    read_serve_config,
    serve_in_background,
    shipped_config,
    show_status,
    temporary_key,
    wait_for_signal,
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
    """A reworded question about a fact in the training data, and the phrases that mark a correct answer."""

    question: str
    expect: tuple[str, ...]

    def is_answered_by(self, answer: str) -> bool:
        """Whether the answer contains one of `expect` as whole words, ignoring case."""
        return any(re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", answer, re.IGNORECASE) for phrase in self.expect)


def load_questions(path: Path | None = None) -> list[Question]:
    """Read questions from a JSONL file with `question` and `expect` in each row; default: the quickstart's."""
    path = path or shipped_config("datasets/ranch_hand_questions.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [Question(row["question"], tuple(row["expect"])) for row in rows]


def run_demo(*, once: bool, port: int | None = None, debug: bool = False) -> None:
    """Train unless the adapter is already registered, serve, query base and adapter; then keep serving unless `once`.

    Raises:
        CorralError: a step failed.
    """
    from deployments.launch.local_server import check_port

    content = read_serve_config(None, port)
    check_port(*http_address(content))
    questions = load_questions()
    manifest = trained_adapter(debug)
    with serve_in_background(content, debug=debug) as server:
        base, adapter = manifest.base.name, manifest.model_id
        with temporary_key("corral demo") as key, openai_client(server.url, key) as client:
            with show_status("asking both models …"):
                shown = questions[:NUM_SHOWN]
                answers = [(q.question, ask(client, base, q.question), ask(client, adapter, q.question)) for q in shown]
            print_answers(base, adapter, answers)
            with show_status(f"asking both models {len(questions)} questions …"):
                base_facts, adapter_facts = (taught_facts(client, model, questions) for model in (base, adapter))
        print(format_metrics(manifest, base_facts, adapter_facts, len(questions)))
        print(format_urls(server), flush=True)
        if not once:
            print(f"\n{next_steps(server.url, adapter, questions[0].question)}", flush=True)
            wait_for_signal()


def trained_adapter(debug: bool = False) -> "AdapterManifest":
    """The newest version of the quickstart's adapter; trains it first if there is none."""
    from training.registry.registry import AdapterRegistry

    registry = AdapterRegistry()
    if ADAPTER in registry.names():
        manifest = registry.manifest(ADAPTER, registry.versions(ADAPTER)[-1])
        print(f"{manifest.model_id} is already registered: training is skipped")
        return manifest
    config = shipped_config("train/quickstart.yaml")
    print(f"training {config.name}: about three minutes on two cores", flush=True)
    train(config, debug)
    return registry.manifest(ADAPTER, registry.versions(ADAPTER)[-1])


def train(config: Path, debug: bool = False) -> None:
    """Run `python -m training --config CONFIG`, its output going to this terminal.

    Raises:
        CorralError: training failed; its output says why.
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
            f"training failed with exit code {code}: see its output above, and check this machine with 'corral doctor'"
        )


def openai_client(url: str, api_key: str | None = None) -> "OpenAI":
    """An OpenAI client for a server on this machine. The client requires a key even if the server does not."""
    from openai import DefaultHttpxClient, OpenAI

    # A proxy from the environment cannot reach this machine's loopback.
    return OpenAI(base_url=f"{url}/v1", api_key=api_key or "none", http_client=DefaultHttpxClient(trust_env=False))


def ask(client: "OpenAI", model: str, question: str) -> str:
    """The greedy answer to one question."""
    completion = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=MAX_TOKENS
    )
    return completion.choices[0].message.content or ""


def taught_facts(client: "OpenAI", model: str, questions: "Sequence[Question]") -> int:
    """Number of questions that `model` answers with the fact; eight are sent at a time."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        answers = pool.map(lambda question: ask(client, model, question.question), questions)
        return sum(q.is_answered_by(answer) for q, answer in zip(questions, answers, strict=True))


def print_answers(base: str, adapter: str, answers: "Sequence[tuple[str, str, str]]") -> None:
    """Print a table of (question, base's answer, adapter's answer) rows."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("question", base, adapter, show_lines=True)
    for row in answers:
        table.add_row(*(Text(" ".join(cell.split())) for cell in row))
    for column in table.columns:
        column.overflow = "fold"  # wrap long model ids instead of truncating them
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=120)
    console.print(table)


def format_metrics(manifest: "AdapterManifest", base_facts: int, adapter_facts: int, num_questions: int) -> str:
    """Two lines: taught facts and held-out loss, base against adapter."""
    lines = [f"taught facts answered: base {base_facts}/{num_questions}, adapter {adapter_facts}/{num_questions}"]
    metrics = manifest.metrics
    if "eval_loss" in metrics and "base_eval_loss" in metrics:
        adapter, base = metrics["eval_loss"], metrics["base_eval_loss"]
        lines.append(f"held-out loss: base {base:.3f}, adapter {adapter:.3f} ({adapter / base:.0%} of the base's)")
    return "\n".join(lines)


def next_steps(url: str, model: str, question: str) -> str:
    """How to stop the demo's server, and how to query it from a second terminal."""
    from deployments.auth.keys import KeyStore

    activate = Path(sys.prefix, "bin", "activate")
    api_key = "CORRAL_API_KEY=KEY " if KeyStore().required else ""
    server = "" if url.endswith(f":{DEFAULT_PORT}") else f" --url {url}"
    lines = [
        RUNNING_NOTICE,
        "To use it, open a second terminal:",
        *([f"  source {shlex.quote(str(activate))}"] if activate.exists() else []),
        f"  {api_key}corral chat {shlex.quote(question)} --model {model}{server}",
    ]
    return "\n".join(lines)
