"""`corral chat`: a streamed dialog in a terminal."""

import sys
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from clients.api import CorralClient, Sampling, ServerError
from deployments.protocol.tools import AnswerToolCall, add_to_calls
from training.chat.messages import Message, ToolCall
from training.errors import ConfigError

_CALL_MARK = "→ "


class TerminalChat:
    """One dialog with one model, which may call tools: their results are typed."""

    def __init__(
        self,
        client: CorralClient,
        model: str,
        system: str | None,
        sampling: Sampling,
        tools: Sequence[dict[str, Any]] = (),
    ) -> None:
        self._client = client
        self._model = model
        self._tools = tools
        self._sampling = sampling
        self._system = [Message("system", system)] if system else []
        self._dialog = list(self._system)

    def ask(self, text: str) -> None:
        """Print the answer to the next user message as it is generated; an interrupted one stays in the dialog.

        Raises:
            ConfigError: the message is empty.
            ServerError: the request failed; without any answer, the dialog stays as it was.
        """
        if not text.strip():
            raise ConfigError("the prompt is empty: give one as an argument or on standard input")
        self._continue(Message("user", text))

    def _continue(self, *turns: Message) -> None:
        """Print the answer after these turns; calls are shown as calls."""
        dialog = [*self._dialog, *turns]
        text = ""
        calls: list[AnswerToolCall] = []
        deltas = self._client.stream_deltas(dialog, model=self._model, tools=self._tools, **self._sampling)
        with closing(deltas):
            try:
                for delta in deltas:
                    text += delta.content or ""
                    _print(delta.content or "")
                    for part in delta.tool_calls or ():
                        if part.id is not None:
                            line_break = "\n" if text or calls else ""
                            _print(f"{line_break}{_CALL_MARK}{part.function.name} ")
                        add_to_calls(calls, part)
                        _print(part.function.arguments or "")
            finally:
                if text or calls:
                    called = (ToolCall(call.function.name, call.function.arguments, call.id) for call in calls)
                    self._dialog = [*dialog, Message("assistant", text, tool_calls=tuple(called))]
                    print(flush=True)

    def loop(self) -> None:
        """Send what is typed, until /quit or the end of input."""
        print(f"{self._model}: /clear forgets the conversation, /quit ends it, Ctrl-C stops an answer")
        while True:
            try:
                text = input("\n> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if text == "/quit":
                return
            if text == "/clear":
                self._dialog = list(self._system)
                print("cleared")
            elif text.startswith("/") and " " not in text:
                print(f"unknown command {text!r}: the commands are /clear and /quit", file=sys.stderr)
            elif text:
                self._ask_or_print_error(text)

    def _ask_or_print_error(self, text: str) -> None:
        try:
            self.ask(text)
            while self._dialog[-1].tool_calls:
                self._continue(*[self._result_of(call) for call in self._dialog[-1].tool_calls])
        except ServerError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("(stopped)")
        except EOFError:  # no result: the next prompt ends the conversation
            print()

    def _result_of(self, call: ToolCall) -> Message:
        """What the user types as the result of a call; an empty line is an empty result."""
        return Message("tool", input(f"result of {call.name}: "), tool_call_id=call.id)


def _print(text: str) -> None:
    print(text, end="", flush=True)
