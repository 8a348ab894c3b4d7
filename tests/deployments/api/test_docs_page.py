"""A4 and C6: /docs shows every route, in a browser that may load nothing from another host."""

from collections.abc import Iterator

import httpx
import pytest

from deployments.config import ServeArgs
from tests.deployments.in_process import serving
from tests.deployments.ui.test_page import CHROMIUM, FLAGS, needs_browser
from training.base_models.resolve import BaseCheckpoint


@pytest.fixture(scope="module")
def url(tiny_base: BaseCheckpoint) -> Iterator[str]:
    """The API without a model behind it."""
    with serving(ServeArgs(base_model=str(tiny_base.path)), None) as url:
        yield url


@pytest.mark.promise("A4")
def test_every_body_and_error_is_typed(url: str) -> None:
    spec = httpx.get(f"{url}/openapi.json").json()
    operations = {
        f"{method.upper()} {path}": operation
        for path, methods in spec["paths"].items()
        for method, operation in methods.items()
    }
    assert operations.keys() >= {
        "POST /v1/chat/completions",
        "POST /v1/completions",
        "POST /v1/responses",
        "GET /v1/responses/{response_id}",
        "DELETE /v1/responses/{response_id}",
        "GET /v1/responses/{response_id}/input_items",
        "POST /v1/responses/{response_id}/cancel",
        "GET /v1/models",
        "GET /v1/models/{model_id}",
        "POST /tokenize",
        "POST /detokenize",
        "GET /v1/adapters",
        "GET /v1/adapters/{name}",
        "POST /v1/adapters/{name}/promote",
        "POST /v1/adapters/{name}/rollback",
        "DELETE /v1/adapters/{name}/versions/{version}",
    }
    for name, operation in operations.items():
        answer = operation["responses"]["200"]["content"]
        if name != "GET /metrics":  # a text
            schema = answer["application/json"]["schema"]
            assert "$ref" in schema or schema.get("type") == "object", name
        if name.startswith("POST") and not name.endswith("/cancel"):
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            assert "$ref" in (schema.get("anyOf") or [schema])[0], name
        errors = {status: answer for status, answer in operation["responses"].items() if status >= "400"}
        assert "default" in errors, name
        assert "422" not in errors, name
        for status, answer in errors.items():
            for content in answer["content"].values():
                assert content["schema"]["$ref"].endswith("/ErrorResponse"), (name, status)


@pytest.mark.promise("C6")
def test_the_page_and_its_files_come_from_here(url: str) -> None:
    page = httpx.get(f"{url}/docs")
    assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
    assert "://" not in page.text
    assert '="/' not in page.text  # a route prefix may come before
    for name in ("swagger-ui.css", "swagger-ui-bundle.js", "favicon.png", "start.js"):
        assert f"docs/{name}" in page.text or name == "start.js"
        file = httpx.get(f"{url}/docs/{name}")
        assert file.status_code == 200
        assert file.headers["x-content-type-options"] == "nosniff"
    for name in ("core.py", "..%2Fcore.py", "%2e%2e", "redoc.standalone.js"):
        assert httpx.get(f"{url}/docs/{name}").status_code == 404
    assert httpx.get(f"{url}/redoc").status_code == 404


@pytest.mark.promise("A4")
@needs_browser
def test_docs_work_in_a_browser(url: str) -> None:
    from playwright.sync_api import sync_playwright

    requests: list[str] = []
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        page = browser.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"{url}/docs")
        page.wait_for_selector(".opblock")
        paths = page.locator(".opblock-summary-path").all_inner_texts()
        browser.close()
    assert any("/v1/chat/completions" in path.replace("\u200b", "") for path in paths)
    assert len(paths) >= 12
    assert [address for address in requests if not address.startswith((f"{url}/", "data:"))] == []
    assert complaints == []
