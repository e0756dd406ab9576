"""What the examples of a processor depend on besides the rows, and so what two processors must have in common."""

import dataclasses
import hashlib
import json
from types import FunctionType
from typing import TYPE_CHECKING, Any

from datamodules.batch import Modality

if TYPE_CHECKING:
    from datamodules.processor import Processor

PROBES: dict[Modality, list[tuple[int, ...]]] = {
    "image": [(224, 224), (480, 640), (97, 33)],
    "video": [(8, 224, 224), (16, 480, 640), (5, 97, 33)],
    "audio": [(16_000,), (123_457,), (960_000,)],
}
"""Shapes of decoded media whose numbers of tokens are compared."""


def aspects(processor: "Processor") -> dict[str, Any]:
    """All that examples depend on, as JSON, by names that a user knows.

    Parts are described by what they do to media, not by their options: a learning rate, or the folder that weights come
    from, makes no other examples.
    """
    prompt = dataclasses.asdict(processor.prompt)
    del prompt["chat_template"]  # the text counts, not where it came from
    found: dict[str, Any] = {f"prompt.{name}": value for name, value in prompt.items()}
    found["the chat template"] = processor.tokenizer.get_chat_template()
    found["the tokenizer"] = [processor.tokenizer.backend_tokenizer.to_str(), processor.pad_id, processor.eos_ids]
    for modality, encoder in processor.encoders.items():
        found[f"the transform of {modality}_encoder"] = _describe(encoder.transform)
        found[f"the number of tokens of {modality} media"] = _num_tokens(processor, modality)
    return found


def fingerprint(processor: "Processor") -> str:
    """A hash of the aspects."""
    return hashlib.sha256(json.dumps(aspects(processor), sort_keys=True).encode()).hexdigest()


def differences(now: "Processor", before: "Processor") -> list[str]:
    """What lets two processors make different examples, in words; empty where their fingerprints are the same."""
    new, old = aspects(now), aspects(before)
    return [_difference(name, old.get(name), new.get(name)) for name in {**old, **new} if old.get(name) != new.get(name)]


def _difference(name: str, old: Any, new: Any) -> str:
    values = f"{name} was {old!r} and is {new!r}"
    return values if len(values) <= 200 else f"{name} is another"


def _describe(transform: Any) -> str:
    """A transform in words: its `repr` where it is a dataclass, which then holds all its options, else its name."""
    if dataclasses.is_dataclass(transform):
        return repr(transform)
    named = transform if isinstance(transform, FunctionType | type) else type(transform)
    return f"{named.__module__}.{named.__qualname__}"


def _num_tokens(processor: "Processor", modality: Modality) -> list[int | str]:
    """How many tokens media of some shapes take, or why they cannot be taken."""
    counts: list[int | str] = []
    for shape in PROBES[modality]:
        try:
            counts.append(processor.num_tokens(modality, shape))
        except ValueError as error:
            counts.append(str(error))
    return counts
