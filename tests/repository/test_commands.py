"""Every command in a README is valid, and is run by a test or needs a GPU or a hub."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from clients.cli.main import app
from tests.repository.documents import ROOT, documented_commands, gpu_or_hub_commands, names_a_test

COMMANDS = documented_commands()
ON_A_GPU_OR_HUB = gpu_or_hub_commands()

# What a command begins with, and the test that runs it (with other names, ports and sizes), or the .ci/run line.
_CERTIFICATES = "deployments/launch/test_certificates.py"
_REPORTS = "clients/cli/test_adapter_report.py"
RUN_BY = {
    r"make (lint|test-all|test-clients)$": ".ci/run",
    r"make test\b": "repository/test_tiers.py::test_every_promise_has_a_test_that_is_not_slow",
    r"make (demo|bench|format)$": "repository/test_commands.py::test_make_runs_commands_that_are_tested",
    r"\.ci/run$": ".ci/run",
    r"source \.venv/bin/activate$": "repository/test_commands.py::test_make_runs_commands_that_are_tested",
    r"corral demo": "end_to_end/test_documented_commands.py::test_demo_asks_base_and_adapter_and_stops",
    r"corral chat .* --ca ": f"{_CERTIFICATES}::test_clients_that_trust_the_file_verify_the_server",
    r"corral chat ": "clients/cli/test_cli.py::test_chat_streams_an_argument_and_what_is_piped_in",
    r"curl ": "third_party/test_readme.py::test_curl_gets_an_answer",
    r"corral data check ": "repository/test_readme.py::test_the_chapter_goes_from_a_csv_to_an_adapter_that_answers",
    r"corral train \S+workshop.yaml$": (
        "repository/test_readme.py::test_the_chapter_goes_from_a_csv_to_an_adapter_that_answers"
    ),
    r"corral train \S+ranch_tools.yaml$": (
        "end_to_end/test_ranch_tools.py::test_the_adapter_calls_the_right_tool_where_the_base_does_not"
    ),
    r"corral train \S+ --dry-run$": "clients/cli/test_cli.py::test_dry_run_prints_the_resolved_configuration",
    r"corral train \S+quickstart_(dpo|kto).yaml$": "end_to_end/test_documented_commands.py::test_recipe_trains",
    r"corral train .* --submit ": (
        "clients/jobs/test_jobs.py::test_a_submitted_training_shows_its_output_and_registers_its_adapter"
    ),
    r"corral sweep ": "end_to_end/test_documented_commands.py::test_recipe_trains",
    r"corral runs (list|show|logs) .*--address": "clients/jobs/test_jobs.py::test_runs_lists_shows_and_logs_jobs",
    r"corral runs (list|show|logs)": "end_to_end/test_documented_commands.py::test_runs_are_listed_shown_and_followed",
    r"corral runs stop": (
        "training/runs/test_status.py"
        "::test_stopped_and_killed_runs_leave_no_process_and_no_adapter_and_their_name_resumes_them"
    ),
    r"corral adapters (list|import|promote|rollback|delete)": (
        "clients/cli/test_cli.py::test_adapters_from_import_to_delete"
    ),
    r"corral adapters show": f"{_REPORTS}::test_show_tells_the_whole_lineage",
    r"corral adapters diff": f"{_REPORTS}::test_diff_names_what_differs",
    r"corral adapters verify": f"{_REPORTS}::test_verify_exits_0_where_all_is_equal_and_1_where_not",
    r"corral adapters export": f"{_REPORTS}::test_export_says_what_it_merged_into_and_what_that_costs",
    r"corral keys ": "clients/cli/test_keys.py::test_json_has_the_key_at_creation_and_never_again",
    r"corral usage ": "deployments/accounting/test_ledger.py::test_usage_is_exact_and_live_in_the_file_and_in_metrics",
    r"corral certs create": f"{_CERTIFICATES}::test_it_is_valid_for_the_hosts_this_machine_and_loopback",
    r"corral serve --tls$": (
        "deployments/launch/test_serve_tls.py::test_api_and_page_answer_over_https_to_who_trusts_the_certificate"
    ),
    r"SSL_CERT_FILE=": "end_to_end/test_documented_commands.py::test_ssl_cert_file_is_what_python_programs_trust",
    r"corral bench http": "clients/bench/test_bench.py::test_several_models_take_turns",
    r"corral bench --": "deployments/launch/test_local_server.py::test_corral_bench_starts_the_server_that_it_measures",
    r"(CXX=none )?python -m deployments.engine.bench": (
        "end_to_end/test_documented_commands.py::test_the_bare_engine_is_measured_without_a_compiler"
    ),
    r"corral doctor": "clients/cli/test_cli.py::test_doctor_says_what_is_broken_and_what_to_do",
    r"(export RAY_|ray start |serve deploy |ray job submit )": (
        "end_to_end/test_cluster.py::test_a_job_trains_what_a_deployed_server_answers_with"
    ),
    r"ray get-auth-token": "end_to_end/test_documented_commands.py::test_ray_makes_a_token",
}


def running_test(command: str) -> str | None:
    """The test that runs a command."""
    return next((test for pattern, test in RUN_BY.items() if re.match(pattern, command)), None)


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 70
    assert "corral keys revoke ID" in COMMANDS  # without its comment
    assert any("--num-requests 64" in command for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_test_runs_it_or_it_needs_a_gpu_or_a_hub(command: str) -> None:
    assert command in ON_A_GPU_OR_HUB or running_test(command) is not None, COMMANDS[command]


def test_the_tests_that_run_commands_exist() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(f"make {target}\n" in ci for target in ("lint", "test-all", "test-clients"))
    assert [test for test in RUN_BY.values() if test != ".ci/run" and not names_a_test(test)] == []


def test_no_pattern_is_left_over() -> None:
    used = {running_test(command) for command in (*COMMANDS, "corral demo --once")}
    assert set(RUN_BY.values()) - used == set()


def test_what_needs_a_gpu_or_a_hub_is_documented_somewhere() -> None:
    headers = "".join(path.read_text() for path in (ROOT / "configs").rglob("*.yaml"))
    prose = "".join(path.read_text() for path in ROOT.rglob("README.md"))
    for command in ON_A_GPU_OR_HUB - COMMANDS.keys():
        assert command in headers or prose.count(f"`{command}`") > 1, command


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("corral ")])
def test_the_command_line_takes_it(command: str) -> None:
    """Command, options and number of arguments; nothing is run."""
    arguments = shlex.split(command)[1:]
    group = typer.main.get_command(app)
    context = group.make_context("corral", arguments)
    while hasattr(group, "resolve_command"):
        name, group, arguments = group.resolve_command(context, [*context._protected_args, *context.args])
        context = group.make_context(name, arguments, parent=context)


def test_make_runs_commands_that_are_tested() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target, commands in {
        "demo": ["corral demo"],
        "bench": ["corral bench --serve", "-m deployments.engine.bench"],
    }.items():
        recipe = makefile.split(f"\n{target}: setup\n")[1].split("\n\n")[0]
        assert all(f"$(BIN)/{command}" in recipe or command in recipe for command in commands)
    assert "VENV := .venv\n" in makefile


def test_documents_have_no_dead_links() -> None:
    for path in {*COMMANDS.values(), ROOT / "README.md", ROOT / ".github" / "CHANGELOG.md"}:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / Path(link)).exists(), f"{path}: {link}"
