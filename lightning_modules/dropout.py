"""Dropout of a model, turned off for objectives that compare likelihoods."""

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def turn_dropout_off(module: nn.Module) -> None:
    """Sets every probability of dropping something to 0: of dropout layers, of attention, of whole layers or paths.

    The policy and its reference would otherwise differ before anything is learnt, by noise alone. Modules keep their mode, since
    gradient checkpointing asks for it.
    """
    for layer in module.modules():
        if isinstance(layer, _DropoutNd):
            layer.p = 0.0
        if isinstance(layer, nn.ModuleDict):  # as PEFT keeps them; a layer without any is quicker
            layer.update({name: nn.Identity() for name, child in layer.items() if isinstance(child, _DropoutNd)})
        for name, value in vars(layer).items():
            if "drop" in name and isinstance(value, float):  # transformers' and timm's own name for it
                setattr(layer, name, 0.0)
