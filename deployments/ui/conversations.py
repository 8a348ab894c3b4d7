"""Event handlers of the chat page: send, stop, retry, undo, edit.

Every event carries the conversation and returns it changed, so the only state here is which completion runs in which
browser session. User input is never lost: a message without a reply goes back to the input box.
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
from deployments.protocol.tools import ToolCallDelta
from deployments.ui.plain_text import typed
from deployments.ui.sessions import Sessions
from deployments.ui.turns import Reply, Turn, call_without_result, read_tools, text_of, to_messages, turn
from training.errors import CorralError

PLACEHOLDER = "Write a message; Shift+Enter for a new line"
_REDRAW_INTERVAL_S = 0.05  # minimum time between two updates of the page
_MODELS_TIMEOUT_S = 15.0
_ACCOUNT = '<form method="post" action="logout"><span>{}</span> <button>Log out</button></form>'

logger = logging.getLogger("ray.serve")

Update = tuple[Any, Any]  # for the conversation and the input box


class AnswerStream(AsyncIterable[str | ToolCallDelta], Protocol):
    """The text and calls of a completion while it is generated."""

    def cancel(self) -> None:
        """Stop the generation: iterating further raises `TaskCancelledError`."""


class Backend(Protocol):
    """The API as the chat page uses it."""

    api_app: str

    async def models(self) -> list[Model]:
        """The base model first, then each adapter: itself, and its versions, newest first."""

    def chat(self, request: ChatCompletionRequest, caller: Caller) -> AnswerStream:
        """Start a completion on behalf of `caller`; errors are raised while iterating over the stream."""


class Conversations:
    """Handlers of the page's events.

    `settings` is always the model, the system prompt, the tools, then the five sliders from top to bottom. Gradio
    passes `event` and `request` by their types.
    """

    def __init__(self, backend: Backend, sessions: Sessions) -> None:
        self._backend = backend
        self._sessions = sessions
        self._running: dict[str, AnswerStream] = {}  # browser session -> its running completion

    async def send(
        self, request: gr.Request, message: str, history: list[Turn], *settings: Any
    ) -> AsyncIterator[Update]:
        """Submit or Enter: send the text of the input box."""
        if not message.strip():
            yield gr.skip(), gr.skip()
            return
        async for update in self._ask(history, message, history, "", settings, request):
            yield update

    async def example(
        self, event: gr.SelectData, request: gr.Request, draft: str, *settings: Any
    ) -> AsyncIterator[Update]:
        """Send a clicked example, which is possible only while the conversation is empty."""
        async for update in self._ask([], event.value["text"], [], draft, settings, request):
            yield update

    async def retry(
        self, event: gr.RetryData, request: gr.Request, draft: str, history: list[Turn], *settings: Any
    ) -> AsyncIterator[Update]:
        """Send the same question again; the old reply stays if there is no new one."""
        question = _last_question(history, event.index)
        text = text_of(history[question])
        async for update in self._ask(history[:question], text, history, draft, settings, request):
            yield update

    async def edit(
        self, event: gr.EditData, request: gr.Request, draft: str, history: list[Turn], *settings: Any
    ) -> AsyncIterator[Update]:
        """Send an edited message; the turns after it are dropped once there is a reply."""
        edited = _index(event.index)
        previous = [*history[:edited], turn("user", typed(event.previous_value)), *history[edited + 1 :]]
        async for update in self._ask(history[:edited], typed(event.value), previous, draft, settings, request):
            yield update

    async def stop(self, request: gr.Request) -> None:
        """Stop the running completion and keep its text so far."""
        if (stream := self._running.get(_session(request))) is not None:
            stream.cancel()

    async def undo(self, event: gr.UndoData, request: gr.Request, draft: str, history: list[Turn]) -> Update:
        """Move the last question back to the input box."""
        self._cancel_running(request)
        question = _last_question(history, event.index)
        return history[:question], _idle_box(_with_draft(text_of(history[question]), draft), history[:question])

    async def clear(self, request: gr.Request) -> Update:
        """Empty the conversation, but not the input box."""
        self._cancel_running(request)
        return [], _idle_box()

    async def leave(self, request: gr.Request) -> None:
        """The page was closed."""
        self._cancel_running(request)

    async def refresh(self, selected: str | None) -> Any:
        """Update the model picker; the selected model stays selected if it is still served."""
        try:
            choices = model_choices(await asyncio.wait_for(self._backend.models(), _MODELS_TIMEOUT_S))
        except Exception as error:
            self._warn(error)
            return gr.skip()
        values = [value for _, value in choices]
        if selected is not None and selected not in values:
            gr.Info(html.escape(f"{selected} is no longer served: {values[0]} is selected instead"))
        return gr.Dropdown(choices=choices, value=selected if selected in values else values[0])

    async def account(self, request: gr.Request) -> Any:
        """Show the name of the user's key and the logout button; nothing on a server without keys."""
        caller = await self._sessions.caller(_http(request))
        return (
            gr.skip() if caller.key_id is None else gr.Markdown(_ACCOUNT.format(html.escape(caller.name)), visible=True)
        )

    async def _ask(
        self,
        context: list[Turn],
        text: str,
        previous: list[Turn],
        draft: str,
        settings: Sequence[Any],
        request: gr.Request,
    ) -> AsyncIterator[Update]:
        """Send `text` after the turns `context`; without a reply, show `previous` again and put `text` in the box."""
        session = _session(request)
        self._cancel_running(request)
        turns = [*context, turn("user", text)]
        if call_without_result(turns) is not None:  # each call needs one before the model goes on
            yield turns, _idle_box(draft, turns)
            return
        yield turns, gr.Textbox(value=draft, submit_btn=False, stop_btn=True)
        reply, drawn_at = Reply(), 0.0
        stream: AnswerStream | None = None
        try:
            caller = await self._sessions.caller(_http(request))
            stream = self._running[session] = self._backend.chat(_completion_request(session, turns, *settings), caller)
            async for delta in stream:
                reply.add(delta)
                if not reply.is_empty and time.monotonic() - drawn_at >= _REDRAW_INTERVAL_S:
                    drawn_at = time.monotonic()
                    yield [*turns, *reply.turns()], gr.skip()
            if reply.is_empty:
                gr.Info("The model returned an empty reply: send again or change the message.")
        except TaskCancelledError:
            pass
        except Exception as error:
            self._warn(error)
        finally:
            if stream is not None:
                stream.cancel()
            superseded = stream is not None and self._running.get(session) is not stream
            if not superseded:
                self._running.pop(session, None)
        if superseded:
            yield gr.skip(), gr.skip()  # a later event has updated the page
        elif not reply.is_empty:
            turns = [*turns, *reply.turns()]
            yield turns, _idle_box(turns=turns)
        else:
            yield previous, _idle_box(_with_draft(text, draft), previous)

    def _cancel_running(self, request: gr.Request) -> None:
        """Cancel the session's running completion, whose handler then leaves the page alone."""
        if (stream := self._running.pop(_session(request), None)) is not None:
            stream.cancel()

    def _warn(self, error: Exception) -> None:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, CorralError):
            message = str(cause)
        elif isinstance(cause, ValidationError):
            first = cause.errors()[0]
            message = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        elif isinstance(cause, RayServeException | RayActorError | TimeoutError):
            logger.warning("application %r did not respond: %s", self._backend.api_app, cause)
            message = f"The API application {self._backend.api_app!r} is not responding: try again in a moment."
        else:
            logger.error("a completion failed", exc_info=error)
            message = "An error occurred on the server: its log has the cause."
        gr.Warning(html.escape(message), duration=15)  # seconds


