"""Commands of Python, one after the other, each in a forked process, which finds imported what they share.

`python -m tests.warm "train.py fit --config …" "-m deployment.ask …"` says of each what became of it, as one line of JSON, and
ends with the first that fails. A process of its own spends eight seconds on imports before it begins.
"""

import json
import os
import runpy
import shlex
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.forked import in_child


class Done(NamedTuple):
    """What became of a command."""

    command: str
    code: int
    stdout: str
    stderr: str


def run(command: str) -> Done:
    """Runs a command in a forked process, as `python` would."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        code = in_child(partial(_run, shlex.split(command), out, err))
        return Done(command, code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))


def _run(words: list[str], out: Path, err: Path) -> None:
    for path, number in ((out, 1), (err, 2)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path[0] = str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.stdout.flush()


def main() -> None:
    from tests.faults.killing import import_all

    import_all()
    for command in sys.argv[1:]:
        done = run(command)
        sys.stdout.write(json.dumps(done._asdict()) + "\n")
        if done.code:
            break


if __name__ == "__main__":
    main()
