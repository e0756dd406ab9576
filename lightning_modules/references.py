"""What a policy is compared with: a model that training must not move, without a second copy of what does not train.

Shape suffixes: S supervised positions.
"""

from abc import abstractmethod
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from datamodules.batch import Batch
from encoders.base import Part
from lightning_modules.logprobs import token_logps
from lightning_modules.losses import supervised
from models.adapters import adapter_layers, adapters_exchanged, adapters_off, copy_adapters, frozen_copy, is_copy
from models.checkpoint import saved_names
from models.multimodal import EncodedMedia, MultiModalModel
from models.spread import spread_like, whole

REFERENCE = "reference"
"""Name of the adapters that are kept as they were."""


def label_logps(model: MultiModalModel, batch: Batch, encoded: EncodedMedia) -> Tensor:
    """Log-probability of each label of a batch: logps_S, in the order of `losses.supervised` (nats).

    Args:
        model: The model.
        batch: The batch.
        encoded: Its media.
    """
    language_model = model.language_model
    hidden_SD, labels_S = supervised(model(batch, encoded), batch["labels_BT"])
    return token_logps(hidden_SD, language_model.head, labels_S, softcap=language_model.softcap, scale=language_model.logit_scale)


class Reference(nn.Module):
    """A model that a policy is compared with. It is made before the first step, and no step moves it."""

    def __init__(self) -> None:
        super().__init__()

    @property
    @abstractmethod
    def description(self) -> str:
        """Which model it is, in words."""

    @abstractmethod
    def prepare(self, model: MultiModalModel, warm_started: Collection[str], processing: str) -> None:
        """Keeps what the reference is made of. Called once, when the policy's weights are there and none has been trained.

        Args:
            model: The policy.
            warm_started: Names of the weights that come from another run.
            processing: The fingerprint of what makes examples of rows.

        Raises:
            ValueError: Training would move the reference.
        """

    @abstractmethod
    def logps(self, model: MultiModalModel, batch: Batch, features: EncodedMedia, encoded: EncodedMedia) -> Tensor:
        """Log-probabilities of the labels, logps_S, without autograd.

        Args:
            model: The policy.
            batch: The batch.
            features: What frozen encoders make of its media; see `MultiModalModel.features`.
            encoded: Its media as the policy sees them. They are not encoded again where the reference sees them so too.
        """

    def saved(self, model: MultiModalModel) -> dict[str, Any]:
        """What a checkpoint must hold so that a resumed run has the same reference, such as weights by their names."""
        return {}

    def load(self, model: MultiModalModel, state: Mapping[str, Any]) -> None:
        """Takes up what `saved` gave.

        Raises:
            ValueError: It is of another reference.
        """

    def flush(self) -> None:
        """Writes what is to outlast the run."""

    def check_spread(self) -> None:
        """Refuses a policy whose weights are sharded or split over devices.

        Raises:
            ValueError: This reference cannot be computed beside it.
        """

    def train(self, mode: bool = True) -> Self:
        """A reference stays in evaluation mode."""
        return super().train(False)


class AdapterOff(Reference):
    """The frozen weights of the policy, without its adapters: no second model, no more memory.

    It is the model that was loaded from the hub or a folder. After a warm start that carried adapters (`init_from`), this is
    not the model that training starts from: `SecondAdapter` is. What trains must all be adapters that start at 0.
    """

    @property
    def description(self) -> str:
        return "the frozen weights, adapters off"

    def prepare(self, model: MultiModalModel, warm_started: Collection[str], processing: str) -> None:
        _refuse_full_parts(model, self)
        if any("lora_" in name for name in warm_started):
            rank_zero_warn(
                "model.reference is AdapterOff, so the policy is compared with the model from before the adapters, and not with "
                "the warm start of model.init_from: SecondAdapter, which is the default, is that"
            )
            return
        for name, layer in adapter_layers(model).items():
            ends = [value for path, value in layer.named_parameters() if "lora_B" in path or "lora_embedding_B" in path]
            if any(not end.is_meta and bool(end.any()) for end in ends):
                raise ValueError(
                    f"model.reference is AdapterOff, but the adapter of {name} does not start at 0: its frozen weights were "
                    "changed to make up for it (as PiSSA and OLoRA do), so without the adapter they are no model that anybody "
                    "trained. Take model.reference FrozenCopy or SecondAdapter, which keep the start itself"
                )

    @torch.no_grad()
    def logps(self, model: MultiModalModel, batch: Batch, features: EncodedMedia, encoded: EncodedMedia) -> Tensor:
        return _logps(model, batch, features, _unmoved(model, encoded), adapters_off(model))


