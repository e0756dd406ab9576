"""Stretches of a ready model as parts of their own: each with its own tune, though the model holds the weights."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Self

from torch import Tensor, nn

from encoders.base import Part
from encoders.tuning import Tune


class View(Part):
    """A stretch of a ready model as a part. Its weights stay where they are in the model: it holds none itself.

    Args:
        module: The stretch.
        tune: What of it is trained.
        needs: A batch uses it where it has media of one kind out of each of these sets.
        has_source: Whether its weights can be read again.
        inner: The parts inside of it, by their names in it.
    """

    def __init__(
        self,
        module: nn.Module,
        tune: Tune,
        needs: Sequence[frozenset[str]],
        has_source: bool,
        inner: "Mapping[str, View] | None" = None,
    ) -> None:
        super().__init__(tune)
        self._held = (module,)  # no submodule, since it is one of the model's already
        self.needs = needs
        self._has_source = has_source
        self.inner = dict(inner or {})

    @property
    def module(self) -> nn.Module:
        """The stretch."""
        return self._held[0]

    @property
    def class_name(self) -> str:
        return type(self.module).__name__

    @property
    def has_source(self) -> bool:
        return self._has_source

    def cast_inputs(self) -> None:
        """Lets what enters the stretch take the type of its weights, which that of the rest of the model may differ from."""
        for module in self.module if isinstance(self.module, nn.ModuleList) else [self.module]:
            module.register_forward_pre_hook(_cast, with_kwargs=True)

    def is_idle(self, modalities: Collection[str]) -> bool:
        return not all(kinds.intersection(modalities) for kinds in self.needs)

    def nested_parts(self) -> dict[str, Part]:
        return {**self.inner}

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self.module.named_parameters(*args, **kwargs)

    def modules(self) -> Iterator[nn.Module]:  # type: ignore[override]  # it has an argument of torch's own
        return self.module.modules()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # it has overloads
        return self.module.state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        self.module.train(mode and self.tune.mode != "frozen")
        return super().train(mode)


def flat(views: Mapping[str, View]) -> Iterator[tuple[str, View]]:
    """Views and those inside of them, an outer one before its inner ones."""
    for name, view in views.items():
        yield name, view
        yield from flat({f"{name}.{inner}": part for inner, part in view.inner.items()})


def _cast(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    dtype = next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}
