"""A model as DeepSpeed's engine is to see it: gradients are summed up, and weights gathered, in the same order on each device."""

from typing import Any

import torch
from torch import Tensor, nn

from models.multimodal import MultiModalModel
from models.parallel import is_sharded


class GatheredLayers(nn.Module):
    """What the engine of ZeRO-3 sees of a model: the decoder's layers, and as its own weights what trains outside of them.

    The engine gathers the weights of each module that it sees while that runs, and wants all devices to run the same ones, in the
    same order. Rows have media of other kinds, but all of them run the layers.

    Args:
        module: What runs the model, of which the engine is not to know.
        model: The model, built.
    """

    def __init__(self, module: nn.Module, model: MultiModalModel) -> None:
        super().__init__()
        self._runs = [module]  # in a list: no child
        self.layers = model.language_model.decoder_layers
        inside = set(self.layers.parameters())
        for number, weight in enumerate(model.parameters()):
            if weight.requires_grad and weight not in inside:
                self.register_parameter(f"outside_{number}", weight)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._runs[0](*args, **kwargs)


class LastGradients:
    """Gives what trains outside of the decoder's layers its gradients at the end of each backward pass, in one order.

    An engine that sums up gradients in buckets (DeepSpeed's) fills them as they come, and must meet them in the same order on
    each process, whose rows have other media. Of the operations that can be run backward, autograd runs the one that was made
    last: so what each batch begins with is run when all else is over, and completes these gradients, with 0 where there are none.

    Args:
        model: The model, built.
        by_layer: The engine itself completes the gradients of a layer, and of what else stands in it, such as blocks that look at
            media.
    """

    def __init__(self, model: MultiModalModel, by_layer: bool) -> None:
        layers = model.language_model.decoder_layers
        inside = set(layers.parameters())
        if not by_layer:
            inside &= {weight for _, weight in model.language_model.own_named_parameters()}
        self._weights = [weight for weight in model.parameters() if weight.requires_grad and weight not in inside]
        self._zero: Tensor | None = None
        layers[0].register_forward_pre_hook(self, prepend=True, with_kwargs=True)

    def begin(self) -> None:
        """To be called before anything is computed of a batch that goes backward."""
        # with a gradient of its own: the backward pass of the first layer is over when that of what enters it is known
        self._zero = sum((weight.flatten()[:0].sum() for weight in self._weights), torch.zeros((), requires_grad=True))

    def end(self) -> None:
        """To be called when the loss of the batch is known."""
        self._zero = None

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden_BTD: Tensor = args[0] if args else kwargs["hidden_states"]
        if self._zero is not None:
            hidden_BTD = hidden_BTD + self._zero.to(hidden_BTD)
        return ((hidden_BTD, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden_BTD})


def check_whole(model: MultiModalModel) -> None:
    """Refuses a model of which a process has but shares, to begin to train, or to take up a checkpoint.

    Raises:
        ValueError: It is one.
    """
    if is_sharded(model):
        raise ValueError(
            "the weights of this module have been cut into shares by an earlier fit or evaluation, and then neither "
            "begin to train nor take up a checkpoint: make a new module for that"
        )
