"""Stored responses on a real server, with OpenAI's client: kill -9 of their owner, and of the whole server (F3)."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from deployments.auth.keys import KeyStore
from tests.conftest import (
    RunningServer,
    descendants,
    serve_config,
    start_server,
    stop_server,
    wait_until,
    wait_until_up,
)
from training.base_models.resolve import BaseCheckpoint

pytestmark = pytest.mark.slow


@dataclass
class Server:
    """A server that can be killed and started again on the same CORRAL_HOME."""

    folder: Path
    model: str
    process: subprocess.Popen[bytes]
    running: RunningServer

    def client(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.running.url}/v1", api_key=key, max_retries=0, timeout=120)

    def kill(self) -> None:
        """End every process of the server at once, as a power cut would."""
        processes = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=60)
        psutil.wait_procs(processes, timeout=60)

    def start(self) -> None:
        """Start it as before; `start_server` waits for the page, which now asks for a key."""
        command = [sys.executable, "-m", "clients.cli", "serve", str(self.folder / "serve.yaml")]
        with self.running.log.open("ab") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        wait_until_up(f"{self.running.url}/readyz", 400)


@pytest.fixture(scope="module")
def server(tiny_base: BaseCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The tiny model in a CORRAL_HOME of its own, since the first key closes a server."""
    content = serve_config()
    content["applications"][0]["args"] = {"base_model": str(tiny_base.path), "engine": {"max_model_len": 512}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CORRAL_HOME", str(tmp_path_factory.mktemp("home")))
        folder = tmp_path_factory.mktemp("server")
        server = Server(folder, tiny_base.name, *start_server(content, folder))
        yield server
        assert stop_server(server.process) == 0, server.running.log.read_text()[-4000:]


@pytest.mark.promise("F3")
def test_stored_responses_outlive_their_owner_and_the_server(server: Server) -> None:
    alice, bob = (KeyStore().create(name, ("chat",))[1] for name in ("alice", "bob"))
    fields: dict[str, Any] = {"model": server.model, "temperature": 0, "max_output_tokens": 8}
    with server.client(alice) as client:
        first = client.responses.create(input="Say hi.", instructions="Be brief.", **fields)
        with client.responses.stream(input="Go on.", previous_response_id=first.id, **fields) as stream:
            events = list(stream)
        second = events[-1].response  # type: ignore[union-attr]
        assert second.status == "incomplete"
        unstored = client.responses.create(input="Say hi.", store=False, **fields)

        (owner,) = descendants(server.running.pid, "ServeReplica:corral:StoredResponses")
        os.kill(owner.pid, signal.SIGKILL)
        refusals: list[int] = []
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                third = client.responses.create(input="Again.", previous_response_id=second.id, **fields)
                break
            except openai.InternalServerError as error:
                refusals.append(error.status_code)
        assert set(refusals) <= {503}
        print(f"\n{len(refusals)} requests were refused while the owner was restarted")

        with ThreadPoolExecutor(4) as pool:  # kill -9 while responses are being stored
            stored: list[str] = []

            def create(number: int) -> None:
                with suppress(openai.APIError):
                    stored.append(client.responses.create(input=f"Number {number}.", **fields).id)

            running = [pool.submit(create, number) for number in range(400)]
            wait_until(lambda: len(stored) >= 20)
            server.kill()
            for future in running:
                future.result()
    server.start()
    with server.client(alice) as client:
        assert client.responses.retrieve(first.id) == first
        assert client.responses.retrieve(second.id).output == second.output
        for response_id in stored:
            assert client.responses.retrieve(response_id).id == response_id
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(unstored.id)
        texts = [item.content[0].text for item in client.responses.input_items.list(third.id, order="asc")]  # type: ignore[union-attr]
        assert texts == ["Say hi.", first.output_text, "Go on.", second.output_text, "Again."]
        again = client.responses.create(input="Again.", previous_response_id=second.id, **fields)
        assert again.output_text == third.output_text
        client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(first.id)
    with server.client(bob) as client, pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)
