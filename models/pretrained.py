"""Ready multimodal models of transformers: one model that reads images, videos or sound, tuned part by part.

Shape suffixes: B rows, T positions, D hidden size.
"""

import inspect
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from datamodules.batch import MODALITIES, Batch, MediaBatch
from encoders.base import DTYPES, Part
from encoders.sampling import FrameSampling
from encoders.tuning import Tune, apply_tune
from models.language import Generation, LanguageModel
from models.view import View, flat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FROZEN = Tune(mode="frozen")
_VISION, _AUDIO = frozenset({"image", "video"}), frozenset({"audio"})


class PretrainedMLLM(LanguageModel):
    """A ready multimodal model: any that `AutoModelForMultimodalLM` of transformers knows and whose processor uses placeholders,
    such as Qwen2-VL, Qwen2.5-VL, Qwen3-VL, LLaVA, LLaVA-OneVision and Qwen2-Audio.

    It takes the place of the language model, without encoders. Its own processor prepares the media. `tune` is that of its
    language part; whatever is in no tower and no projector belongs to that. Parts are called by the names that their modules
    have in the model. All is loaded as float32 where some part is trained in full; what is not is then narrowed to `dtype`.

    Args:
        vision_tune: What is trained of the tower for images and videos.
        audio_tune: What is trained of the tower for sound.
        projector_tune: What is trained of what lies between the towers and the language part.
        projector_modules: Names of modules inside of a tower that are its projector.
        sampling: Which frames of a video are taken.
        image_resize: Size of images in place of the processor's own, as transformers calls it; of Qwen-VL the fewest and the most
            pixels, {shortest_edge: 3136, longest_edge: 1003520}. An image of Qwen2.5-VL takes a token for 28 x 28 pixels.
        video_resize: The same for the frames of videos.
    """

    def __init__(
        self,
        *args: Any,
        vision_tune: Tune = _FROZEN,
        audio_tune: Tune = _FROZEN,
        projector_tune: Tune = _FROZEN,
        projector_modules: tuple[str, ...] = ("merger", "deepstack_merger_list"),
        sampling: FrameSampling = FrameSampling(),
        image_resize: dict[str, int] | None = None,
        video_resize: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.vision_tune, self.audio_tune, self.projector_tune = vision_tune, audio_tune, projector_tune
        self.projector_modules = projector_modules
        self.sampling = sampling
        self.image_resize, self.video_resize = image_resize, video_resize
        self._views: dict[str, View] = {}

    def nested_parts(self) -> dict[str, Part]:
        return {**self._views}

    @property
    def takes_branches(self) -> bool:
        """False: such models count the positions of media themselves, along the whole row."""
        return False

    def read(self, batch: Batch) -> Tensor:
        """Last hidden states of a batch, hidden_BTD, its media read by the model itself; no logits."""
        mask_BT = batch["segments_BT"]
        lowest, highest = mask_BT.aminmax()
        assert highest <= 1, "samples that share a row would attend to each other"
        mask = {} if lowest > 0 else {"attention_mask": mask_BT}
        return self.model.base_model(**self._inputs(batch), **mask, use_cache=False).last_hidden_state

    @torch.no_grad()
    def answer(self, batch: Batch, options: Generation, eos_ids: Iterable[int], pad_id: int) -> Tensor:
        """Continues the left-padded prompts of a batch; see `generate`."""
        tokens_BT = self._continue(self._inputs(batch), batch["segments_BT"], options, eos_ids, pad_id)
        return tokens_BT[:, batch["tokens_BT"].shape[1] :]

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        inputs = {"input_ids": batch["tokens_BT"]}
        for modality in MODALITIES:
            if modality in batch:
                own = media_inputs(batch[modality])
                if shared := own.keys() & inputs:
                    raise ValueError(
                        f"{self.name_or_path} ({type(self.model).__name__}) reads media of several kinds by one argument "
                        f"({', '.join(shared)}), which is not supported in one batch: train it on one kind of them"
                    )
                inputs |= own
        takes = inspect.signature(self.model.forward).parameters
        name = next((name for name in ("mm_token_type_ids", "token_type_ids") if name in takes), None)  # Gemma 3 has the latter
        if name is not None and "token_types_BT" in batch:
            inputs[name] = batch["token_types_BT"]
        return inputs

    @property
    def _has_full_parts(self) -> bool:
        return any(tune.mode == "full" for tune in (self.tune, self.vision_tune, self.audio_tune, self.projector_tune))

    def _load(self, kind: Any, dtype: torch.dtype) -> "PreTrainedModel":
        from transformers import AutoModelForMultimodalLM

        model = super()._load(AutoModelForMultimodalLM, torch.float32 if self._has_full_parts else dtype)
        if model.config.is_encoder_decoder or model.get_output_embeddings() is None or model.base_model is model:
            raise ValueError(
                f"{self.name_or_path} ({type(model).__name__}) is no decoder with a head on its last hidden states: it is not "
                "supported. Take another model, or subclass PretrainedMLLM"
            )
        return model

    def apply_tune(self, module: nn.Module) -> None:
        """Freezes, adapts or frees the language part, the towers and their projectors, each as its own `Tune` says.

        Raises:
            ValueError: There is no part of a kind that is to be trained, or `lora.target_modules` fits no layer of one.
        """
        fixed = [parameter for parameter in module.parameters() if not parameter.requires_grad]  # such as sinusoids
        fixed += self.model.base_model.parameters(recurse=False)  # such as the newline between rows of an image
        self._views = self._find_parts()
        apply_tune(self.tune, module, "language_model", but=[name.removeprefix("model.") for name in self._views])
        for name, view in flat(self._views):
            apply_tune(view.tune, view.module, name, but=[*view.nested_parts()])
        for parameter in [*fixed, *self._unread_parameters()]:
            parameter.requires_grad_(False)
        if self._has_full_parts and self.dtype != "float32":
            self._narrow()
        self.train(self.training)

    def _narrow(self) -> None:
        """Gives all that is not trained in full the type of frozen weights."""
        views = [view for _, view in flat(self._views)]
        for part in (self, *views):
            for name, parameter in part.own_named_parameters():
                if part.tune.mode != "full" and "lora_" not in name and parameter.is_floating_point():
                    parameter.data = parameter.data.to(DTYPES[self.dtype])
        for view in views:
            view.cast_inputs()

    def _find_parts(self) -> "dict[str, View]":
        """The towers and what lies between them and the language part, by their names in this module."""
        model, base = self.model, self.model.base_model
        names = {module: f"model.{name}" for name, module in model.named_modules()}
        towers: dict[nn.Module, View] = {}
        for option, modality, tune, kinds in (
            ("vision_tune", "image", self.vision_tune, _VISION),
            ("audio_tune", "audio", self.audio_tune, _AUDIO),
        ):
            tower = model.get_encoder(modality)
            if tower not in (model, base):  # transformers gives the model itself where it has none
                towers[tower] = View(tower, tune, [kinds], self.pretrained, self._find_inner(tower, kinds))
            elif tune.mode != "frozen":
                raise ValueError(self._no_part(option, f"no tower for {modality} media"))
        decoder, projectors = model.get_decoder(), {}
        for child in base.children() if decoder in base.children() else ():
            if child is not decoder and child not in towers and any(True for _ in child.parameters()):
                needs = [kinds for tower in towers.values() for kinds in tower.needs]
                projectors[child] = View(child, self.projector_tune, needs, self.pretrained)
        if self.projector_tune.mode != "frozen" and not projectors and not any(view.nested_parts() for view in towers.values()):
            raise ValueError(self._no_part("projector_tune", "no projector of its own"))
        return {names[module]: view for module, view in (towers | projectors).items()}

    def _find_inner(self, tower: nn.Module, kinds: frozenset[str]) -> "dict[str, View]":
        return {
            name: View(module, self.projector_tune, [kinds], self.pretrained)
            for name, module in tower.named_modules()
            if name.rpartition(".")[2] in self.projector_modules
        }

    def _no_part(self, option: str, lack: str) -> str:
        modules = ", ".join(name for name, _ in self.model.base_model.named_children())
        return (
            f"language_model.{option} is to train something, but {self.name_or_path} ({type(self.model).__name__}) has {lack}: "
            f"leave it frozen. The parts of the model are called {modules}; those of a tower are named by projector_modules"
        )

    def _unread_parameters(self) -> Iterator[nn.Parameter]:
        """What stands in a vision tower behind the layer that is read (`vision_feature_layer`, LLaVA): it gets no gradient."""
        config = self.config.to_dict()
        layers = config.get("vision_feature_layer")
        if layers is None:
            return
        tower, depth = self.model.get_encoder("image"), config["vision_config"]["num_hidden_layers"]
        read = max(layer if layer >= 0 else depth + 1 + layer for layer in (layers if isinstance(layers, list) else [layers]))
        stacks = (name for name, m in tower.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
        stack = f"{next(stacks)}."
        has_passed = False
        for name, parameter in tower.named_parameters():  # in the order in which modules are used
            is_layer = name.startswith(stack)
            has_passed |= is_layer
            if int(name.removeprefix(stack).split(".")[0]) >= read if is_layer else has_passed:
                yield parameter


def media_inputs(media: MediaBatch) -> dict[str, Tensor]:
    """What a ready model reads of the media of one kind, by the name of its argument: those of all rows, one after the other."""
    items: dict[int, list[int]] = {}
    for row, item in zip(media["row_O"].tolist(), media["item_O"].tolist(), strict=True):
        items.setdefault(row, []).append(item)
    rows = [media["inputs"][tuple(numbers)] for numbers in items.values()]
    return {name: _join([row[name] for row in rows]) for name in rows[0]}


def _join(tensors: list[Tensor]) -> Tensor:
    """Along the first dimension; where others differ, zeros fill the shorter ones up, as transformers does."""
    sizes = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    return torch.cat([_fill(tensor, sizes) for tensor in tensors])


def _fill(tensor: Tensor, sizes: list[int]) -> Tensor:
    missing = [(0, size - own) for size, own in zip(sizes, tensor.shape[1:], strict=True)]
    return (
        pad(tensor, [number for pair in reversed(missing) for number in pair]) if any(sum(pair) for pair in missing) else tensor
    )
