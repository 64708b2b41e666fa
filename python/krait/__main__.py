"""``python -m krait``: the command-line program, with its options, exit codes and Ctrl-C."""

from __future__ import annotations

import sys

from krait._library import library, without_torch

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Runs the program on ``arguments`` (those of the process where left out): its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    if arguments is None:
        # No tensor of torch comes here, whatever its version.
        with without_torch():
            library()
    return int(library().run_program(list(words)))


if __name__ == "__main__":
    sys.exit(main())
