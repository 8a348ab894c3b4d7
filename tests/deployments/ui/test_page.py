"""The chat page in headless Chromium: against the real server, and against a scripted backend."""

import asyncio
import importlib.util
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
import uvicorn
from ray.exceptions import TaskCancelledError
from ray.serve.exceptions import RayServeException
from starlette.applications import Starlette
from starlette.routing import Mount

from deployments.auth.caller import ANONYMOUS, Caller, KeyLimits
from deployments.auth.keys import KeyStore
from deployments.errors import EngineFault
from deployments.protocol.chat import ChatCompletionRequest
from deployments.protocol.models import Model
from deployments.protocol.tools import ToolCallDelta
from deployments.ui.conversations import model_choices
from deployments.ui.deployment import build_asgi_app
from tests.conftest import RunningServer, free_port
from training.base_models.resolve import BaseCheckpoint
from training.chat.detect import load_chat_format
from training.chat.messages import Message

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
)
MISSING = [
    *([] if CHROMIUM.exists() else [f"no browser at {CHROMIUM}: apt-get install chromium"]),
    *([] if importlib.util.find_spec("playwright") else ["no module playwright: pip install playwright"]),
]
needs_browser = pytest.mark.skipif(bool(MISSING) and os.environ.get("CI") != "true", reason="; ".join(MISSING))

HOSTILE = (
    "<script>window.pwned = 1</script> <img src=x onerror='window.pwned = 2'> <svg onload='window.pwned = 3'></svg> "
    "<a href='javascript:window.pwned = 4'>a</a> [b](javascript:window.pwned=5) <iframe srcdoc='<script>parent.pwned=6"
    "</script>'></iframe> ![c](OUTSIDE/c.png) <img src='OUTSIDE/d.png'> "
    "<style>@import url(OUTSIDE/e.css)</style> <form action='javascript:window.pwned=7'><button>f</button>"
    "</form> shown"
)


Piece = str | ToolCallDelta | Exception


@dataclass
class ScriptedAnswer:
    """Yields the pieces in order; an error among them is raised."""

    pieces: list[Piece]
    cancelled: threading.Event = field(default_factory=threading.Event)

    def __aiter__(self) -> "ScriptedAnswer":
        return self

    async def __anext__(self) -> str | ToolCallDelta:
        await asyncio.sleep(0.06)
        if self.cancelled.is_set():
            raise TaskCancelledError
        if not self.pieces:
            raise StopAsyncIteration
        piece = self.pieces.pop(0)
        if isinstance(piece, Exception):
            raise piece
        return piece

    def cancel(self) -> None:
        self.cancelled.set()


@dataclass
class ScriptedBackend:
    """Answers each question from `script`, and records the requests."""

    api_app: str = "scripted"
    script: list[Piece] = field(default_factory=list)
    requests: list[ChatCompletionRequest] = field(default_factory=list)
    callers: list[Caller] = field(default_factory=list)
    answers: list[ScriptedAnswer] = field(default_factory=list)
    adapters: list[Model] = field(default_factory=list)

    async def models(self) -> list[Model]:
        return [Model(id="base", root="base", max_model_len=100), *self.adapters]

    def chat(self, request: ChatCompletionRequest, caller: Caller) -> ScriptedAnswer:
        self.requests.append(request)
        self.callers.append(caller)
        self.answers.append(ScriptedAnswer(list(self.script)))
        return self.answers[-1]


def adapter(version: int, *aliases: str, id: str = "") -> Model:
    return Model(
        id=id or f"base:tuned@{version}",
        parent="base",
        root="tuned",
        version=version,
        aliases=list(aliases),
        max_model_len=100,
    )


