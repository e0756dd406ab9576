"""Ready multimodal models of transformers: one model that reads images, videos or sound, tuned part by part.

Shape suffixes: B rows, T positions, D hidden size.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from datamodules.batch import MODALITIES, Batch, MediaBatch
from encoders.base import DTYPES, Part
from encoders.sampling import FrameSampling
from encoders.tuning import Tune, apply_tune
from models.attention_blocks import blocks_of
from models.attention_mask import attention_inputs
from models.branches import can_branch, has_branches
from models.generation import Generation, continue_prompts
from models.language import LanguageModel
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
        if self.compute_dtype is not None and self._has_full_parts:
            raise ValueError("language_model.compute_dtype is for frozen weights: set it to null where a part's mode is full")
        self.projector_modules = projector_modules
        self.sampling = sampling
        self.image_resize, self.video_resize = image_resize, video_resize
        self._views: dict[str, View] = {}

    def nested_parts(self) -> dict[str, Part]:
        return {**self._views}

    @cached_property
    def takes_branches(self) -> bool:
        """As of other models; never of one whose media attend both ways (Gemma 3)."""
        serves_positions = "get_rope_index" in dir(self.model.base_model)  # what else the kinds of tokens are for is the mask
        return (serves_positions or self._types_name is None) and can_branch(self)

    @property
    def takes_packs(self) -> bool:
        """As `takes_branches`: flash attention would be told the lengths of samples in the towers, too."""
        return self.takes_branches

    def read(self, batch: Batch) -> Tensor:
        """Last hidden states of a batch, hidden_BTD, its media read by the model itself; no logits."""
        segments_BT, inputs = batch["segments_BT"], self._inputs(batch)
        is_shared = bool(segments_BT.max() > 1) or has_branches(batch)
        assert not is_shared or self.takes_branches, "samples that share a row would attend to each other"
        attention: dict[str, Any] = {} if segments_BT.min() > 0 else {"attention_mask": segments_BT}
        if is_shared:
            branches_BT, dtype = batch.get("branches_BT"), self.model.dtype
            attention = attention_inputs(self.model.config, segments_BT, branches_BT, batch["positions_BT"], dtype)
            attention["position_ids"] = self._positions(batch, inputs)
        return self.model.base_model(**inputs, **attention, use_cache=False).last_hidden_state

    def _positions(self, batch: Batch, inputs: Mapping[str, Tensor]) -> Tensor:
        """The positions that tokens have where their sample stands alone: positions_BT, or positions_3BT of M-RoPE (Wang et al.
        2024, arXiv 2409.12191, section 2.1), which the model counts."""
        tokens_BT = batch["tokens_BT"]
        if "get_rope_index" not in dir(self.model.base_model):
            return batch["positions_BT"]
        blocks = blocks_of(batch["segments_BT"], batch.get("branches_BT"))[0, 0].tolist()
        lengths = [length for length, _, _ in blocks]
        is_whole = [shared < 0 for _, shared, _ in blocks]
        rows = {"input_ids": tokens_BT, "mm_token_type_ids": batch.get("token_types_BT", torch.zeros_like(tokens_BT))}
        rows["attention_mask"] = torch.ones_like(tokens_BT)
        alone = {
            name: pad_sequence([*compress(x_BT.flatten().split(lengths), is_whole)], batch_first=True)
            for name, x_BT in rows.items()
        }
        count: Any = self.model.base_model.get_rope_index
        grids = {name: inputs[name] for name in inspect.signature(count).parameters if name in inputs and name not in rows}
        counted = iter(count(**alone, **grids)[0].unbind(1))
        found_3L: list[Tensor] = []
        for length, shared, _ in blocks:
            if shared < 0:
                found_3L.append(next(counted)[:, :length])
            else:  # an answer is text that goes on behind its prompt
                follows = torch.arange(1, length + 1, device=tokens_BT.device)
                found_3L.append((found_3L[shared].max() + follows).expand(3, -1))
        return torch.cat(found_3L, dim=1).view(3, *tokens_BT.shape)

    @torch.no_grad()
    def answer(self, batch: Batch, options: Generation, eos_ids: Iterable[int], pad_id: int) -> Tensor:
        """Continues the left-padded prompts of a batch; see `generate`."""
        prompts, segments_BT = self._inputs(batch), batch["segments_BT"]
        tokens_BT = continue_prompts(self.model, prompts, segments_BT, options, eos_ids, pad_id, self.is_shared)
        return tokens_BT[:, batch["tokens_BT"].shape[1] :]

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        inputs = {"input_ids": batch["tokens_BT"]}
        for modality in MODALITIES:
            if modality in batch:
                own = media_inputs(batch[modality], batch["segments_BT"])
                if shared := own.keys() & inputs:
                    raise ValueError(
                        f"{self.name_or_path} ({type(self.model).__name__}) reads media of several kinds by one argument "
                        f"({', '.join(shared)}), which is not supported in one batch: train it on one kind of them"
                    )
                inputs |= own
        if self._types_name is not None and "token_types_BT" in batch:
            inputs[self._types_name] = batch["token_types_BT"]
        return inputs

    @property
    def _types_name(self) -> str | None:
        """The argument that takes the kinds of tokens; None: there is none."""
        takes = inspect.signature(self.model.forward).parameters
        return next((name for name in ("mm_token_type_ids", "token_type_ids") if name in takes), None)  # Gemma 3 has the latter

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
        self._views = self._find_parts(self.model)
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

    def _kept_whole(self, kind: Any) -> list[str] | None:
        """The head, the towers and what lies between them and the language part, which alone is quantised."""
        from transformers import AutoModelForMultimodalLM

        with torch.device("meta"):
            model = AutoModelForMultimodalLM.from_config(self.config)
        head = model.get_output_embeddings()
        heads = [name for name, module in model.named_modules() if module is head]
        return [*heads, *(name.removeprefix("model.") for name in self._find_parts(model))]

    def _find_parts(self, model: "PreTrainedModel") -> "dict[str, View]":
        """The towers and what lies between them and the language part, by their names in this module."""
        base = model.base_model
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


def media_inputs(media: MediaBatch, segments_BT: Tensor) -> dict[str, Tensor]:
    """What a ready model reads of the media of one kind, by the name of its argument: those of all samples, one after the other.

    Args:
        media: The media.
        segments_BT: The sample in its row that a token belongs to.
    """
    row_O = media["row_O"]
    sample_O = segments_BT[row_O, media["position_O"]]
    items: dict[tuple[int, int], list[int]] = {}
    for row, sample, item in zip(row_O.tolist(), sample_O.tolist(), media["item_O"].tolist(), strict=True):
        items.setdefault((row, sample), []).append(item)
    samples = [media["inputs"][tuple(numbers)] for numbers in items.values()]
    return {name: _join([sample[name] for sample in samples]) for name in samples[0]}


def _join(tensors: list[Tensor]) -> Tensor:
    """Along the first dimension; where others differ, zeros fill the shorter ones up, as transformers does."""
    sizes = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    return torch.cat([_fill(tensor, sizes) for tensor in tensors])


def _fill(tensor: Tensor, sizes: list[int]) -> Tensor:
    missing = [(0, size - own) for size, own in zip(sizes, tensor.shape[1:], strict=True)]
    return (
        pad(tensor, [number for pair in reversed(missing) for number in pair]) if any(sum(pair) for pair in missing) else tensor
    )