class SecondAdapter(Reference):
    """The policy's adapters as they were before the first step, frozen under another name beside those that train.

    This is the model of a warm start (SFT with LoRA, then DPO of the same adapters) for the memory of the adapters.
    What trains must all be adapters.
    """

    @property
    def description(self) -> str:
        return "the start of this run: a frozen copy of the adapters"

    def prepare(self, model: MultiModalModel, warm_started: Collection[str], processing: str) -> None:
        _refuse_full_parts(model, self)
        copy_adapters(model, REFERENCE)

    @torch.no_grad()
    def logps(self, model: MultiModalModel, batch: Batch, features: EncodedMedia, encoded: EncodedMedia) -> Tensor:
        return _logps(model, batch, features, _unmoved(model, encoded), adapters_exchanged(model, REFERENCE))

    def saved(self, model: MultiModalModel) -> dict[str, Any]:
        return {name: whole(weight) for name, weight in model.state_dict().items() if is_copy(name, REFERENCE)}

    def load(self, model: MultiModalModel, state: Mapping[str, Any]) -> None:
        _load(model, state, self.saved(model))


class FrozenCopy(Reference):
    """The policy as it was before the first step: a copy of what trains; what is frozen is shared.

    Beside LoRA this takes the memory of the adapters and of what trains in full, such as a projector; where the language model
    trains in full, that of a second one.
    """

    @property
    def description(self) -> str:
        return "the start of this run: a frozen copy of what trains"

    def prepare(self, model: MultiModalModel, warm_started: Collection[str], processing: str) -> None:
        self.names = saved_names(model)
        self.model = frozen_copy(model)

    def check_spread(self) -> None:
        raise ValueError(
            "model.reference is FrozenCopy, which shares weights with the policy that trainer.strategy would shard or split: "
            "train adapters alone (freeze the projector, tune.mode frozen), whose reference is AdapterOff or SecondAdapter, or "
            "take configs/strategy/ddp.yaml"
        )

    @torch.no_grad()
    def logps(self, model: MultiModalModel, batch: Batch, features: EncodedMedia, encoded: EncodedMedia) -> Tensor:
        return _logps(self.model, batch, features, _unmoved(model, encoded), nullcontext())

    def saved(self, model: MultiModalModel) -> dict[str, Any]:
        return {name: weight for name, weight in self.model.state_dict().items() if name in self.names}

    def load(self, model: MultiModalModel, state: Mapping[str, Any]) -> None:
        _load(self.model, state, self.saved(model))


def default_reference(model: MultiModalModel, warm_started: Collection[str]) -> Reference:
    """The start of the run in the least memory: what a researcher means who does not say.

    Args:
        model: The policy, built.
        warm_started: Names of the weights that come from another run.
    """
    if _full_parts(model):
        return FrozenCopy()
    has_begun = any("lora_" in name for name in warm_started)
    changes_frozen = any(part.tune.mode == "lora" and part.tune.lora.init is not None for part in model.parts().values())
    return SecondAdapter() if has_begun or changes_frozen else AdapterOff()


def _logps(
    model: MultiModalModel, batch: Batch, features: EncodedMedia, known: EncodedMedia, context: AbstractContextManager[None]
) -> Tensor:
    with context:
        return label_logps(model, batch, model.encode(batch, features, known))


def _unmoved(model: MultiModalModel, encoded: EncodedMedia) -> EncodedMedia:
    """The media of those modalities that training does not change, which policy and reference see alike."""
    towers = model.towers()
    return {
        modality: media
        for modality, media in encoded.items()
        if not any(parameter.requires_grad for part in towers[modality] for parameter in part.parameters())
    }


def _full_parts(model: MultiModalModel) -> dict[str, Part]:
    """The parts of which more than adapters trains."""
    return {
        name: part
        for name, part in model.parts().items()
        if any(weight.requires_grad and "lora_" not in path for path, weight in part.own_named_parameters())
    }


def _refuse_full_parts(model: MultiModalModel, reference: Reference) -> None:
    if full := _full_parts(model):
        parts = " and ".join(full)
        raise ValueError(
            f"model.reference is {type(reference).__name__}, but {parts} {'trains' if len(full) == 1 else 'train'} in full: "
            f"the reference would compute with weights that training moves, and the policy would be compared with itself. "
            f"Freeze {parts} (tune.mode frozen) or give {'it' if len(full) == 1 else 'them'} adapters (tune.mode lora), or take "
            "model.reference FrozenCopy, which keeps a copy of what trains"
        )


def _load(model: MultiModalModel, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    if state.keys() != own.keys() or any(state[name].shape != weight.shape for name, weight in own.items()):
        raise ValueError(
            f"the checkpoint's reference has {len(state)} weights that are not the {len(own)} of this run's: the run was made "
            "with another model.reference, or other parts train. Give the options of that run, or start another with "
            "model.init_from"
        )
    model.load_state_dict({name: spread_like(weight, own[name]) for name, weight in state.items()}, strict=False)
