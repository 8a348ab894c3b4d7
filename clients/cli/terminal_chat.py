"""`corral chat`: a dialog in a terminal, streamed."""

import sys
from contextlib import closing

from clients.api import CorralClient, Sampling, ServerError
from training.chat.messages import Message
from training.errors import ConfigError


class TerminalChat:
    """One dialog with one model."""

    def __init__(self, client: CorralClient, model: str, system: str | None, sampling: Sampling) -> None:
        self._client = client
        self._model = model
        self._sampling = sampling
        self._opening = [Message("system", system)] if system else []
        self._dialog = list(self._opening)

    def ask(self, text: str) -> None:
        """Print the answer to the next user message as it comes; Ctrl-C in a conversation keeps what has come.

        Raises:
            ServerError: there is none; the message is then not part of the dialog.
        """
        if not text.strip():
            raise ConfigError("the prompt is empty: give one as an argument or on standard input")
        dialog = [*self._dialog, Message("user", text)]
        answer = ""
        with closing(self._client.stream(dialog, model=self._model, **self._sampling)) as pieces:
            try:
                for piece in pieces:
                    answer += piece
                    print(piece, end="", flush=True)
            finally:
                if answer:
                    self._dialog = [*dialog, Message("assistant", answer)]
                    print(flush=True)

    def loop(self) -> None:
        """Ask what is typed, until /quit or the end of input."""
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
                self._dialog = list(self._opening)
                print("cleared")
            elif text.startswith("/") and " " not in text:
                print(f"unknown command {text!r}: there are /clear and /quit", file=sys.stderr)
            elif text:
                self._ask_and_go_on(text)

    def _ask_and_go_on(self, text: str) -> None:
        try:
            self.ask(text)
        except ServerError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("(stopped)")
