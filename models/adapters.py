"""Adapters of a built model, turned off or exchanged for others for as long as somebody looks."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from encoders.tuning import lora_config
from models.multimodal import MultiModalModel

TRAINED = "default"
"""PEFT's name for the adapters that `apply_tune` makes."""


def adapter_layers(module: nn.Module) -> dict[str, Any]:
    """The layers of a module that have adapters, by name: modules that are `BaseTunerLayer`s of PEFT."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """A context in which the model computes with its frozen weights alone."""
    with _switched(model, lambda layer: layer.enable_adapters(False), lambda layer: layer.enable_adapters(True)):
        yield


@contextmanager
def adapters_exchanged(model: nn.Module, name: str) -> Iterator[None]:
    """A context in which the model computes with the adapters of this name instead of those that are trained."""
    with _switched(model, lambda layer: layer.set_adapter(name), lambda layer: layer.set_adapter(TRAINED)):
        yield


@contextmanager
def _switched(model: nn.Module, switch: Callable[[Any], None], back: Callable[[Any], None]) -> Iterator[None]:
    layers = adapter_layers(model).values()
    trains = {parameter: parameter.requires_grad for layer in layers for parameter in layer.parameters()}
    for layer in layers:
        switch(layer)
    try:
        yield
    finally:
        for layer in layers:
            back(layer)
        for parameter, value in trains.items():  # PEFT sets it whenever it switches
            parameter.requires_grad_(value)


def copy_adapters(model: MultiModalModel, name: str) -> None:
    """Adds a frozen copy of all adapters under a name of its own, which nothing uses until `adapters_exchanged` does.

    Args:
        model: The model, built.
        name: The name of the copies.
    """
    from peft import inject_adapter_in_model

    trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
    layers = adapter_layers(model)
    for part in model.parts().values():
        own = {parameter for _, parameter in part.own_named_parameters()}
        adapted = [path for path, layer in layers.items() if own.intersection(layer.parameters())]
        if adapted:
            config = lora_config(part.tune.lora, adapted)
            config.init_lora_weights = True  # another way to start, such as PiSSA, would change the frozen weights
            inject_adapter_in_model(config, model, adapter_name=name)
            del model.peft_config  # it would take the next part's for a mistake
    parameters = dict(model.named_parameters())
    for path, parameter in parameters.items():
        parameter.requires_grad_(trains.get(parameter, False))
        if is_copy(path, name):
            steps = [TRAINED if step == name else step for step in path.split(".")]
            parameter.data = parameters[".".join(steps)].detach().clone()
    for layer in layers.values():
        layer.set_adapter(TRAINED)


def is_copy(path: str, name: str) -> bool:
    """Whether a weight belongs to the adapters that `copy_adapters` made under this name."""
    return "lora_" in path and name in path.split(".")


def frozen_copy(model: MultiModalModel) -> MultiModalModel:
    """The model as it is now, for good: it shares with `model` all that does not train, and has copies of the rest."""
    shared = [model.frozen_features, *(parameter for parameter in model.parameters() if not parameter.requires_grad)]
    return copy.deepcopy(model, {id(thing): thing for thing in shared}).requires_grad_(False).eval()
