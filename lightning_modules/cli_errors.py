"""Errors of the command line, in words that a user can act on."""

import dataclasses
import difflib
import dis
import errno
import inspect
import pydoc
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, get_args

import lightning.pytorch as L
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from encoders.base import Part

ROOT = Path(__file__).resolve().parent.parent


def explain(message: str, option_names: Iterable[str]) -> str:
    """The reason of a parser's error in one paragraph, with the nearest valid name where a name is wrong.

    Args:
        message: As jsonargparse words it: a tree of what was tried.
        option_names: The options that there are, besides those of the class that the message is about.
    """
    place, class_path, text = _innermost(message)
    if name := next((found for pattern in _WRONG_NAME for found in re.findall(pattern, text)), None):
        known = {*option_names, *_options(pydoc.locate(class_path)), *_class_names(text)}
        return _explain_name(name, place, text, known)
    if several := re.search(r"Multiple subclasses with name (\w+)\..*?: (.*)\.", text):
        return f"{place}: {several[1]} is the name of several classes. Give the whole path of one: {several[2]}"
    value = re.search(r"(?:Got value: |Given value: )(.*)", text)
    kinds = re.findall(r"Expected an? (.*?)(?:\. Got value: .*)?$", text, re.MULTILINE)
    if value and kinds:
        if value[1].strip() == "None" and "<class 'NoneType'>" in kinds:  # jsonargparse writes it out for the class inside
            return f"{place}: null cannot be given on the command line so deep: give it in a YAML file, by one more --config"
        return f"{place} is {value[1].strip()}, expected {' or '.join(map(_kind, kinds))}"
    reason = " ".join(line.strip() for line in text.splitlines() if line.strip())
    if command := re.fullmatch(r"argument subcommand: invalid choice: '(.*?)' \(choose from (.*)\)", reason):
        commands = re.findall(r"'?([\w-]+)'?", command[2])
        return f"there is no command {command[1]}: the commands are {', '.join(commands)}{_did_you_mean(command[1], commands)}"
    advice = ". Give a configuration, such as --config configs/sft/tiny.yaml" if re.search(r"\w\.model\b", reason) else ""
    return (f"{place}: " if place else "") + reason + advice


class _Leaf(NamedTuple):
    """What an error comes down to: the option that it is about, the class whose options these are, and the reason."""

    place: str
    class_path: str
    text: str


_HEADER = re.compile(r"""(?P<indent>[ -]*)(?:Parser key "(?P<key>[^"]*)"|Problem with .*?'(?P<cls>[^']*)'): ?""")
_IN_CALLABLE = re.compile(r"expects a function or a callable class: ([^\n]*?)(?:\. Got value: [^\n]*)?(?:\n|$)")


def _innermost(message: str) -> _Leaf:
    lines = message.splitlines()
    headers = [(number, found) for number, line in enumerate(lines) if (found := _HEADER.match(line))]
    if not headers:
        return _Leaf("", "", message)
    last, header = headers[-1]
    block = [lines[last][header.end() :]]
    for line in lines[last + 1 :]:
        if line.strip() and len(line) - len(line.lstrip()) <= len(header["indent"]):
            break
        block.append(line)
    keys = [found["key"] for _, found in headers if found["key"]]
    classes = [found["cls"] for _, found in headers if found["cls"]]
    text = "\n".join(block)
    if in_callable := _IN_CALLABLE.search(text):
        classes += re.findall(r"class_path='([\w.]+)'", text)
        text = in_callable[1]
    return _Leaf(".".join(keys), classes[-1] if classes else "", text)


_WRONG_NAME = (
    r"unrecognized arguments: (?:--)?([\w.]+)",
    r"Option '([\w.]+)' is not accepted",
    r"does not accept option '([\w.]+)'",
    r"Key '([\w.]+)' is not expected",
    r'Key "([\w.]+)" is not expected',
    r"Expected a dot import path string: ([\w.]+)",
)


def _explain_name(name: str, place: str, text: str, known: set[str]) -> str:
    group = re.search(r"Group '([\w.]+)' does not accept", text)
    if group:
        name = f"{group[1]}.{name}"
    fitting = re.search(r"Subtypes: \[(.*)\]", text)
    if name in known and fitting:
        kinds = " or ".join(map(_kind, fitting[1].split(", ")))
        return f"{place} cannot be {name}: expected {kinds}, or a subclass. See --help"
    nearest = _nearest(name, known)
    hint = f"Did you mean {nearest}?" if nearest else "See --help, or --model.help CLASS for the options of a class."
    return f"{name} is no known name {f'in {place}' if place else 'here'}. {hint}"


