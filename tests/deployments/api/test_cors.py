"""`cors_origins`: web pages of other origins use the API from a browser, with a key, where the server says so."""

from pathlib import Path

import httpx
import pytest

from deployments.auth.keys import KeyStore
from deployments.config import EngineArgs, ServeArgs
from deployments.replica.model import LlamaModel
from tests.deployments.in_process import behind, serving
from training.base_models.resolve import BaseCheckpoint

PAGE = "https://app.example"


def serve_args(base: BaseCheckpoint, folder: Path, *origins: str) -> ServeArgs:
    engine = EngineArgs(max_model_len=128, kv_cache_gib=0.02, num_threads=1)
    return ServeArgs(base_model=str(base.path), registry=str(folder), engine=engine, cors_origins=origins)


@pytest.mark.promise("C7")
def test_pages_of_named_origins_may_use_the_api_with_a_key_and_others_may_not(
    tiny_base: BaseCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    store = KeyStore(tmp_path / "keys.json")
    monkeypatch.setattr("deployments.auth.dependencies.key_store", lambda: store)
    _, key = store.create("page", ("chat",))
    body = {"model": tiny_base.name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    args = serve_args(tiny_base, tmp_path, PAGE)
    model = behind(LlamaModel, args)
    with serving(args, model) as url, httpx.Client(base_url=url, timeout=300) as http:
        asked = http.options("/v1/chat/completions", headers={"origin": PAGE, **preflight})
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == PAGE
        assert "authorization" in asked.headers["access-control-allow-headers"]
        headers = {"origin": PAGE, "authorization": f"Bearer {key}"}
        answer = http.post("/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.headers["access-control-allow-origin"] == PAGE
        refused = http.post("/v1/chat/completions", json=body, headers={"origin": PAGE})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)
        other = http.options("/v1/chat/completions", headers={"origin": "https://evil.example", **preflight})
        assert "access-control-allow-origin" not in other.headers
    args = serve_args(tiny_base, tmp_path)  # off by default
    with serving(args, model) as url:
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=300)
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("origin", ["app.example", "https://app.example/page", "ftp://app.example"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match="cors_origins"):
        ServeArgs(cors_origins=(origin,))
