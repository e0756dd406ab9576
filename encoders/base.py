"""What a part of the model is: made cheaply, built once, and able to write itself down.

Shape suffixes: B items, N encoder tokens, M projected tokens, D width.
"""

import dataclasses
import inspect
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from typing import Any, Literal, Self

import jsonargparse
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from encoders.tuning import Tune, apply_tune

MediaShape = tuple[int, ...]
"""Shape of decoded media, known from a file's header: image (height, width), video (frames, height, width) of the frames that
are taken, audio (samples,) at the encoder's own rate."""

MediaTransform = Callable[[Any], Tensor]
"""Decoded media to the tensor that the encoder takes: a PIL image, a clip with `frames_FHW3` and `times_F`, or a waveform with
`samples_S`. Picklable: it runs in loader workers.

The tensors of two items of a modality may differ in their first dimension (time) only: a batch pads it with zeros, and its mask
says what is real. The transform of a video encoder has `sampling`, which says which frames are decoded, that of an audio
encoder `sample_rate`, in Hz, and `min_samples`, the fewest samples that it takes.
"""

DType = Literal["float32", "bfloat16", "float16"]
"""Names of the types that weights can have."""

DTYPES: dict[DType, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Part(nn.Module):
    """A module with a cheap constructor, whose weights are made by `build`, and which remembers its options.

    `Part.options` holds the arguments of the constructor, so that a part can be written as JSON (`spec`)
    and made again (`from_spec`) without a YAML file. Pass options by keyword: `*args` have no names to remember.

    Attributes:
        tune: What of the part is trained, and how fast.
        options: The constructor's arguments, by name.
    """

    tune: Tune
    options: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        part = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(part, *args, **kwargs)
        given = dict(list(bound.arguments.items())[1:])
        given |= given.pop("kwargs", {})
        if "args" in given:
            raise TypeError(f"{cls.__name__} takes its options by keyword, got {len(given['args'])} without a name")
        # defaults are remembered too: a checkpoint must not change when a default does
        part.__dict__["options"] = option_defaults(cls) | given
        return part

    def __init__(self, tune: Tune) -> None:
        super().__init__()
        self.tune = tune

    def __getattr__(self, name: str) -> Any:
        """Like `nn.Module.__getattr__`, but shows the AttributeError that a property raises, which that one would hide."""
        found = inspect.getattr_static(type(self), name, None)
        if isinstance(found, property | cached_property):  # python comes here only after it has failed
            return found.__get__(self, type(self))
        return super().__getattr__(name)

    @property
    def class_name(self) -> str:
        """What kind of part it is, for tables."""
        return type(self).__name__

    @property
    def has_source(self) -> bool:
        """Whether `build` reads weights that it would read again; otherwise checkpoints hold also what is frozen."""
        return False

    @property
    def gates(self) -> dict[str, nn.Parameter]:
        """Own factors that start at 0, by name: no gradient passes the part, to what lies before it, while all of them are 0."""
        return {}

    @property
    def is_shut(self) -> bool:
        """Whether all gates are still 0, so that what lies before this part gets gradients of exactly 0."""
        gates = [gate.flatten() for gate in self.gates.values()]
        return bool(gates) and not bool(torch.cat(gates).any())

    def is_idle(self, modalities: Collection[str]) -> bool:
        """Whether a batch has no use for this part, as an option of another, since it has media of these kinds only."""
        return False

    def spec(self) -> dict[str, Any]:
        """The part as JSON: its class and options, without weights."""
        init_args = {name: _to_json(value) for name, value in self.options.items()}
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": init_args}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """Makes the (unbuilt) part that `spec` describes.

        Raises:
            ValueError: The class is no subclass of this one, or does not take these options.
        """
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(cls, "part", required=True)
        try:
            config = parser.parse_object({"part": spec})
        except jsonargparse.ArgumentError as error:
            raise ValueError(f"{spec.get('class_path')} cannot be made from its saved options: {error}") from error
        return parser.instantiate_classes(config).part

    def nested_parts(self) -> "dict[str, Part]":
        """The parts that this one is made of, by attribute; each is tuned, saved and listed for itself."""
        return {name: child for name, child in self.named_children() if isinstance(child, Part)}

    def own_names(self) -> set[str]:
        """Names in the state dict that belong to this part and to none that it is made of."""
        nested = tuple(f"{name}." for name in self.nested_parts())
        return {name for name in self.state_dict() if not name.startswith(nested)}

    def own_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Like `named_parameters`, without those of the parts that this one is made of."""
        nested = tuple(f"{name}." for name in self.nested_parts())
        return ((name, parameter) for name, parameter in self.named_parameters() if not name.startswith(nested))

    def apply_tune(self, module: nn.Module) -> None:
        """Freezes, adapts or frees `module`, the weights of this part alone; call it at the end of `build`."""
        apply_tune(self.tune, module, part=type(self).__name__)
        self.train(self.training)  # libraries hand out models in either mode, and Lightning keeps the mode it finds

    def train(self, mode: bool = True) -> Self:
        """Like `nn.Module.train`, but what is frozen stays in evaluation mode, running statistics included."""
        super().train(mode and self.tune.mode != "frozen")
        for part in self.nested_parts().values():
            part.train(mode)
        if self.tune.mode == "lora":
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


class Encoder(Part):
    """Pixels, frames or waveforms to features. A new backbone is one subclass with these members.

    A subclass defines `build`, `forward`, `num_tokens`, `transform` and `hidden_size`.
    The last three are known without weights: they serve the data side, from an unbuilt copy.

    An encoder of which only the first stretch is frozen may split its `forward` in `features`, which a cache may keep, and
    `refine`, and say so by `has_frozen_features`.
    """

    @property
    def has_frozen_features(self) -> bool:
        """Whether nothing that `features` computes with is trained."""
        return self.tune.mode == "frozen"

    @property
    @abstractmethod
    def hidden_size(self) -> int:
        """Width D of the features."""

    @cached_property
    @abstractmethod
    def transform(self) -> MediaTransform:
        """Decoded media to the tensor that `forward` takes a batch of."""

    @abstractmethod
    def build(self) -> None:
        """Makes the weights. Called once, from `configure_model`."""

    @abstractmethod
    def num_tokens(self, shape: MediaShape) -> int:
        """How many features an item of this shape gives.

        Args:
            shape: Shape of the decoded media, before the transform.
        """

    @abstractmethod
    def forward(self, media: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Encodes a batch of transformed items.

        Args:
            media: The stacked items, as `transform` gives them.
            mask: mask_BT, True where `media` is real along its first dimension after the batch's; None: everywhere.

        Returns:
            features_BND, and mask_BN, True where a feature is real (None: everywhere).
        """

    def features(self, media: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The stretch of `forward` that a cache may keep; takes and gives what `forward` does."""
        return self(media, mask)

    def refine(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What `forward` computes of `features`; here nothing is left to do."""
        return features_BND, mask_BN


class Projector(Part):
    """Features of an encoder to embeddings of the language model: (B, N, in) to (B, M, out)."""

    @abstractmethod
    def build(self, in_features: int, out_features: int) -> None:
        """Makes the weights for an encoder of width `in_features` and a language model of width `out_features`."""

    @abstractmethod
    def num_tokens(self, num_features: int) -> int:
        """How many embeddings `num_features` features become.

        Raises:
            ValueError: The projector cannot take that number.
        """

    @abstractmethod
    def forward(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Projects features; returns embeddings_BMD and mask_BM (None: all real)."""


def one_line(error: Exception) -> str:
    """The text of a library's error, fit to stand within a sentence."""
    return " ".join(str(error).split())


def option_defaults(cls: type) -> dict[str, Any]:
    """Defaults of the constructor's options, those that it hands on to its parents included."""
    defaults: dict[str, Any] = {}
    for parent in cls.__mro__:
        constructor = vars(parent).get("__init__")
        if constructor is None:
            continue
        parameters = inspect.signature(constructor).parameters.values()
        for parameter in parameters:
            if parameter.default is not inspect.Parameter.empty:
                defaults.setdefault(parameter.name, parameter.default)
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return defaults


def _to_json(value: Any) -> Any:
    if isinstance(value, Part):
        return value.spec()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value
