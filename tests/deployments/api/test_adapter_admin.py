"""A5, C8, D10 and canaries over HTTP: the real ingress and engine on the tiny model, in this process."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.config import EngineArgs, ServeArgs
from deployments.replica.model import LlamaModel
from tests.clients.cli.test_cli import assert_one_line_error, corral
from tests.conftest import register_three
from tests.deployments.in_process import behind, serving
from training.base_models.resolve import BaseCheckpoint
from training.registry.aliases import draw
from training.registry.audit import os_user
from training.registry.promotion import AdapterPromoter
from training.registry.publish import AdapterDraft, AdapterPublisher
from training.registry.registry import AdapterRegistry

USERS = [f"user-{number}" for number in range(100)]


@dataclass(frozen=True, slots=True)
class Api:
    http: httpx.Client
    registry: AdapterRegistry
    base: str
    model: Any
    home: Path

    def ask(self, model: str, **fields: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "temperature": 0}
        return self.http.post("/v1/chat/completions", json=body | fields)

    def audit(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.home / "audit.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def served(
    tiny_base: BaseCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, AdapterRegistry, Any]]:
    import torch

    root = tmp_path_factory.mktemp("admin") / "registry"
    engine = EngineArgs(max_model_len=512, kv_cache_gib=0.05, num_threads=1, chunks_per_s=10_000)
    args = ServeArgs(base_model=str(tiny_base.path), registry=str(root), engine=engine)
    num_threads = torch.get_num_threads()
    model = behind(LlamaModel, args)
    with serving(args, model) as url:
        yield url, AdapterRegistry(root), model
    torch.set_num_threads(num_threads)


@pytest.fixture
def api(
    served: tuple[str, AdapterRegistry, Any],
    tiny_base: BaseCheckpoint,
    tiny_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Api]:
    """Three versions of `ranch`, the second of them the champion."""
    url, registry, model = served
    monkeypatch.setenv("CORRAL_HOME", str(tmp_path / "home"))
    for name in registry.names():
        registry.storage.remove_folder(name)
    register_three(registry, tiny_base, tiny_adapter)
    with httpx.Client(base_url=url, timeout=120) as http:
        yield Api(http, registry, tiny_base.name, model, tmp_path / "home")


def assert_error(response: httpx.Response, status: int, code: str | None, words: str, param: str | None = None) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), error
    assert words in error["message"]


@pytest.mark.promise("A5")
def test_list_and_show(api: Api, tiny_base: BaseCheckpoint, tiny_adapter: Path) -> None:
    nan = {"eval_loss": float("nan"), "base_eval_loss": 2.0}
    draft = AdapterDraft(name="other", base=tiny_base, chat_format="chatml", metrics=nan)
    AdapterPublisher(api.registry).register(tiny_adapter, draft, force=True)
    AdapterPromoter(api.registry).promote("ranch", 3, percent=12.5)
    other, ranch = api.http.get("/v1/adapters").json()["data"]
    assert ranch == api.http.get("/v1/adapters/ranch").json()
    assert (ranch["name"], ranch["aliases"], ranch["canary"]) == (
        "ranch",
        {"champion": 2},
        {"version": 3, "percent": 12.5},
    )
    assert [version["version"] for version in ranch["versions"]] == [1, 2, 3]
    assert [version["aliases"] for version in ranch["versions"]] == [[], ["champion"], []]
    assert [version["canary_percent"] for version in ranch["versions"]] == [None, None, 12.5]
    assert ranch["versions"][2]["model_id"] == f"{api.base}:ranch@3"
    assert ranch["versions"][0]["metrics"] == {"eval_loss": 1.0, "base_eval_loss": 2.0}
    assert other["versions"][0]["metrics"]["eval_loss"] == "NaN"  # not representable in JSON
    assert other["versions"][0]["forced"]


@pytest.mark.promise("A5")
def test_promote_roll_back_and_delete(api: Api) -> None:
    changed = api.http.post("/v1/adapters/ranch/promote", json={"version": 3}).json()
    assert {key: changed[key] for key in ("alias", "version", "previous_version", "canary")} == {
        "alias": "champion",
        "version": 3,
        "previous_version": 2,
        "canary": None,
    }
    assert api.ask(f"{api.base}:ranch").json()["model"] == f"{api.base}:ranch@3"
    assert api.http.post("/v1/adapters/ranch/rollback").json()["version"] == 2
    assert api.ask(f"{api.base}:ranch@champion").json()["model"] == f"{api.base}:ranch@2"
    assert api.http.post("/v1/adapters/ranch/rollback", json={"alias": "champion"}).json()["version"] == 1
    assert api.http.post("/v1/adapters/ranch/promote", json={"version": 2, "alias": "next"}).status_code == 200
    assert api.registry.aliases("ranch") == {"champion": 1, "next": 2}
    deleted = api.http.delete("/v1/adapters/ranch/versions/3")
    assert deleted.json() == {"object": "adapter.version", "name": "ranch", "version": 3, "deleted": True}
    assert api.registry.versions("ranch") == [1, 2]


@pytest.mark.promise("A5")
def test_what_is_refused_and_why(api: Api) -> None:
    AdapterPromoter(api.registry).promote("ranch", 3, percent=10)
    promote, post, delete = "/v1/adapters/ranch/promote", api.http.post, api.http.delete
    assert_error(api.http.get("/v1/adapters/rnach"), 404, "model_not_found", "did you mean 'ranch'?")
    assert_error(post("/v1/adapters/rnach/promote", json={"version": 1}), 404, "model_not_found", "'ranch'")
    assert_error(post(promote, json={"version": 9}), 404, "model_not_found", "it has 1, 2, 3")
    assert_error(post("/v1/adapters/ranch/rollback", json={"alias": "x"}), 404, "model_not_found", "champion")
    assert_error(post(promote, json={"version": 0}), 400, None, "greater than", "version")
    assert_error(post(promote, json={"version": 1, "percent": 101}), 400, None, "100", "percent")
    assert_error(post(promote, json={"version": 1, "percnt": 10}), 400, None, "unknown field", "percnt")
    assert_error(post(promote, json={"version": 1, "alias": "../x"}), 400, None, "pattern", "alias")
    assert_error(post(promote, json={"version": 1, "alias": "7"}), 400, None, "names a version", "alias")
    assert_error(post(promote, json={"version": 2, "percent": 10}), 409, "registry_conflict", "is the champion")
    assert_error(delete("/v1/adapters/ranch/versions/2"), 409, "registry_conflict", "alias 'champion' points at")
    assert_error(delete("/v1/adapters/ranch/versions/3"), 409, "registry_conflict", "roll back first")
    assert_error(delete("/v1/adapters/ranch/versions/x"), 400, None, "integer", "version")
    assert_error(delete("/v1/adapters/ranch/versions/9"), 404, "model_not_found", "it has 1, 2, 3")
    assert api.registry.traffic("ranch").record() == {"version": 2, "canary": 3, "percent": 10}
    while api.registry.traffic("ranch").version != 1:
        AdapterPromoter(api.registry).rollback("ranch")
    assert_error(post("/v1/adapters/ranch/rollback"), 409, "registry_conflict", "pointed at nothing before")


def test_a_canary_answers_exactly_the_users_that_are_drawn_until_it_is_rolled_back(api: Api) -> None:
    champion, canary = f"{api.base}:ranch@2", f"{api.base}:ranch@3"

    def answered_by(user: str) -> str:
        return str(api.ask(f"{api.base}:ranch", user=user).json()["model"])

    api.http.post("/v1/adapters/ranch/promote", json={"version": 3, "percent": 30})
    expected = {user: canary if draw("ranch", 2, 3, f"user {user}") < 30 else champion for user in USERS}
    assert {user: answered_by(user) for user in USERS} == expected
    assert 18 <= list(expected.values()).count(canary) <= 42
    assert api.ask(f"{api.base}:ranch@champion", user=USERS[0]).json()["model"] == expected[USERS[0]]
    # without user or key each request is drawn for itself
    assert {api.ask(f"{api.base}:ranch").json()["model"] for _ in range(60)} == {champion, canary}
    assert {api.ask(champion, user=user).json()["model"] for user in USERS[:20]} == {champion}
    api.http.post("/v1/adapters/ranch/rollback")
    assert {answered_by(user) for user in USERS} == {champion}


@pytest.mark.promise("A3")
def test_models_tell_parent_alias_created_and_canary(api: Api) -> None:
    AdapterPromoter(api.registry).promote("ranch", 3, percent=5)
    base, *versions = api.http.get("/v1/models").json()["data"]
    assert (base["id"], base["parent"], base["canary_percent"]) == (api.base, None, None)
    fields = [(v["id"], v["parent"], v["aliases"], v["canary_percent"]) for v in versions]
    assert fields == [
        (f"{api.base}:ranch", api.base, ["champion"], None),
        (f"{api.base}:ranch@3", api.base, [], 5.0),
        (f"{api.base}:ranch@2", api.base, ["champion"], None),
        (f"{api.base}:ranch@1", api.base, [], None),
    ]
    for version in versions:
        manifest = api.registry.manifest("ranch", version["version"])
        assert version["created"] == int(manifest.created.timestamp())
        assert api.http.get(f"/v1/models/{version['id']}").json() == version
    assert_error(api.ask(f"{api.base}:rnach"), 404, "model_not_found", "did you mean 'ranch'?", "model")


@pytest.mark.parametrize("remote", [False, True])
def test_the_command_line_reports_a_server_as_its_registry(api: Api, remote: bool) -> None:
    where = ["--url", str(api.http.base_url)] if remote else ["--registry", api.registry.storage.address]

    def adapters(*arguments: str) -> str:
        result = corral("adapters", *arguments, *where)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    ranch = f"{api.base}:ranch@champion is version"
    assert adapters("promote", "ranch", "3", "--percent", "10") == f"{ranch} 2, and version 3 for 10 % of its traffic\n"
    listed = adapters("list")
    assert listed.rstrip().splitlines()[-1].split()[:4] == [f"{api.base}:ranch@3", "canary", "10", "%"]
    versions = json.loads(adapters("list", "--json"))
    assert [(v["name"], v["version"], v["aliases"], v["canary_percent"]) for v in versions] == [
        ("ranch", 1, [], None),
        ("ranch", 2, ["champion"], None),
        ("ranch", 3, [], 10.0),
    ]
    assert adapters("rollback", "ranch") == f"{ranch} 2 alone: its canary, version 3, has ended\n"
    assert adapters("promote", "ranch", "3") == f"{ranch} 3\n"
    assert adapters("rollback", "ranch") == f"{ranch} 2\n"
    assert adapters("delete", "ranch", "3") == "ranch@3 is deleted\n"
    assert_one_line_error(corral("adapters", "delete", "ranch", "2", *where), 1, "alias 'champion' points at")
    assert_one_line_error(corral("adapters", "promote", "rnach", "1", *where), 1, "did you mean 'ranch'?")
    assert_one_line_error(corral("adapters", "promote", "ranch", "1", "--percent", "0", *where), 1, "percent")
    assert_one_line_error(corral("adapters", "promote", "ranch", "1", "--percent", "101", *where), 2, "equal to 100")
    actors = [entry["actor"] for entry in api.audit()]
    assert len(actors) >= 6
    assert all(
        actor == ({"key_id": None, "name": "anonymous", "request_id": None} if remote else os_user())
        for actor in actors
    )


def test_the_command_line_shows_a_canary_and_wants_one_registry(api: Api) -> None:
    registry = ["--registry", api.registry.storage.address]
    AdapterPromoter(api.registry).promote("ranch", 3, percent=10)
    assert "canary 10 %" in corral("adapters", "show", "ranch@3", *registry).stdout
    assert json.loads(corral("adapters", "show", "ranch@3", "--json", *registry).stdout)["canary_percent"] == 10
    assert f"{api.base}:ranch@2" in corral("adapters", "show", "ranch", *registry).stdout  # a command is no traffic
    both = corral("adapters", "list", *registry, "--url", "http://127.0.0.1:1")
    assert_one_line_error(both, 2, "give one of them")


@pytest.mark.promise("C8")
def test_every_change_is_a_line_of_the_audit_log(api: Api) -> None:
    body, request_id = {"version": 3, "percent": 10}, {"x-request-id": "mine"}
    api.http.post("/v1/adapters/ranch/promote", json=body, headers=request_id)
    api.http.post("/v1/adapters/ranch/rollback")
    api.http.delete("/v1/adapters/ranch/versions/2")
    api.http.delete("/v1/adapters/ranch/versions/3")
    api.http.get("/v1/adapters")
    promoted, rolled_back, refusal, deleted = api.audit()
    assert promoted["actor"] == {"key_id": None, "name": "anonymous", "request_id": "mine"}
    assert (promoted["action"], promoted["target"], promoted["outcome"]) == ("promote", "ranch", "done")
    assert (promoted["before"], promoted["after"]) == ({"version": 2}, {"version": 2, "canary": 3, "percent": 10})
    assert (rolled_back["before"], rolled_back["after"]) == (promoted["after"], promoted["before"])
    assert (refusal["action"], refusal["target"], refusal["outcome"]) == ("delete", "ranch@2", "refused")
    assert "alias 'champion' points at" in refusal["reason"]
    assert (deleted["target"], deleted["outcome"]) == ("ranch@3", "done")


@pytest.mark.promise("D10")
def test_a_deleted_version_ends_its_answers_and_begins_no_more(api: Api) -> None:
    long: dict[str, Any] = {"max_tokens": 480, "ignore_eos": True}
    full_answer = api.ask(f"{api.base}:ranch@3", **long).json()["choices"][0]["message"]["content"]
    body = {"model": f"{api.base}:ranch@3", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, **long}
    text = ""
    with api.http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line)
        assert "role" in next(lines)
        assert api.http.delete("/v1/adapters/ranch/versions/3").status_code == 200
        assert api.model._engine.num_running == 1  # it is still running
        for line in lines:
            if line == "[DONE]":
                break
            text += json.loads(line)["choices"][0]["delta"].get("content", "")
    assert text == full_answer
    assert_error(api.ask(f"{api.base}:ranch@3"), 404, "model_not_found", "it has 1, 2", "model")
    assert api.ask(f"{api.base}:ranch").json()["model"] == f"{api.base}:ranch@2"


@pytest.mark.promise("A4")
def test_tokenize_and_detokenize_over_http(api: Api) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    response = api.http.post("/tokenize", json={"model": f"{api.base}:ranch", "messages": messages}).json()
    usage = api.ask(f"{api.base}:ranch", messages=messages).json()["usage"]
    assert response["count"] == len(response["tokens"]) == usage["prompt_tokens"]
    assert response["max_model_len"] == 512
    text = api.http.post("/detokenize", json={"tokens": response["tokens"]}).json()["prompt"]
    assert text.startswith("<|im_start|>system\nBe brief.")
    body = {"model": api.base, "prompt": response["tokens"], "max_tokens": 1}
    assert api.http.post("/v1/completions", json=body).json()["usage"]["prompt_tokens"] == response["count"]
    assert_error(
        api.http.post("/tokenize", json={"model": "nobody", "prompt": "a"}), 404, "model_not_found", "", "model"
    )
    assert_error(api.http.post("/detokenize", json={"tokens": [49152]}), 400, None, "0 to 49151", "tokens.0")
    assert_error(
        api.http.post("/tokenize", json={"messages": [{"role": "x", "content": ""}]}), 400, None, "", "messages.0"
    )