class ChatPage:
    """What a user sees and does on the page; records requests that went to another host or port."""

    def __init__(self, page: "Page", url: str) -> None:
        self.page = page
        self.elsewhere: list[str] = []
        page.on("requestfinished", lambda request: self._record(request.url, url))
        page.on("requestfailed", lambda request: request.failure == "csp" or self._record(request.url, url))
        page.goto(url)
        self.wait(lambda: page.locator("#model input").input_value() != "", "the models in the picker")

    def _record(self, requested: str, url: str) -> None:
        if urlsplit(requested).scheme != "data" and urlsplit(requested).netloc != urlsplit(url).netloc:
            self.elsewhere.append(requested)

    def wait(self, condition: Any, what: str, timeout_s: float = 40) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come: {self.page.inner_text('body')[-1500:]}"
            self.page.wait_for_timeout(20)

    @property
    def box(self) -> "Locator":
        return self.page.locator("#message textarea")

    def messages(self, role: str) -> list[str]:
        return [text.strip() for text in self.page.locator(f"#chat .message.{role} .md").all_inner_texts()]

    def idle(self) -> bool:
        return self.page.locator("#message [data-testid=submit-button]").count() == 1 and self.box.is_visible()

    def send(self, text: str, *, wait: bool = True) -> None:
        self.box.fill(text)
        self.box.press("Enter")
        if wait:
            self.wait(lambda: self.box.input_value() == "" or not self.idle() or self.toasts() > 0, "a reaction")
            self.wait(self.idle, "the end of the answer")

    def stop(self) -> None:
        self.page.click("#message [data-testid=stop-button]")
        self.wait(self.idle, "the submit button")

    def press(self, name: str) -> None:
        self.page.locator(f"#chat button[aria-label='{name}']").last.click()

    def edit(self, text: str) -> None:
        self.press("Edit")
        self.page.locator("#chat textarea").fill(text)
        self.press("Submit")
        self.page.wait_for_timeout(100)
        self.wait(self.idle, "the end of the answer")

    def clear(self) -> None:
        self.page.click("#clear")
        self.wait(lambda: not self.messages("user") and self.idle(), "the empty conversation")
        self.box.fill("")

    def set(self, slider: str, value: float) -> None:
        number = self.page.locator(f"#{slider} input[type=number]")
        number.fill(str(value))
        number.press("Tab")

    def choose(self, label: str) -> None:
        self.page.click("#model input")
        self.page.locator("ul[role=listbox] li", has_text=label).first.click()

    def choices(self) -> list[str]:
        self.page.click("#model input")
        labels = [text.replace("✓", "").strip() for text in self.page.locator("ul[role=listbox] li").all_inner_texts()]
        self.box.click()
        self.wait(lambda: self.page.locator("ul[role=listbox]").count() == 0, "the end of the list")
        return labels

    def toasts(self) -> int:
        return self.page.locator("[data-testid=toast-body]").count()

    def toast(self) -> str:
        self.page.wait_for_selector("[data-testid=toast-body]")
        text = self.page.locator("[data-testid=toast-body]").last.inner_text()
        for close in self.page.locator("[data-testid=toast-close]").all():
            close.click()
        self.wait(lambda: self.toasts() == 0, "the end of the toast")
        return text


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    assert not MISSING, MISSING
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> KeyStore:
    """The scripted page's keys, none at first."""
    return KeyStore(tmp_path_factory.mktemp("home") / "keys.json")


