"""What the tests of a registry share: drafts, snapshots, and scripts that are killed at every step."""

import subprocess
import sys
import textwrap
from pathlib import Path

from training.base_models.resolve import BaseCheckpoint
from training.registry.publish import AdapterDraft

GOOD = {"eval_loss": 1.0, "base_eval_loss": 2.0}


def draft(base: BaseCheckpoint, name: str = "ranch", metrics: dict[str, float] | None = None) -> AdapterDraft:
    return AdapterDraft(name=name, base=base, chat_format="chatml", metrics=GOOD if metrics is None else metrics)


def snapshot(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


PRELUDE = """
import json, os, resource, signal, sys
from pathlib import Path
from training.base_models.resolve import BaseCheckpoint
from training.errors import AdapterNotFound, RegistryError
from training.registry.promotion import AdapterPromoter
from training.registry.publish import AdapterDraft, AdapterPublisher
from training.registry.registry import AdapterRegistry
import numpy

root, source, base_path = map(Path, sys.argv[1:4])
base = BaseCheckpoint("tiny-llama", str(base_path), base_path, None)
base.weights_sha256()
draft = AdapterDraft(
    name="ranch", base=base, chat_format="chatml", metrics={"eval_loss": 1.0, "base_eval_loss": 2.0}
)
registry = AdapterRegistry(root)

def in_child(work):
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except RegistryError as error:
            print(error, flush=True)
            os._exit(1)
        except BaseException as error:
            print("traceback", repr(error), flush=True)
            os._exit(3)
    return child

def killed_at(step, work):
    "Run work in a child that kills itself before its step-th change below root; False if it got to the end."
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    def run():
        remaining = step
        def hook(event, arguments):
            nonlocal remaining
            # These announce themselves before they happen; os.open (mode None) is how a folder is synced.
            changes = event in ("os.mkdir", "os.link", "os.rename", "os.remove", "os.rmdir")
            changes = changes or (event == "open" and (arguments[1] is None or arguments[2] & writing))
            if changes and str(arguments[0]).startswith(str(root)):
                remaining -= 1
                if remaining < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        work()
    status = os.waitpid(in_child(run), 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
    return status != 0

def whole():
    "Every version that can be seen is whole."
    manifests = registry.list()
    for manifest in manifests:
        registry.fetch(manifest)
    return [manifest.version for manifest in manifests]
"""


def run_script(script: str, root: Path, base: BaseCheckpoint, adapter: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script), str(root), str(adapter), str(base.path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[3],
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
