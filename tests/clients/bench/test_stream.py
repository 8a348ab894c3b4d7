"""How an answer is read: any framing of HTTP, and what is no answer."""

import asyncio

import pytest

from clients.bench.stream import Answer, ChatServer, RequestFailed
from tests.clients.bench.test_bench import event


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
def test_any_http_framing_in_any_pieces_is_read(framing: str) -> None:
    words = [event({"choices": [{"delta": {"content": word}}]}) for word in ("one", " two", ' "three"\r\n')]
    body = "".join([": comment\r\n\r\n", *words, "data: [DONE]\n\n"]).encode()
    pieces = [body[start : start + 40] for start in range(0, len(body), 40)]
    chunks = b"".join(b"%x;x=y\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    head = {"chunked": "Transfer-Encoding: chunked", "length": f"Content-Length: {len(body)}", "close": "X-None: 0"}
    answer = f"HTTP/1.1 200 OK\r\n{head[framing]}\r\n\r\n".encode() + (chunks if framing == "chunked" else body)
    connections: list[int] = []

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(1)
        while (await reader.readuntil(b"\r\n\r\n")) and await reader.readexactly(2):
            for start in range(0, len(answer), 7):
                writer.write(answer[start : start + 7])
                await asyncio.sleep(0.0005)
            if framing == "close":
                writer.close()
                return

    async def ask_twice() -> list[Answer]:
        async with await asyncio.start_server(respond, "127.0.0.1", 0) as listening:
            server = ChatServer(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
            answers = [await server.answer({}, keep_text=True) for _ in range(2)]
            server.close()
            await asyncio.sleep(0.02)  # the other side sees it
        return answers

    for response in asyncio.run(ask_twice()):
        assert response.text == 'one two "three"\r\n'
        assert len(response.text_at) == 3
        assert response.sent_at < response.text_at[0] < response.text_at[1] < response.text_at[2] <= response.ended_at
    assert len(connections) == (2 if framing == "close" else 1)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "closed the connection"),
        (b"SMTP ready\r\n\r\n", "not HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndat", "closed the connection"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "not HTTP/1.1"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"choices": []}', "no text"),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n", "502: no text"),
        (b"HTTP/1.1 500 Oh\r\n\r\n<html>\n  broken</html>", "500: <html> broken</html>"),
    ],
)
def test_what_is_no_answer_fails_and_says_why(answer: bytes, why: str) -> None:
    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async def ask() -> None:
        async with await asyncio.start_server(respond, "127.0.0.1", 0) as listening:
            await ChatServer(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}").answer({})

    with pytest.raises(RequestFailed, match=why):
        asyncio.run(ask())
