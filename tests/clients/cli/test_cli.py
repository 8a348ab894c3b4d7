"""The command line: exit codes, streams, one-line errors, and the registry commands on a real registry."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner, Result

from clients.cli.main import app
from clients.doctor.check import Check, report
from clients.doctor.doctor import run_checks
from tests.conftest import RunningServer, free_port
from training.base_models.resolve import BaseCheckpoint

QUICKSTART = "configs/train/quickstart.yaml"


def corral(*arguments: str, input: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=input)


def run(*arguments: str, **options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clients.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, input=options.get("input", "")
    )


def assert_one_line_error(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def test_help_takes_under_half_a_second_of_cpu() -> None:
    def cpu_s(*arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def least_s(*arguments: str) -> float:
        return min(cpu_s(*arguments) for _ in range(5))

    # On a busy machine a CPU second does less: then relative to the imports that the help needs anyway.
    assert least_s("-m", "clients.cli", "--help") < max(0.5, 4 * least_s("-c", "import typer, rich.console"))


def test_every_command_has_help() -> None:
    for command in ("demo", "train", "serve", "chat", "doctor", "adapters", "certs"):
        assert corral(command, "--help").exit_code == 0
        assert command in corral("--help").stdout
    for command in ("list", "show", "import", "promote", "rollback", "delete"):
        assert corral("adapters", command, "--help").exit_code == 0


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["train"], ["train", "--nonsense"], ["serve", "--port", "0"], ["adapters", "show"]]
)
def test_usage_errors_are_one_line_and_exit_2(arguments: list[str]) -> None:
    assert_one_line_error(corral(*arguments), 2)


def test_no_command_shows_help_and_exits_2() -> None:
    result = corral()
    assert result.exit_code == 2
    assert "doctor" in result.stdout


@pytest.mark.promise("B11")
def test_a_misspelt_training_key_is_one_line_and_exits_2() -> None:
    assert_one_line_error(corral("train", QUICKSTART, "lora.rr=8"), 2, "lora.rr", "lora.r")
    assert_one_line_error(corral("train", "configs/train/quikstart.yaml"), 2, "quickstart.yaml")


def test_a_misspelt_serve_key_is_one_line_and_exits_2(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(Path("configs/serve/quickstart.yaml").read_text().replace("max_replicas", "max_replica"))
    assert_one_line_error(corral("serve", str(config)), 2, "max_replica", "did you mean 'max_replicas'?")


@pytest.mark.promise("C3")
def test_another_host_than_loopback_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(Path("configs/serve/quickstart.yaml").read_text().replace("127.0.0.1", "0.0.0.0"))
    assert_one_line_error(corral("serve", str(config)), 2, "0.0.0.0")


def test_debug_anywhere_shows_the_traceback_and_keeps_the_exit_code() -> None:
    for arguments in (["--debug", "train", "none.yaml"], ["train", "none.yaml", "--debug"]):
        result = run(*arguments)
        assert result.returncode == 2
        assert "Traceback" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in run("train", "none.yaml").stderr


def test_dry_run_prints_the_resolved_configuration() -> None:
    result = corral("train", QUICKSTART, "lora.r=3", "--dry-run")
    assert result.exit_code == 0
    assert "r: 3\n" in result.stdout


@pytest.mark.promise("D16")
def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        for command in (["serve", "--port", port], ["demo", "--once", "--port", port]):
            result = run(*command)
            assert result.returncode == 1
            assert port in result.stderr.splitlines()[-1]
            assert "--port" in result.stderr.splitlines()[-1]


@pytest.mark.promise("D5")
def test_serve_stopped_while_it_starts_leaves_nothing_behind() -> None:
    def started_by_us() -> list[psutil.Process]:
        processes = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("CORRAL_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                    processes.append(process)
        return processes

    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "clients.cli", "serve", "--port", str(free_port())]
    environment = {**os.environ, "CORRAL_TEST_MARK": mark}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        assert "loading" in process.stderr.readline()
        deadline = time.monotonic() + 300
        while len(started_by_us()) < 4 and time.monotonic() < deadline:  # until Ray is there
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 0
    psutil.wait_procs(started_by_us(), timeout=300)
    assert started_by_us() == []


def test_adapters_from_import_to_delete(tiny_base: BaseCheckpoint, tiny_adapter: Path, tmp_path: Path) -> None:
    registry = ["--registry", str(tmp_path / "registry")]
    base = tiny_base.name
    bring_in = ["import", str(tiny_adapter), "my-adapter", "--base", str(tiny_base.path)]

    assert "no adapter" in corral("adapters", "list", *registry).stdout
    assert json.loads(corral("adapters", "list", "--json", *registry).stdout) == []
    # Without held-out figures it takes --force, and the manifest says so.
    assert_one_line_error(corral("adapters", *bring_in, *registry), 1, "eval_loss", "force")
    for version in (1, 2):
        result = corral("adapters", *bring_in, "--force", *registry)
        assert result.stdout == f"{base}:my-adapter@{version} is registered (forced)\n", result.stderr

    assert corral("adapters", "promote", "my-adapter", "1", *registry).exit_code == 0
    assert corral("adapters", "promote", "my-adapter", "2", *registry).exit_code == 0
    assert "version 1" in corral("adapters", "rollback", "my-adapter", *registry).stdout
    first, second = json.loads(corral("adapters", "list", "--json", *registry).stdout)
    assert (first["aliases"], second["aliases"]) == (["champion"], [])
    assert first["forced"] is True
    assert first["chat_format"] == "chatml"

    listed = corral("adapters", "list", *registry).stdout
    assert f"{base}:my-adapter@1" in listed
    assert "champion" in listed
    for name in ("my-adapter", "my-adapter@1", "my-adapter@champion", f"{base}:my-adapter@1"):
        assert json.loads(corral("adapters", "show", name, "--json", *registry).stdout) == {**first, "ancestors": []}
    assert f"{base}:my-adapter@2" in corral("adapters", "show", "my-adapter@2", *registry).stdout

    assert_one_line_error(corral("adapters", "delete", "my-adapter", "1", *registry), 1, "champion")
    assert corral("adapters", "delete", "my-adapter", "2", *registry).exit_code == 0
    assert_one_line_error(corral("adapters", "show", "my-adapter@2", *registry), 1, "no version 2")
    assert_one_line_error(corral("adapters", "show", "my-adaptr", *registry), 1, "did you mean 'my-adapter'?")
    assert_one_line_error(corral("adapters", "show", "other:my-adapter", *registry), 1, base)
    assert_one_line_error(corral("adapters", "promote", "my-adapter", "one", *registry), 2, "VERSION")


@pytest.mark.promise("C4")
def test_import_of_another_bases_adapter_is_refused_even_by_force(
    tiny_base: BaseCheckpoint, tiny_adapter: Path, tmp_path: Path
) -> None:
    bring_in = ["import", str(tiny_adapter), "wrong", "--force", "--registry", str(tmp_path)]
    assert_one_line_error(corral("adapters", *bring_in), 1, tiny_base.name)
    bring_in[1] = str(tmp_path)
    assert_one_line_error(corral("adapters", *bring_in, "--base", str(tiny_base.path)), 1, str(tmp_path))


def test_chat_streams_an_argument_and_what_is_piped_in(server: RunningServer) -> None:
    greedy = ["--url", server.url, "--temperature", "0", "--max-tokens", "12"]
    argument = run("chat", "What is the capital of France?", "--model", server.base_model, *greedy)
    piped = run("chat", *greedy, input="What is the capital of France?")  # no --model: the base
    assert "Paris" in argument.stdout
    assert (argument.returncode, argument.stderr) == (0, "")
    assert piped.stdout == argument.stdout


def test_chat_errors_are_one_line(server: RunningServer) -> None:
    assert_one_line_error(corral("chat", "hi", "--url", server.url, "--model", "smollm2"), 1, "smollm2-135m")
    assert_one_line_error(corral("chat", "--url", server.url, input=""), 2, "empty")
    assert_one_line_error(corral("chat", "hi", "--url", f"http://127.0.0.1:{free_port()}"), 1, "corral serve")


def test_chat_in_a_terminal_remembers_clears_and_quits(server: RunningServer) -> None:
    ours, theirs = os.openpty()
    command = [
        sys.executable,
        "-m",
        "clients.cli",
        "chat",
        "--url",
        server.url,
        "--temperature",
        "0",
        "--max-tokens",
        "24",
    ]
    with subprocess.Popen(
        command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        os.write(ours, b"The secret word is tulip.\nWhat is the secret word?\n/nonsense\n/clear\n/quit\n")
        output, _ = process.communicate(timeout=300)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0, output
    second_answer = output.split("> ")[2]
    assert "tulip" in second_answer
    assert "unknown command '/nonsense'" in output
    assert "cleared" in output


def test_doctor_says_what_is_broken_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    monkeypatch.setenv("CORRAL_HOME", str(home))
    result = corral("doctor", "--json")
    assert result.exit_code == 1
    checks = {check["name"]: check for check in json.loads(result.stdout)}
    assert checks["CORRAL_HOME"]["status"] == "error"
    assert checks["CORRAL_HOME"]["fix"] == f"chmod 700 {home}"
    assert f"-> chmod 700 {home}" in corral("doctor").stdout
    assert checks["python"]["status"] == checks["packages"]["status"] == "ok"

    home.chmod(0o700)
    assert {check.name: check for check in run_checks()}["CORRAL_HOME"].status == "ok"


def test_doctor_counts_what_is_broken() -> None:
    checks = [Check("a", "ok", "fine"), Check("b", "error", "gone", "fix it")]
    assert report(checks).endswith("1 of 2 checks failed")
    assert report(checks[:1]).endswith("no errors")
