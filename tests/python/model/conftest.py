"""What the tests of models share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from where import DEVICE

import krait

ROOT = Path(__file__).resolve().parents[3]
os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.fixture(scope="session")
def golden() -> Path:
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def data() -> Path:
    return ROOT / "tests" / "data"


@pytest.fixture(scope="session")
def bundled() -> krait.LanguageModel:
    return krait.LanguageModel.from_pretrained(device=DEVICE)


def environment() -> dict[str, str]:
    """That of a process with the modules of this one."""
    return dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))


HEADER = "import sys\nfrom where import DEVICE\n"


class Child:
    """A Python process that runs `code`, which has `sys` and `DEVICE`, and prints "ready" once it
    may be interrupted."""

    def __init__(self, code: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", HEADER + code, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def interrupt(self, number: int = signal.SIGINT) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == "ready":
                break
        self.process.send_signal(number)

    def end(self, timeout: float = 60) -> tuple[int, str, str]:
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            pytest.fail(f"the process did not end in {timeout} s: {out}\n{err}")
        return self.process.returncode, out, err


@pytest.fixture
def child() -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def start(code: str, *arguments: str) -> Child:
        children.append(Child(code, *arguments))
        return children[-1]

    yield start
    for one in children:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


@pytest.fixture
def in_threads() -> Callable[[int, Callable[[int], None]], None]:
    """Runs a function in several threads at one time, and raises what one of them raised."""

    def run(count: int, body: Callable[[int], None]) -> None:
        errors: list[BaseException] = []
        gate = threading.Barrier(count)

        def work(index: int) -> None:
            try:
                gate.wait()
                body(index)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a thread hangs"
        if errors:
            raise errors[0]

    return run
