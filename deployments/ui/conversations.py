"""What happens when somebody sends, stops, retries, undoes or edits on the chat page.

A conversation travels with every event and comes back changed: nothing is kept here but which answer is running in
which browser session. Nothing that a user typed is lost: a message that was not answered goes back to the input box.
"""

import asyncio
import html
import logging
import time
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from typing import Any, Protocol

import gradio as gr
from pydantic import ValidationError
from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import RayServeException
from starlette.requests import HTTPConnection

from deployments.auth.caller import Caller
from deployments.protocol.chat import ChatCompletionRequest, ChatMessage
from deployments.protocol.models import Model
from deployments.ui.sessions import Sessions
from training.errors import CorralError
from training.names import parse_model_id

_SHOW_INTERVAL_S = 0.05  # the page is redrawn at most this often
_MODELS_TIMEOUT_S = 15.0
_ACCOUNT = '<form method="post" action="logout"><span>{}</span> <button>Log out</button></form>'

logger = logging.getLogger("ray.serve")

Turn = dict[str, Any]  # a message of gr.Chatbot: {"role": ..., "content": [{"type": "text", "text": ...}]}
Update = tuple[Any, Any]  # for the conversation and the input box


class Answer(AsyncIterable[str], Protocol):
    """Pieces of an answer."""

    def cancel(self) -> None:
        """End it: the next piece is a `TaskCancelledError`."""


class Backend(Protocol):
    """Where answers come from."""

    api_app: str

    async def models(self) -> list[Model]:
        """The base first, then every adapter version, newest first."""

    def chat(self, request: ChatCompletionRequest, caller: Caller) -> Answer:
        """Ask in the name of `caller`; errors come with the first piece or later ones."""


class Conversations:
    """The page's events. `settings` is always model, system prompt, then the five sliders from the top; Gradio puts
    in `event` and `request` by their types."""

    def __init__(self, backend: Backend, sessions: Sessions) -> None:
        self._backend = backend
        self._sessions = sessions
        self._running: dict[str, Answer] = {}  # browser session -> its answer's stream

    async def send(
        self, request: gr.Request, message: str, history: list[Turn], *settings: Any
    ) -> AsyncIterator[Update]:
        """Submit or Enter: what is in the input box is asked."""
        if not message.strip():
            yield gr.skip(), gr.skip()
            return
        async for update in self._ask(history, message, history, "", settings, request):
            yield update

    async def example(
        self, event: gr.SelectData, request: gr.Request, draft: str, *settings: Any
    ) -> AsyncIterator[Update]:
        """An example was clicked, which is possible only while the conversation is empty."""
        async for update in self._ask([], event.value["text"], [], draft, settings, request):
            yield update

    async def retry(
        self, event: gr.RetryData, request: gr.Request, draft: str, history: list[Turn], *settings: Any
    ) -> AsyncIterator[Update]:
        """Ask the same question again; the answer it had stays if there is no new one."""
        asked = _last_question(history, event.index)
        async for update in self._ask(history[:asked], text_of(history[asked]), history, draft, settings, request):
            yield update

    async def edit(
        self, event: gr.EditData, request: gr.Request, draft: str, history: list[Turn], *settings: Any
    ) -> AsyncIterator[Update]:
        """Ask in other words; what came after the edited message is dropped once there is an answer."""
        edited = _index(event.index)
        before = [*history[:edited], _turn("user", event.previous_value), *history[edited + 1 :]]
        async for update in self._ask(history[:edited], event.value, before, draft, settings, request):
            yield update

    async def stop(self, request: gr.Request) -> None:
        """End the running answer and keep what there is of it."""
        if (answer := self._running.get(_session(request))) is not None:
            answer.cancel()

    async def undo(self, event: gr.UndoData, request: gr.Request, draft: str, history: list[Turn]) -> Update:
        """Take the last question back into the input box."""
        self._abandon(request)
        asked = _last_question(history, event.index)
        return history[:asked], _idle_box(_joined(text_of(history[asked]), draft))

    async def clear(self, request: gr.Request) -> Update:
        """An empty conversation; the input box is left alone."""
        self._abandon(request)
        return [], _idle_box()

    async def leave(self, request: gr.Request) -> None:
        """The browser went away."""
        self._abandon(request)

    async def refresh(self, chosen: str | None) -> Any:
        """The model picker with what is served now; the choice stays if it still exists."""
        try:
            choices = model_choices(await asyncio.wait_for(self._backend.models(), _MODELS_TIMEOUT_S))
        except Exception as error:
            self._warn(error)
            return gr.skip()
        values = [value for _, value in choices]
        if chosen is not None and chosen not in values:
            gr.Info(html.escape(f"{chosen} is not served any more: {values[0]} is chosen instead"))
        return gr.Dropdown(choices=choices, value=chosen if chosen in values else values[0])

    async def account(self, request: gr.Request) -> Any:
        """Whose key it is, and the way out; nothing where nobody needs a key."""
        caller = await self._sessions.caller(_http(request))
        return (
            gr.skip() if caller.key_id is None else gr.Markdown(_ACCOUNT.format(html.escape(caller.name)), visible=True)
        )

    async def _ask(
        self,
        earlier: list[Turn],
        text: str,
        before: list[Turn],
        draft: str,
        settings: Sequence[Any],
        request: gr.Request,
    ) -> AsyncIterator[Update]:
        """Ask `text` after the turns `earlier`; without an answer the page is `before` again, `text` in the box."""
        session = _session(request)
        self._abandon(request)
        asked = [*earlier, _turn("user", text)]
        yield asked, gr.Textbox(value=draft, submit_btn=False, stop_btn=True)
        answer, shown_at = "", 0.0
        stream: Answer | None = None
        try:
            caller = await self._sessions.caller(_http(request))
            stream = self._running[session] = self._backend.chat(_completion_request(session, asked, *settings), caller)
            async for piece in stream:
                answer += piece
                if answer.strip() and time.monotonic() - shown_at >= _SHOW_INTERVAL_S:
                    shown_at = time.monotonic()
                    yield [*asked, _turn("assistant", answer)], gr.skip()
            if not answer.strip():
                gr.Info("The model ended its answer before the first word: send again or change the message.")
        except TaskCancelledError:
            pass
        except Exception as error:
            self._warn(error)
        finally:
            if stream is not None:
                stream.cancel()
            abandoned = stream is not None and self._running.get(session) is not stream
            if not abandoned:
                self._running.pop(session, None)
        if abandoned:
            yield gr.skip(), gr.skip()  # the page belongs to a later event
        elif answer.strip():
            yield [*asked, _turn("assistant", answer)], _idle_box()
        else:
            yield before, _idle_box(_joined(text, draft))

    def _abandon(self, request: gr.Request) -> None:
        if (answer := self._running.pop(_session(request), None)) is not None:
            answer.cancel()

    def _warn(self, error: Exception) -> None:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, CorralError):
            message = str(cause)
        elif isinstance(cause, ValidationError):
            first = cause.errors()[0]
            message = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        elif isinstance(cause, RayServeException | RayActorError | TimeoutError):
            logger.warning("application %r did not answer: %s", self._backend.api_app, cause)
            message = f"The API application {self._backend.api_app!r} does not answer now: try again in a moment."
        else:
            logger.error("an answer failed", exc_info=error)
            message = "Something failed on the server: its log has the cause."
        gr.Warning(html.escape(message), duration=15)  # seconds