def _nearest(name: str, known: set[str]) -> str | None:
    """The known name that is most like a wrong one: of the same group of options, or else a whole name like its end."""
    name = re.sub(r"\.(class_path|init_args)\b.*", "", name)
    group, _, end = name.rpartition(".")
    siblings = {other for other in known if other.rpartition(".")[0] == group}
    others = {other for other in known if "." not in other}
    nearest = difflib.get_close_matches(name, siblings, n=1) or difflib.get_close_matches(end, others, n=1)
    return nearest[0] if nearest else None


def _did_you_mean(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f". Did you mean {nearest[0]}?" if nearest else ""


def _options(cls: Any, prefix: str = "") -> Iterator[str]:
    """Names of the options of a class, with those that it hands on to its parents, and of dataclasses among them."""
    if not inspect.isclass(cls):
        return
    for parent in cls.__mro__[:-1]:
        for parameter in inspect.signature(vars(parent).get("__init__", parent)).parameters.values():
            yield f"{prefix}{parameter.name}"
            for kind in (parameter.annotation, *get_args(parameter.annotation)):
                if dataclasses.is_dataclass(kind):
                    yield from _options(kind, f"{prefix}{parameter.name}.")


def _class_names(text: str) -> Iterator[str]:
    """Names of all imported classes that a YAML can name, also of those that a parser's text says it expected."""
    pending: list[type] = [Part, L.LightningModule, L.LightningDataModule, L.Callback, Logger, Optimizer, LRScheduler]
    expected = map(pydoc.locate, re.findall(r"<class '(\w+\.[\w.]+)'>", text))
    pending += [cls for cls in expected if inspect.isclass(cls)]
    while pending:
        cls = pending.pop()
        yield cls.__name__
        pending += cls.__subclasses__()


def _kind(text: str) -> str:
    """A type as jsonargparse names it, in words."""
    if text.startswith("typing.Literal"):
        return text.removeprefix("typing.Literal").strip("[]")
    name = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    return {"NoneType": "null", "tuple": "a list such as [a, b]"}.get(name, name)


def show_user_errors(hook: Callable[..., None]) -> Callable[..., None]:
    """An exception hook that shows a ValueError that our code raises as its text alone: it is written for the user.

    Any other exception goes to `hook` with its traceback, also a ValueError from inside a library, or one that Python
    raises in our code.
    """

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if text := _text_for_the_user(error.with_traceback(trace)):
            sys.stderr.write(f"\nerror: {text}\n")
        else:
            hook(kind, error, trace)

    return show


def reason(error: BaseException) -> str:
    """What an error was raised for: jsonargparse wraps that of a constructor in a list of types that the value is not of.

    Its cause is that of the first of these types alone, such as the name of a strategy; the others are in its text.
    """
    tried = re.findall(r"^ *- (?!Expected an? )(.+)$", str(error), re.MULTILINE)
    while not _is_for_the_user(error) and isinstance(error.__cause__, ValueError):
        error = error.__cause__
    return tried[-1] if tried and not _is_for_the_user(error) else str(error)


def _text_for_the_user(error: BaseException) -> str:
    """The text of an error that our code raised, here or in a loader worker, of a full disk or a lost worker; else empty."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # wherever: a library writes files too
        where = f" while {error.filename} was written" if error.filename else ""
        return (
            f"{error.strerror}{where}: make room on the disk of the run folder and on that for temporary files, or give another "
            "run folder with --trainer.default_root_dir. What has been saved is whole: --ckpt_path last goes on from there"
        )
    if isinstance(error, RuntimeError) and (lost := _LOST_WORKER.search(str(error))):
        return (
            f"a process that reads data {lost[1]}: where memory is full the system ends one. Take fewer with --data.num_workers, "
            "or a smaller --data.batch_size; --ckpt_path last goes on from the newest checkpoint"
        )
    if not isinstance(error, ValueError):
        return ""
    if _is_for_the_user(error):
        return str(error)
    in_worker = _IN_WORKER.search(str(error))
    return in_worker["text"].strip() if in_worker and _is_ours(in_worker["file"]) else ""


_LOST_WORKER = re.compile(r"DataLoader worker \(pid.*\) ((?:is|was) killed by signal: \w+|exited unexpectedly)")

# the text of a traceback, whose last frame is where the error was raised: by a raise statement, maybe with marks below it
_IN_WORKER = re.compile(
    r"in DataLoader worker process .*\n"
    r'  File "(?P<file>[^\n]*)",[^\n]*\n    raise[^\n]*\n(?:    [^\n]*\n)*'
    r"[\w.]*Error: (?P<text>.*)",
    re.DOTALL,
)


def _is_for_the_user(error: BaseException) -> bool:
    """Whether a raise statement of ours raised it; one that Python or a library raises is a fault, and needs its traceback."""
    trace = error.__traceback__
    if not isinstance(error, ValueError) or trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    # the instruction, and not the line: the file may have been edited since the run began
    return _is_ours(code.co_filename) and code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _is_ours(file: str) -> bool:
    path = Path(file)
    return path.is_relative_to(ROOT) and "site-packages" not in path.parts
