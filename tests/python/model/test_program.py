"""`python -m krait`, and Ctrl-C in it and in the package."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from where import DEVICE

import krait


def run(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "krait", *arguments],
        input=text,
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))),
        timeout=120,
    )


def test_it_is_the_program(bundled: krait.LanguageModel) -> None:
    made = run("generate", "--prompt", "ROMEO:", "-n", "12", "--seed", "1")
    expected = bundled.generate("ROMEO:", 12, seed=1)
    assert (made.returncode, made.stderr) == (0, "")
    assert made.stdout == "ROMEO:" + expected.text + "\n"
    version = run("--version")
    assert version.returncode == 0 and krait.__version__ in version.stdout


def test_exit_codes() -> None:
    unknown = run("conjure")
    assert unknown.returncode == 2 and unknown.stderr.startswith("krait: ")
    none = run()
    assert none.returncode == 2 and "subcommand is required" in none.stderr
    absent = run("info", "--model", "/absent/model")
    assert absent.returncode == 1 and absent.stderr.count("\n") == 1
    assert run("generate", "--help").returncode == 0


def test_standard_input_and_output() -> None:
    scored = run("score", "--text", "-", "--json", text="But soft, what light?")
    assert json.loads(scored.stdout)["tokens"] > 3
    with open("/dev/full", "w") as no_room:
        full = subprocess.run(
            [sys.executable, "-m", "krait", "info"],
            env=dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))),
            stdout=no_room,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert full.returncode == 1 and "No space left" in full.stderr


PROGRAM = """
import sys
from krait.__main__ import main
print("ready", flush=True)
sys.exit(main(["generate", "--prompt", "ROMEO:", "-n", "1000000000", "--ignore-eos"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_program(child: Callable[..., Any], number: int) -> None:
    process = child(PROGRAM)
    stdout = process.process.stdout
    assert stdout.readline() == "ready\n"
    assert stdout.readline().startswith("ROMEO:")  # it is at work
    process.process.send_signal(number)
    code, out, err = process.end()
    assert code == 130, err
    assert out.endswith("\n") and "Traceback" not in err


GENERATE = """
import krait, threading
model = krait.LanguageModel.from_pretrained(device=DEVICE)
model.generate("ROMEO:", 4)
try:
    print("ready", flush=True)
    model.generate("ROMEO:", 1 << 30, ignore_eos=True)
except KeyboardInterrupt:
    print("interrupted", len(model.generate("ROMEO:", 4, ignore_eos=True).new_ids))
"""

STREAM = """
import krait
model = krait.LanguageModel.from_pretrained(device=DEVICE)
stream = model.generate("ROMEO:", 1 << 30, ignore_eos=True, stream=True)
text = next(stream)
try:
    print("ready", flush=True)
    for piece in stream:
        text += piece
except KeyboardInterrupt:
    stream.close()
    made = stream.generation
    print("interrupted", made.finish_reason, made.text.startswith(text), len(text) > 0)
"""

LOGITS = """
import krait, numpy as np
model = krait.LanguageModel.from_pretrained(device=DEVICE, threads=1)
ids = np.ones((200, 20000), np.int64)
try:
    print("ready", flush=True)
    model.logits(ids, last=True)
except KeyboardInterrupt:
    print("interrupted", model.logits([1]).shape[0])
"""

WAITING = """
import krait, threading
model = krait.LanguageModel.from_pretrained(device=DEVICE)
stream = model.generate("ROMEO:", 1 << 30, ignore_eos=True, stream=True)
next(stream)
try:
    print("ready", flush=True)
    model.logits([1])  # waits for the stream
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (GENERATE, "interrupted 4\n"),
        (STREAM, "interrupted interrupted True True\n"),
        (LOGITS, "interrupted 1\n"),
        (WAITING, "interrupted\n"),
    ],
    ids=["generate", "stream", "logits", "waiting"],
)
def test_ctrl_c_raises(child: Callable[..., Any], code: str, expected: str) -> None:
    process = child(code)
    process.interrupt()
    status, out, err = process.end()
    assert (status, out) == (0, expected), err


TRAIN = """
import json, sys, krait
folder, with_callback = sys.argv[1], sys.argv[2] == "callback"
told = []
def on_checkpoint(path):
    told.append(path)
try:
    krait.train(json.loads(sys.argv[3]), out=folder, steps=1000000, device=DEVICE, threads=1,
                on_start=lambda start: print("ready", flush=True),
                on_step=(lambda report: None) if with_callback else None,
                on_checkpoint=on_checkpoint)
except KeyboardInterrupt:
    print("interrupted", len(told))
"""


@pytest.fixture
def settings(data: Path, golden: Path) -> str:
    """Of a long run of short steps, as JSON."""
    return json.dumps(
        {
            "model": str(golden / "shakespeare"),
            "data": [str(data / "tinyshakespeare.txt")],
            "batch_size": 1,
            "seq_len": 32,
            "save_every": 0,
        }
    )


@pytest.mark.parametrize("kind", ["callback", "no callback"])
def test_ctrl_c_leaves_a_checkpoint(
    child: Callable[..., Any], settings: str, tmp_path: Path, kind: str
) -> None:
    process = child(TRAIN, str(tmp_path / "run"), kind, settings)
    process.interrupt()
    status, out, err = process.end()
    assert (status, out) == (0, "interrupted 1\n"), err
    resumed = krait.train(
        out=tmp_path / "run", resume=True, device=DEVICE, threads=1, stop=lambda: True
    )
    assert resumed.end == "interrupted"


IN_A_THREAD = """
import json, sys, threading, time, krait
started = threading.Event()
def train():
    krait.train(json.loads(sys.argv[2]), out=sys.argv[1], steps=1000000, device=DEVICE, threads=1,
                on_start=lambda start: started.set())
threading.Thread(target=train, daemon=True).start()
started.wait()
time.sleep(0.2)
"""

GENERATES_IN_A_THREAD = """
import threading, time, krait
model = krait.LanguageModel.from_pretrained(device=DEVICE)
threading.Thread(
    target=lambda: model.generate("a", 10**7, ignore_eos=True), daemon=True
).start()
time.sleep(0.5)
"""


def test_a_process_ends_while_a_daemon_thread_generates(child: Callable[..., Any]) -> None:
    assert child(GENERATES_IN_A_THREAD).end() == (0, "", "")


def test_a_process_ends_while_a_daemon_thread_trains(
    child: Callable[..., Any], settings: str, tmp_path: Path
) -> None:
    status, out, err = child(IN_A_THREAD, str(tmp_path / "run"), settings).end()
    assert (status, out, err) == (0, "", "")
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


LEFT_OPEN = """
import krait
model = krait.LanguageModel.from_pretrained(device=DEVICE)
stream = model.generate("ROMEO:", 1 << 30, ignore_eos=True, stream=True)
print(len(next(stream)) > 0)
"""


def test_a_process_ends_with_a_stream_that_is_open(child: Callable[..., Any]) -> None:
    status, out, err = child(LEFT_OPEN).end()
    assert (status, out, err) == (0, "True\n", "")