def model_choices(models: list[Model]) -> list[tuple[str, str]]:
    """(label, model id) of the base, then of each adapter by name alone and by version."""
    choices = [(f"{model.id} (base)", model.id) for model in models if model.version is None]
    by_name: dict[str, list[Model]] = {}
    for model in models:
        if model.version is not None:
            by_name.setdefault(model.root, []).append(model)
    for name, versions in by_name.items():
        champion = next((model for model in versions if "champion" in model.aliases), None)
        meant = champion or max(versions, key=lambda model: model.version or 0)
        why = "champion" if champion else "newest"
        choices.append((f"{name} → version {meant.version}, {why}", str(parse_model_id(f"{meant.parent}:{name}"))))
        for model in versions:
            aliases = f" ({', '.join(model.aliases)})" if model.aliases else ""
            choices.append((f"{name}, version {model.version}{aliases}", model.id))
    return choices


def text_of(turn: Turn) -> str:
    """The text of a turn, whichever of Gradio's shapes it has."""
    content = turn["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")


def _completion_request(
    session: str,
    turns: list[Turn],
    model: str | None,
    system: str,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    repetition_penalty: float,
) -> ChatCompletionRequest:
    messages = [ChatMessage(role="system", content=system)] if system.strip() else []
    messages += [ChatMessage(role=turn["role"], content=text_of(turn)) for turn in turns]
    if not model:
        raise CorralError("No model is chosen: press the refresh button beside the list, then choose one.")
    return ChatCompletionRequest(
        model=model,
        messages=messages,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        stream=True,
        user=session,  # a canary answers all of a page's questions or none
    )


def _turn(role: str, text: str) -> Turn:
    """A turn in the one shape that Gradio shows unchanged: of a bare string it rewrites the whitespace."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _idle_box(text: str | None = None) -> gr.Textbox:
    if text is None:
        return gr.Textbox(submit_btn=True, stop_btn=False)
    return gr.Textbox(value=text, submit_btn=True, stop_btn=False)


def _joined(text: str, draft: str) -> str:
    return f"{text}\n{draft}" if draft.strip() else text


def _index(index: int | Sequence[int]) -> int:
    return index if isinstance(index, int) else index[0]


def _last_question(history: list[Turn], index: int | Sequence[int]) -> int:
    """Where the user's last message at or before `index` is."""
    return max(i for i in range(_index(index) + 1) if history[i]["role"] == "user")


def _http(request: gr.Request) -> HTTPConnection:
    """The HTTP request that brought the event."""
    assert request.request is not None
    return request.request


def _session(request: gr.Request) -> str:
    assert request.session_hash is not None
    return request.session_hash