def model_choices(models: list[Model]) -> list[tuple[str, str]]:
    """(label, model id) of the base model, then of each adapter without a version and of each of its versions."""
    choices = []
    for model in models:
        aliases = f" ({', '.join(model.aliases)})" if model.aliases else ""
        if model.parent is None:
            label = f"{model.id} (base)"
        elif "@" in model.id:
            label = f"{model.root}, version {model.version}{aliases}"
        else:
            role = "champion" if "champion" in model.aliases else "newest"
            label = f"{model.root} → version {model.version}, {role}"
        choices.append((label, model.id))
    return choices


def _completion_request(
    session: str,
    turns: list[Turn],
    model: str | None,
    system: str,
    tools: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    repetition_penalty: float,
) -> ChatCompletionRequest:
    messages = [ChatMessage(role="system", content=system)] if system.strip() else []
    messages += to_messages(turns)
    if not model:
        raise CorralError("No model is selected: press the refresh button beside the list, then select one.")
    return ChatCompletionRequest(
        model=model,
        messages=messages,
        tools=read_tools(tools),
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        stream=True,
        user=session,  # a canary gets all requests of a page or none
    )


def _idle_box(text: str | None = None, turns: Sequence[Turn] = ()) -> gr.Textbox:
    """The input box after these turns; `text` replaces what is in it."""
    tool = call_without_result([*turns])
    placeholder = PLACEHOLDER if tool is None else f"Type the result of {tool}"
    if text is None:
        return gr.Textbox(placeholder=placeholder, submit_btn=True, stop_btn=False)
    return gr.Textbox(value=text, placeholder=placeholder, submit_btn=True, stop_btn=False)


def _with_draft(text: str, draft: str) -> str:
    return f"{text}\n{draft}" if draft.strip() else text


def _index(index: int | Sequence[int]) -> int:
    return index if isinstance(index, int) else index[0]


def _last_question(history: list[Turn], index: int | Sequence[int]) -> int:
    """Index of the last user message at or before `index`."""
    return max(i for i in range(_index(index) + 1) if history[i]["role"] == "user")


def _http(request: gr.Request) -> HTTPConnection:
    """The HTTP request of an event."""
    assert request.request is not None
    return request.request


def _session(request: gr.Request) -> str:
    assert request.session_hash is not None
    return request.session_hash
