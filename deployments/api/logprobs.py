"""Tokens with their log-probabilities, as OpenAI's chat completions and responses have them."""

from collections.abc import Sequence

from deployments.api.outputs import ScoredToken
from deployments.protocol.chat import ChatTokenLogprob, TopLogprob
from deployments.text.vocabulary import Vocabulary

MIN_LOGPROB = -9999.0  # OpenAI's; JSON has no -infinity


def token_text(token_id: int, vocabulary: Vocabulary) -> str:
    """A token as text, or as `bytes:...` if it is not valid UTF-8 by itself."""
    spelling = vocabulary.spelling(token_id)
    try:
        return spelling.decode()
    except UnicodeDecodeError:  # part of a multi-byte character
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)


def token_logprobs(tokens: Sequence[ScoredToken], vocabulary: Vocabulary) -> list[ChatTokenLogprob]:
    """The generated tokens of a chat, each with the most likely ones at its position."""
    scored = []
    for token in tokens:
        assert token.logprob is not None  # chats have no echo
        top = [_top_logprob(token_id, logprob, vocabulary) for token_id, logprob in token.logprob.top]
        own = _top_logprob(token.token_id, token.logprob.logprob, vocabulary)
        scored.append(ChatTokenLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top))
    return scored


def _top_logprob(token_id: int, logprob: float, vocabulary: Vocabulary) -> TopLogprob:
    spelling = list(vocabulary.spelling(token_id))
    return TopLogprob(token=token_text(token_id, vocabulary), logprob=max(logprob, MIN_LOGPROB), bytes=spelling)