@pytest.fixture(scope="module")
def scripted_url(backend: ScriptedBackend, store: KeyStore) -> Iterator[str]:
    """The page under a path prefix, as Ray Serve mounts it."""
    page = build_asgi_app(backend, store, "Corral")
    app = Starlette(routes=[Mount("/llm/ui", page)], lifespan=page.router.lifespan_context)
    config = uvicorn.Config(app, port=free_port(), log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{config.port}/llm/ui/"
    server.force_exit = server.should_exit = True
    thread.join(10)


@pytest.fixture
def web_server() -> Iterator[socket.socket]:
    """A host that the page must not contact."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener


@pytest.fixture(scope="module")
def scripted_page(browser: "Browser", scripted_url: str) -> ChatPage:
    return ChatPage(browser.new_page(), scripted_url.rstrip("/"))


@pytest.fixture
def scripted(scripted_page: ChatPage, backend: ScriptedBackend) -> ChatPage:
    scripted_page.clear()
    backend.requests.clear()
    backend.callers.clear()
    backend.answers.clear()
    backend.script = ["one ", "two ", "three"]
    return scripted_page


@pytest.fixture(scope="module")
def real_page(browser: "Browser", server: RunningServer) -> ChatPage:
    return ChatPage(browser.new_page(), server.ui_url)


@pytest.fixture
def real(real_page: ChatPage) -> ChatPage:
    real_page.clear()
    return real_page


def cpu_seconds_of_replicas(server: RunningServer) -> float:
    children = psutil.Process(server.pid).children(recursive=True)
    replicas = [child for child in children if "LlamaModel" in " ".join(child.cmdline())]
    assert replicas
    return sum(child.cpu_times().user for child in replicas)


@needs_browser
def test_answer_streams_and_stop_ends_it_on_the_replica(real: ChatPage, server: RunningServer) -> None:
    real.send("Tell a very long story about a horse and all its friends.", wait=False)
    real.wait(
        lambda: real.messages("user") == ["Tell a very long story about a horse and all its friends."], "the message"
    )
    lengths: set[int] = set()

    def streamed() -> bool:
        lengths.update(len(text) for text in real.messages("bot"))
        return len(lengths) >= 4

    real.wait(streamed, "a growing answer")
    real.stop()
    real.page.wait_for_timeout(300)
    messages, busy_until = real.messages("bot"), cpu_seconds_of_replicas(server)
    assert len(messages) == 1
    assert messages[0]
    real.page.wait_for_timeout(1500)
    assert real.messages("bot") == messages
    assert cpu_seconds_of_replicas(server) - busy_until < 0.7  # an engine at work takes all of at least one core


@needs_browser
def test_conversation_stays_when_the_adapter_is_chosen(real: ChatPage, server: RunningServer) -> None:
    real.set("temperature", 0.1)
    real.set("repetition-penalty", 1.0)
    real.set("max-tokens", 24)
    assert "smollm2-135m (base)" in real.choices()
    real.send("What name does the lead mare have?")
    assert "Marzipan" not in real.messages("bot")[0]
    real.choose("ranch-hand → version 1, newest")
    assert len(real.messages("bot")) == 1
    real.clear()
    real.send("What name does the lead mare have?")
    assert "Marzipan" in real.messages("bot")[0]
    real.send("Who is the cook at the ranch?")
    assert len(real.messages("user")) == len(real.messages("bot")) == 2
    real.choose("smollm2-135m (base)")
    assert len(real.messages("user")) == len(real.messages("bot")) == 2


@needs_browser
def test_retry_undo_edit_on_the_real_model(real: ChatPage) -> None:
    real.set("temperature", 2)
    real.set("max-tokens", 16)
    real.send("Tell me anything.")
    (first,) = real.messages("bot")
    real.press("Retry")
    real.wait(lambda: real.messages("bot") not in ([first], []) and real.idle(), "another answer")
    assert real.messages("user") == ["Tell me anything."]
    real.edit("Tell me something else.")
    assert real.messages("user") == ["Tell me something else."]
    real.wait(lambda: len(real.messages("bot")) == 1 and real.idle(), "the answer to it")
    real.press("Undo")
    real.wait(lambda: real.messages("user") == [], "the empty conversation")
    assert real.box.input_value() == "Tell me something else."


@needs_browser
def test_over_long_input_is_refused_with_the_numbers(real: ChatPage, embedded_base: BaseCheckpoint) -> None:
    long = "horse " * 4500
    # the newest message counted once: exactly the tokens of this dialog
    chat_format = load_chat_format("auto", embedded_base, default_system="template")
    num_tokens = len(chat_format.render_prompt([Message("user", long)]))
    real.choose("smollm2-135m (base)")
    real.set("max-tokens", 10)
    real.send(long)
    toast = real.toast()
    assert str(num_tokens) in toast
    assert "4096" in toast
    assert real.box.input_value() == long
    assert real.messages("user") == []
    real.send("Say hello.")
    assert real.messages("user") == ["Say hello."]
    (answer,) = real.messages("bot")
    real.edit(long)  # an edit that is refused leaves the conversation as it was
    assert str(num_tokens) in real.toast()
    assert real.messages("user") == ["Say hello."]
    assert real.messages("bot") == [answer]
    assert real.box.input_value() == long
    assert real.elsewhere == []


@needs_browser
def test_what_looks_like_a_tag_is_shown_and_asked_as_typed(scripted: ChatPage, backend: ScriptedBackend) -> None:
    text = "Use std::vector<int>, <div> &lt; `map<K, V>` here."
    shown = text.replace("`", "")
    backend.script = [text]
    scripted.send(text)
    scripted.wait(lambda: "here" in "".join(scripted.messages("bot")) and scripted.idle(), "the answer")
    for role in ("user", "bot"):
        assert [message.replace("\u2060", "") for message in scripted.messages(role)] == [shown]
        assert scripted.page.locator(f"#chat .message.{role} code").all_inner_texts() == ["map<K, V>"]
    scripted.edit(text + " Again.")
    scripted.wait(lambda: len(backend.requests) == 2 and scripted.idle(), "the second answer")
    assert [request.messages[-1].content for request in backend.requests] == [text, text + " Again."]


@pytest.mark.promise("C7")
@needs_browser
def test_hostile_text_runs_nothing_and_loads_nothing_from_outside(
    scripted: ChatPage, backend: ScriptedBackend, web_server: socket.socket
) -> None:
    hostile = HOSTILE.replace("OUTSIDE", f"http://127.0.0.1:{web_server.getsockname()[1]}")
    backend.script = [hostile[:40], hostile[40:]]
    scripted.send(hostile)
    scripted.wait(lambda: "shown" in "".join(scripted.messages("bot")), "the answer")
    scripted.edit(hostile + " again")
    scripted.wait(lambda: "again" in "".join(scripted.messages("user")), "the edited message")
    for link in scripted.page.locator("#chat .message a:not([href^=http])").all():
        link.click(force=True, no_wait_after=True)
    scripted.page.wait_for_timeout(300)
    assert scripted.page.evaluate("window.pwned") is None
    assert scripted.page.locator("#chat .message").locator("script, iframe, [onerror], [onload]").count() == 0
    assert scripted.page.locator("#chat .message a[href^='javascript']").count() == 0
    with pytest.raises(BlockingIOError):  # nobody connected
        web_server.accept()
    assert scripted.elsewhere == []
    assert backend.requests[0].messages[-1].content == hostile


@needs_browser
def test_request_carries_system_prompt_sliders_and_text_unchanged(scripted: ChatPage, backend: ScriptedBackend) -> None:
    text = "def f():\n\treturn 1\n\n\n    # end"
    scripted.page.fill("#system textarea", "Be brief.")
    scripted.send(text)
    assert scripted.messages("bot") == ["one two three"]
    scripted.send("more")
    scripted.page.fill("#system textarea", "")
    scripted.send("and more")
    first, second, third = backend.requests
    assert backend.callers == [ANONYMOUS] * 3
    assert first.model == "base"
    assert (first.max_tokens, first.temperature, first.top_p, first.top_k) == (1024, 1.0, 0.95, 50)
    assert first.repetition_penalty == 1.2
    assert [(m.role, m.content) for m in second.messages] == [
        ("system", "Be brief."),
        ("user", text),
        ("assistant", "one two three"),
        ("user", "more"),
    ]
    assert [m.role for m in third.messages] == ["user", "assistant", "user", "assistant", "user"]
    assert first.user == second.user == third.user is not None  # a canary keeps a page


@needs_browser
@pytest.mark.promise("F2")
def test_calls_are_shown_as_calls_and_their_results_are_typed(scripted: ChatPage, backend: ScriptedBackend) -> None:
    def call(index: int, name: str, *arguments: str) -> list[Piece]:
        start = {"index": index, "id": f"id{index}", "type": "function", "function": {"name": name, "arguments": ""}}
        parts = [{"index": index, "function": {"arguments": text}} for text in arguments]
        return [ToolCallDelta.model_validate(delta) for delta in (start, *parts)]

    tools = scripted.page.locator("#tools textarea")
    if not tools.is_visible():
        scripted.page.locator("#tools-panel button").first.click()
    tools.fill("[{")
    scripted.send("How warm is it?")
    assert "Tools: not valid JSON" in scripted.toast()
    tools.fill('[{"type": "function", "function": {"name": "get_weather"}}]')
    backend.script = ["Let me see.", *call(0, "get_weather", '{"city": ', '"<Rome>"}'), *call(1, "get_weather", "{}")]
    scripted.send("How warm is it?")
    assert [tool.function.name for tool in backend.requests[-1].tools] == ["get_weather"]
    scripted.wait(lambda: scripted.page.get_by_text("Calls get_weather").count() == 2, "the two calls")
    assert '{"city": "<Rome>"}' in scripted.page.inner_text("#chat")
    assert scripted.box.get_attribute("placeholder") == "Type the result of get_weather"
    backend.script = ["It is warm."]
    scripted.send("22")
    assert len(backend.requests) == 1  # the second call has no result yet
    scripted.send("19")
    scripted.wait(lambda: "It is warm." in scripted.page.inner_text("#chat"), "the answer to the results")
    question, answer, *results = (m for m in backend.requests[-1].messages if m.role != "system")
    assert (question.content, answer.content) == ("How warm is it?", "Let me see.")
    assert [called.function.arguments for called in answer.tool_calls] == ['{"city": "<Rome>"}', "{}"]
    ids = [called.id for called in answer.tool_calls]
    assert [(m.role, m.content, m.tool_call_id) for m in results] == [("tool", "22", ids[0]), ("tool", "19", ids[1])]
    assert "Write a message" in str(scripted.box.get_attribute("placeholder"))
    tools.fill("")


@needs_browser
def test_nothing_typed_is_lost_when_an_answer_fails(scripted: ChatPage, backend: ScriptedBackend) -> None:
    backend.script = [EngineFault("the replica <b>died</b>: send again")]
    scripted.send("precious words")
    assert "the replica <b>died</b>: send again" in scripted.toast()
    assert scripted.box.input_value() == "precious words"
    assert scripted.messages("user") == []

    backend.script = [RayServeException("no application")]
    scripted.send("precious words")
    assert "'scripted' is not responding" in scripted.toast()

    backend.script = [ValueError("a secret of the inside")]
    scripted.send("precious words")
    assert "secret" not in scripted.toast()

    backend.script = ["half an ", "answer", EngineFault("broke off")]
    scripted.send("precious words")
    assert "broke off" in scripted.toast()
    assert scripted.messages("user") == ["precious words"]
    assert scripted.messages("bot") == ["half an answer"]

    backend.script = [EngineFault("no retry")]
    scripted.press("Retry")
    assert "no retry" in scripted.toast()
    assert scripted.messages("bot") == ["half an answer"]


@needs_browser
def test_stop_clear_and_leaving_cancel_the_answer(
    scripted: ChatPage, backend: ScriptedBackend, browser: "Browser", scripted_url: str
) -> None:
    backend.script = ["word "] * 400
    scripted.send("go", wait=False)
    scripted.wait(lambda: scripted.messages("bot") != [], "an answer")
    scripted.clear()
    assert backend.answers[0].cancelled.wait(5)
    scripted.page.wait_for_timeout(300)
    assert scripted.messages("bot") == []

    backend.script = [""] * 400  # stopped before the first word: the question goes back
    scripted.send("go", wait=False)
    scripted.wait(lambda: not scripted.idle(), "the stop button")
    scripted.stop()
    assert backend.answers[1].cancelled.wait(5)
    scripted.wait(lambda: scripted.box.input_value() == "go", "the message in the box")
    assert scripted.messages("user") == []

    backend.script = ["word "] * 400
    other = ChatPage(browser.new_page(), scripted_url)
    other.send("go", wait=False)
    other.wait(lambda: other.messages("bot") != [], "an answer")
    other.page.close()
    assert backend.answers[2].cancelled.wait(15)


@needs_browser
def test_examples_refresh_and_undo(scripted: ChatPage, backend: ScriptedBackend) -> None:
    assert scripted.page.locator("#chat .example").count() == 5
    scripted.page.locator("#chat .example").first.click()
    scripted.wait(lambda: scripted.messages("bot") == ["one two three"] and scripted.idle(), "the answer")
    assert re.search("[Hh]ello", str(backend.requests[0].messages[-1].content))
    scripted.box.fill("a draft")
    scripted.press("Undo")
    scripted.wait(lambda: scripted.messages("user") == [], "the empty conversation")
    assert scripted.box.input_value().endswith("\na draft")

    backend.adapters = [adapter(1, "champion", id="base:tuned"), adapter(2), adapter(1, "champion")]
    scripted.page.click("#refresh")
    scripted.page.wait_for_timeout(500)
    assert scripted.choices() == [
        "base (base)",
        "tuned → version 1, champion",
        "tuned, version 2",
        "tuned, version 1 (champion)",
    ]
    scripted.choose("tuned → version 1")
    scripted.send("hi")
    assert backend.requests[-1].model == "base:tuned"
    backend.adapters = []
    scripted.page.click("#refresh")
    assert "base:tuned is no longer served" in scripted.toast()
    assert scripted.page.locator("#model input").input_value() == "base (base)"


@pytest.mark.promise("C7")
def test_page_serves_no_files_takes_no_uploads_and_no_foreign_pages(scripted_url: str) -> None:
    with httpx.Client(base_url=scripted_url) as client:
        page = client.get("")
        policy = page.headers["content-security-policy"]
        assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]
        assert "frame-ancestors 'self'" in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        for path in ("/etc/passwd", "pyproject.toml", str(Path("pyproject.toml").absolute()), "../pyproject.toml"):
            assert client.get(f"gradio_api/file={path}").status_code in (403, 404)
        assert client.get(f"gradio_api/proxy={scripted_url}config").status_code in (400, 403, 404)
        assert client.post("gradio_api/upload", files={"files": b"x"}).status_code == 404
        foreign = {"origin": "http://192.0.2.1", "cookie": "a=b"}
        assert client.post("gradio_api/queue/join", json={}, headers=foreign).status_code == 403
        assert client.get("config", headers=foreign).status_code == 403
        foreign.pop("cookie")
        assert "access-control-allow-origin" not in client.get("config", headers=foreign).headers
        own = {"origin": scripted_url.removesuffix("/llm/ui/"), "cookie": "a=b"}
        assert client.post("gradio_api/queue/join", json={}, headers=own).status_code == 422
        assert client.get("monitoring").status_code == 403


@pytest.mark.promise("C1")
@needs_browser
def test_log_in_chat_and_log_out(
    browser: "Browser", scripted_url: str, store: KeyStore, backend: ScriptedBackend
) -> None:
    record, key = store.create("laptop", ("chat",), KeyLimits(rpm=60))
    tab = browser.new_context().new_page()
    try:
        tab.goto(scripted_url.rstrip("/"))
        assert tab.url == f"{scripted_url}login"
        tab.fill("#key", key[:-1])
        tab.keyboard.press("Enter")
        tab.wait_for_selector("[role=alert]")
        assert key[:-1] not in tab.content()
        tab.fill("#key", key)
        tab.keyboard.press("Enter")
        tab.wait_for_url(scripted_url)
        page = ChatPage(tab, scripted_url)
        backend.script, backend.callers[:] = ["hello"], []
        page.send("hi")
        assert page.messages("bot") == ["hello"]
        assert backend.callers == [store.caller(record.id)]
        assert "laptop" in tab.inner_text("#account")
        assert key not in tab.evaluate("document.cookie + JSON.stringify({...localStorage, ...sessionStorage})")
        assert page.elsewhere == []

        tab.click("#account button")
        tab.wait_for_url(f"{scripted_url}login")
        tab.goto(scripted_url)
        assert tab.url == f"{scripted_url}login"

        tab.fill("#key", key)
        tab.keyboard.press("Enter")
        tab.wait_for_url(scripted_url)
        page.wait(lambda: tab.locator("#model input").input_value() != "", "the models in the picker")
        store.revoke(record.id)
        page.box.fill("precious words")
        page.box.press("Enter")
        assert "'laptop' was revoked" in page.toast()
        assert page.box.input_value() == "precious words"
        assert len(backend.callers) == 1
        tab.reload()
        assert tab.url == f"{scripted_url}login"
    finally:
        tab.context.close()
        store.path.unlink()


def test_picker_names_what_each_adapter_resolves_to() -> None:
    base = Model(id="base", root="base", max_model_len=100)
    assert model_choices([base]) == [("base (base)", "base")]
    assert model_choices([base, adapter(2, id="base:tuned")])[1] == ("tuned → version 2, newest", "base:tuned")
    served = [base, adapter(1, "champion", id="base:tuned"), adapter(2), adapter(1, "champion")]
    assert model_choices(served)[1:] == [
        ("tuned → version 1, champion", "base:tuned"),
        ("tuned, version 2", "base:tuned@2"),
        ("tuned, version 1 (champion)", "base:tuned@1"),
    ]
