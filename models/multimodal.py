"""The composed model: encode, project, fuse, read. Plain torch; it can be rebuilt without Lightning.

Shape suffixes: B rows, T positions, D hidden size, N unique media items, M embeddings of an item, O occurrences.
"""

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from datamodules.batch import MODALITIES, Batch, Modality
from encoders.base import Encoder, Part, Projector
from models.branches import has_branches, take_apart, why_no_packs
from models.checkpoint import load_saved, read_checkpoint
from models.features import FrozenFeatures
from models.fusion import ConcatFusion, Fusion, PlacedMedia
from models.language import Generation, LanguageModel
from models.pretrained import PretrainedMLLM

EncodedMedia = dict[Modality, tuple[Tensor, Tensor | None]]
"""By modality: embeddings_NMD of the unique items, and mask_NM (None: all real)."""


class MultiModalModel(nn.Module):
    """Encoders and projectors around a language model.

    State-dict prefixes are the names of the slots: `image_encoder.`, `image_projector.`, …, `language_model.`.

    Args:
        language_model: The language model.
        image_encoder: Encoder of images; None: the model takes none.
        image_projector: From its features to the language model's embeddings.
        video_encoder: Encoder of clips.
        video_projector: From its features to the language model's embeddings.
        audio_encoder: Encoder of sound.
        audio_projector: From its features to the language model's embeddings.
        fusion: How media enter the language model; None: `ConcatFusion`.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        image_encoder: Encoder | None = None,
        image_projector: Projector | None = None,
        video_encoder: Encoder | None = None,
        video_projector: Projector | None = None,
        audio_encoder: Encoder | None = None,
        audio_projector: Projector | None = None,
        fusion: Fusion | None = None,
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.image_encoder, self.image_projector = image_encoder, image_projector
        self.video_encoder, self.video_projector = video_encoder, video_projector
        self.audio_encoder, self.audio_projector = audio_encoder, audio_projector
        self.fusion = ConcatFusion() if fusion is None else fusion
        if self.towers() and isinstance(language_model, PretrainedMLLM):  # an encoder without its projector is refused here
            raise ValueError("a PretrainedMLLM reads media itself: leave model.image_encoder and its like out")
        self.frozen_features = FrozenFeatures()
        self.media_token_ids: dict[Modality, int] = {}
        self.is_built = False

    def towers(self) -> dict[Modality, tuple[Encoder, Projector]]:
        """Encoder and projector of each modality that the model takes.

        Raises:
            ValueError: A modality has one of them without the other.
        """
        slots: dict[Modality, tuple[Encoder | None, Projector | None]] = {
            "image": (self.image_encoder, self.image_projector),
            "video": (self.video_encoder, self.video_projector),
            "audio": (self.audio_encoder, self.audio_projector),
        }
        towers: dict[Modality, tuple[Encoder, Projector]] = {}
        for modality, (encoder, projector) in slots.items():
            if encoder is not None and projector is not None:
                towers[modality] = encoder, projector
            elif encoder is not None or projector is not None:
                raise ValueError(f"model.{modality}_encoder and model.{modality}_projector go together: give both, or neither")
        return towers

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """The kinds of media that the model takes, once it is built."""
        return tuple(self.media_token_ids if isinstance(self.language_model, PretrainedMLLM) else self.towers())

    def tower(self, modality: Modality) -> tuple[Encoder, Projector]:
        """The encoder and the projector of a modality.

        Raises:
            ValueError: The model has none.
        """
        towers = self.towers()
        if modality not in towers:
            raise ValueError(
                f"the batch has {modality} media but the model has no {modality}_encoder: set model.{modality}_encoder"
            )
        return towers[modality]

    def slots(self) -> dict[str, Part]:
        """The parts that the model is composed of, by the name of their slot."""
        slots: dict[str, Part] = {"language_model": self.language_model}
        for modality, (encoder, projector) in self.towers().items():
            slots |= {f"{modality}_encoder": encoder, f"{modality}_projector": projector}
        return slots | {"fusion": self.fusion}

    def parts(self) -> dict[str, Part]:
        """All parts by their path: the slots, and behind each the parts that it is made of, such as `video_encoder.frames`."""
        parts: dict[str, Part] = {}
        waiting = list(self.slots().items())
        while waiting:
            name, part = waiting.pop(0)
            parts[name] = part
            waiting[:0] = [(f"{name}.{nested}", child) for nested, child in part.nested_parts().items()]
        return parts

    def build(self, media_token_ids: Mapping[Modality, int]) -> None:
        """Makes all weights; called once.

        Args:
            media_token_ids: Id of the placeholder of each modality, as the processor expands it.

        Raises:
            ValueError: A part cannot be made, or does not fit the next one.
        """
        self.media_token_ids = dict(media_token_ids)
        self.language_model.build()
        for encoder, projector in self.towers().values():
            encoder.build()
            projector.build(encoder.hidden_size, self.language_model.hidden_size)
        self.fusion.build(self.language_model)
        self.is_built = True

    def spec(self) -> dict[str, Any]:
        """The model as JSON, without weights."""
        return {"parts": {name: part.spec() for name, part in self.slots().items()}, "media_token_ids": self.media_token_ids}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Self:
        """Makes the unbuilt model that `spec` describes."""
        kinds: dict[str, type[Part]] = {"model": LanguageModel, "encoder": Encoder, "projector": Projector, "fusion": Fusion}
        parts: dict[str, Any] = {name: kinds[name.rpartition("_")[2]].from_spec(part) for name, part in spec["parts"].items()}
        return cls(**parts)

    @classmethod
    def from_checkpoint(cls, path: str | Path, trust_remote_code: bool = False) -> Self:
        """Makes the model that a checkpoint holds, weights included, ready to answer.

        Frozen weights are read from where they came from; the checkpoint holds the rest.

        Args:
            path: The file.
            trust_remote_code: Allow a model that was trained with this option of its language model to run its code here too.

        Raises:
            ValueError: There is no such file, it is no checkpoint of ours, or the frozen weights are not those of the training.
        """
        return cls.from_saved(read_checkpoint(path), trust_remote_code)

    @classmethod
    def from_saved(cls, checkpoint: Mapping[str, Any], trust_remote_code: bool = False) -> Self:
        """Like `from_checkpoint`, of a checkpoint that `read_checkpoint` has read.

        Raises:
            ValueError: The frozen weights are not those of the training, or need code that is not allowed to run.
        """
        model = cls.from_spec(checkpoint["model"])
        if model.language_model.trust_remote_code and not trust_remote_code:
            raise ValueError(
                f"the checkpoint wants to run code that comes with {model.language_model.name_or_path}: read that code, then "
                "give trust_remote_code=True"
            )
        model.build(checkpoint["model"]["media_token_ids"])
        load_saved(model, checkpoint["state_dict"], checkpoint["fingerprints"])
        return model.eval()

    def features(self, batch: Batch) -> EncodedMedia:
        """What frozen encoders make of the unique media of the batch, without autograd; what other encoders make is left out."""
        features: EncodedMedia = {}
        for modality in MODALITIES:
            if modality in batch and not isinstance(self.language_model, PretrainedMLLM):
                encoder, _ = self.tower(modality)
                if encoder.has_frozen_features and not batch[modality]["media"].requires_grad:
                    features[modality] = self.frozen_features(encoder, batch[modality])
        return features

    def encode(self, batch: Batch, features: EncodedMedia | None = None, known: EncodedMedia | None = None) -> EncodedMedia:
        """Encodes and projects each unique medium of the batch once; frozen encoders run without autograd.

        A ready model does it itself, whenever it reads a batch: there is nothing to be encoded before.

        Args:
            batch: What the data side made.
            features: What `features` gave for the batch, where it was called already.
            known: Modalities that are encoded already; they are taken as they are.
        """
        encoded: EncodedMedia = dict(known or {})
        if isinstance(self.language_model, PretrainedMLLM):
            return encoded
        features = self.features(batch) if features is None else features
        for modality in MODALITIES:
            if modality not in batch or modality in encoded:
                continue
            encoder, projector = self.tower(modality)
            if modality in features:
                features_NLD, mask_NL = encoder.refine(*features[modality])
            else:
                features_NLD, mask_NL = encoder(batch[modality]["media"], batch[modality]["mask"])
            encoded[modality] = projector(features_NLD, mask_NL)
        return encoded

    def fused(self, batch: Batch, encoded: EncodedMedia) -> AbstractContextManager[Tensor]:
        """A context in which the language model sees the media; it comes as embeddings_BTD, which the language model takes.

        Raises:
            ValueError: A row has another number of placeholders than its media take.
        """
        tokens_BT = batch["tokens_BT"]
        is_media_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
        placed: list[PlacedMedia] = []
        for modality, token_id in self.media_token_ids.items():
            placeholder_BT = tokens_BT == token_id
            is_media_BT |= placeholder_BT
            if modality not in encoded:
                _check_no_placeholders(placeholder_BT, modality)
                continue
            media = batch[modality]
            media_NMD, mask_NM = encoded[modality]
            placed.append(
                PlacedMedia(
                    embeddings_OMD=media_NMD[media["item_O"]],
                    mask_OM=None if mask_NM is None else mask_NM[media["item_O"]],
                    row_O=media["row_O"],
                    position_O=media["position_O"],
                    num_tokens_O=media["num_tokens_O"],
                    placeholder_BT=placeholder_BT,
                )
            )
        embeddings_BTD = self.language_model.embed(tokens_BT.masked_fill(is_media_BT, 0))
        return self.fusion.fuse(self.language_model, embeddings_BTD, batch["segments_BT"], placed, batch.get("branches_BT"))

    def forward(self, batch: Batch, encoded: EncodedMedia | None = None) -> Tensor:
        """Last hidden states of the language model, hidden_BTD; no logits.

        Answers that share a row share its prompt where the language model can keep them apart, else each is read in a row of its
        own: the result is the same, at the same places.

        Args:
            batch: What the data side made.
            encoded: Its media, where they are encoded already.
        """
        if len(batch["examples"]) > len(batch["tokens_BT"]) and not self.language_model.takes_packs:
            raise ValueError(why_no_packs(self.language_model))
        if has_branches(batch) and not self.language_model.takes_branches:
            apart = take_apart(batch)
            return apart.join(self(apart.batch, encoded))
        if isinstance(self.language_model, PretrainedMLLM):
            return self.language_model.read(batch)
        with self.fused(batch, self.encode(batch) if encoded is None else encoded) as embeddings_BTD:
            return self.language_model(embeddings_BTD, batch["segments_BT"], batch["positions_BT"], batch.get("branches_BT"))

    @torch.no_grad()
    def generate(self, batch: Batch, options: Generation, eos_ids: Collection[int], pad_id: int) -> list[list[int]]:
        """Answers the prompts of a left-padded batch, without dropout also in the middle of training.

        Returns:
            The new tokens of each row, up to and without the end token.
        """
        was_training = self.training
        self.eval()
        try:
            if isinstance(self.language_model, PretrainedMLLM):
                tokens_BT = self.language_model.answer(batch, options, eos_ids, pad_id)
            else:
                with self.fused(batch, self.encode(batch)) as embeddings_BTD:
                    tokens_BT = self.language_model.generate(embeddings_BTD, batch["segments_BT"], options, eos_ids, pad_id)
        finally:
            self.train(was_training)
        answers = []
        for tokens in tokens_BT.tolist():
            end = next((i for i, token in enumerate(tokens) if token in eos_ids), len(tokens))
            answers.append(tokens[:end])
        return answers


def _check_no_placeholders(placeholder_BT: Tensor, modality: Modality) -> None:
    if placeholder_BT.any():
        row = int(placeholder_BT.any(1).nonzero()[0])
        raise ValueError(
            f"row {row} of the batch has {int(placeholder_BT[row].sum())} placeholders for {modality} media, but the batch has "
            f"no {modality} media to fill them"
        )
