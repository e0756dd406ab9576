"""How media enter the language model: the contract, and the default, which writes them into their placeholders.

Shape suffixes: B rows, T positions, D hidden size, O occurrences of media, M embeddings of an item, P placeholders.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from encoders.base import Part
from encoders.tuning import Tune

if TYPE_CHECKING:
    from models.language import LanguageModel

_FROZEN = Tune(mode="frozen")


class PlacedMedia(NamedTuple):
    """The media of one modality in a batch, one entry an occurrence, row by row; see `MediaBatch`.

    `mask_OM` says which embeddings are real (None: all), `placeholder_BT` where the placeholders of the modality stand.
    """

    embeddings_OMD: Tensor
    mask_OM: Tensor | None
    row_O: Tensor
    position_O: Tensor
    num_tokens_O: Tensor
    placeholder_BT: Tensor


class Fusion(Part):
    """How embedded media enter the language model. A new way is one subclass with `num_placeholders`, `build` and `fuse`."""

    @abstractmethod
    def num_placeholders(self, num_embeddings: int) -> int:
        """How many tokens of its row a medium takes that has so many embeddings; known without weights."""

    @abstractmethod
    def build(self, language_model: "LanguageModel") -> None:
        """Makes the weights for a language model that is built. Called once, from `configure_model`."""

    @abstractmethod
    def fuse(
        self,
        language_model: "LanguageModel",
        embeddings_BTD: Tensor,
        segments_BT: Tensor,
        media: Sequence[PlacedMedia],
        branches_BT: Tensor | None = None,
    ) -> AbstractContextManager[Tensor]:
        """Lets the language model see media for as long as the context lasts; nothing of them stays behind.

        Args:
            language_model: The language model.
            embeddings_BTD: The embedded tokens; those of placeholders mean nothing.
            segments_BT: The sample in the row that a token belongs to, from 1; 0 is padding.
            media: Those of the batch, by modality.
            branches_BT: The answer in the row that a token belongs to, from 1; 0: all of the sample. None: no answers.

        Returns:
            A context, as which the embeddings come that the language model takes inside of it.

        Raises:
            ValueError: The rows were made for another fusion, or changed afterwards.
        """


class ConcatFusion(Fusion):
    """Writes each embedding of a medium into a placeholder among the tokens (LLaVA, Liu et al. 2023, arXiv 2304.08485).

    It has no weights.
    """

    def __init__(self) -> None:
        super().__init__(_FROZEN)

    def num_placeholders(self, num_embeddings: int) -> int:
        return num_embeddings

    def build(self, language_model: "LanguageModel") -> None:
        """Nothing is to be made."""

    @contextmanager
    def fuse(
        self,
        language_model: "LanguageModel",
        embeddings_BTD: Tensor,
        segments_BT: Tensor,
        media: Sequence[PlacedMedia],
        branches_BT: Tensor | None = None,
    ) -> Iterator[Tensor]:
        for placed in media:
            embeddings_BTD = concatenate(embeddings_BTD, placed)
        yield embeddings_BTD


def concatenate(embeddings_BTD: Tensor, media: PlacedMedia) -> Tensor:
    """Writes the embeddings of media into their placeholders, in reading order.

    Args:
        embeddings_BTD: Embedded tokens.
        media: The media of a modality.

    Raises:
        ValueError: An occurrence has another number of placeholders than of embeddings.
    """
    mask_OM = media.mask_OM
    if mask_OM is None:
        mask_OM = torch.ones(media.embeddings_OMD.shape[:2], dtype=torch.bool, device=embeddings_BTD.device)
    _check_counts(media, mask_OM.sum(1))
    media_PD = media.embeddings_OMD[mask_OM].to(embeddings_BTD.dtype)
    rows_P, positions_P = media.placeholder_BT.nonzero(as_tuple=True)
    return embeddings_BTD.index_put((rows_P, positions_P), media_PD)


def _check_counts(media: PlacedMedia, embeddings_O: Tensor) -> None:
    placeholders_B, row_O, num_tokens_O = media.placeholder_BT.sum(1), media.row_O, media.num_tokens_O
    expected_B = torch.zeros_like(placeholders_B).index_add_(0, row_O, num_tokens_O)
    if not torch.equal(expected_B, placeholders_B):
        row = int((expected_B != placeholders_B).nonzero()[0])
        raise ValueError(
            f"row {row} of the batch has {int(placeholders_B[row])} media placeholders, but its media take "
            f"{int(expected_B[row])}: its tokens were cut or changed after they were expanded"
        )
    if not torch.equal(embeddings_O, num_tokens_O):
        occurrence = int((embeddings_O != num_tokens_O).nonzero()[0])
        raise ValueError(
            f"row {int(row_O[occurrence])} of the batch has {int(num_tokens_O[occurrence])} placeholders for a medium that gives "
            f"{int(embeddings_O[occurrence])} embeddings: num_tokens of the encoder or of the projector is not what its forward "
            "gives"
        )
