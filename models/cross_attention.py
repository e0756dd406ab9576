"""Gated cross-attention: the tokens stay those of the text, and blocks between the decoder's layers look at the media.

Shape suffixes: B rows, T tokens, D hidden size, O occurrences of media, M embeddings of an item, P real embeddings of all
media, K most embeddings that the media of a row have.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from encoders.attention import CrossAttention, FeedForward, KeysValues
from encoders.tuning import Tune
from models.fusion import Fusion, PlacedMedia

if TYPE_CHECKING:
    from models.language import LanguageModel

AttendTo = Literal["all", "last"]

_FULL = Tune(mode="full")


class GatedCrossAttentionFusion(Fusion):
    """Blocks before every k-th layer of the language model, in which its tokens attend to the media that stand before them.

    A block is the gated cross-attention of Flamingo (Alayrac et al. 2022, arXiv 2204.14198, section 2.2 and figure 4):
    h ← h + tanh(a)·attention(h, media), then h ← h + tanh(b)·feed_forward(h). The gates a and b start at 0, so that the model
    starts as its language model. Media take no place in the row: a row costs as much as its text, and may have more media
    than the language model's context could hold. As in Llama 3.2, a token without media before it skips the block: text alone
    is always answered as by the language model.

    Media and tokens of different samples that are packed into one row do not see each other, nor those of different answers.

    Args:
        every: A block stands before each layer whose number, counted from 1, is a multiple of this. Flamingo has 1, 4 or 7,
            growing with the model.
        attend_to: `all` media of the sample that stand before a token (Llama 3.2), or only the `last` of them (Flamingo);
            media without text between them are seen together.
        num_heads: Heads of the attention.
        head_dim: Width of a head.
        tune: What of the blocks is trained. They can be frozen only where their gates come from another run.
    """

    def __init__(
        self,
        every: int = 4,
        attend_to: AttendTo = "all",
        num_heads: int = 8,
        head_dim: int = 64,
        tune: Tune = _FULL,
    ) -> None:
        super().__init__(tune)
        for name, value in {"every": every, "num_heads": num_heads, "head_dim": head_dim}.items():
            if value < 1:
                raise ValueError(f"{name} of GatedCrossAttentionFusion must be at least 1, got {value}")
        self.every = every
        self.attend_to = attend_to
        self.num_heads = num_heads
        self.head_dim = head_dim
        self._is_open = False

    @property
    def gates(self) -> dict[str, nn.Parameter]:
        names = [f"blocks.{number}.attention_gate" for number in self.blocks]
        return {name: self.get_parameter(name) for name in names}

    def num_placeholders(self, num_embeddings: int) -> int:
        return 0

    def build(self, language_model: "LanguageModel") -> None:
        """Makes the blocks, called by the index of the layer that they stand before.

        Raises:
            ValueError: The language model has fewer layers than `every`.
        """
        num_layers, size = len(language_model.decoder_layers), language_model.hidden_size
        if num_layers < self.every:
            raise ValueError(
                f"fusion.every is {self.every}, but the language model has {num_layers} layers, so none would see the media: "
                f"set it to {num_layers} or less"
            )
        numbers = range(self.every - 1, num_layers, self.every)
        self.blocks = nn.ModuleDict({str(number): GatedBlock(size, self.num_heads, self.head_dim) for number in numbers})
        self.apply_tune(self)

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
            _check_no_placeholders(placed)
        if not media:
            yield embeddings_BTD
            return
        if self._is_open:
            raise RuntimeError(
                "the model is in the middle of a batch with media: give it one at a time, also from several threads"
            )
        memory = gather(media, segments_BT, self.attend_to, branches_BT)
        layers = language_model.decoder_layers
        hooks = []
        self._is_open = True
        try:
            for layer, block in self.blocks.items():
                hooks.append(layers[int(layer)].register_forward_pre_hook(_Look(block, memory), with_kwargs=True))
            yield embeddings_BTD
        finally:
            self._is_open = False
            for hook in hooks:
                hook.remove()


class GatedBlock(nn.Module):
    """Attention to media and a feed-forward layer, each behind a gate that is shut at first.

    Args:
        size: Width D of the language model.
        num_heads: Heads of the attention.
        head_dim: Width of a head.
    """

    def __init__(self, size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.attention = CrossAttention(size, size, num_heads, head_dim)
        self.attention_gate = nn.Parameter(torch.zeros(1, dtype=torch.float32))
        self.feed_forward = FeedForward(size)
        self.feed_forward_gate = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    def forward(
        self, hidden_BTD: Tensor, memory_BKD: Tensor, sees_BTK: Tensor, keys_values: KeysValues | None = None
    ) -> tuple[Tensor, KeysValues]:
        """The hidden states after the block, and the keys and values, with which it need not compute them again.

        Args:
            hidden_BTD: The language model's hidden states.
            memory_BKD: Embedded media of each row.
            sees_BTK: Which of them a token sees; where it sees none its hidden state stays exactly as it is.
            keys_values: What an earlier call made of the same `memory_BKD`.
        """
        dtype = self.attention_gate.dtype
        if keys_values is None:
            keys_values = self.attention.keys_values(memory_BKD.to(dtype))
        is_blind_BT1 = ~sees_BTK.any(-1, keepdim=True)
        own_BTD = hidden_BTD.to(dtype)
        # softmax over nothing is not defined: the blind see all, and it is left out below
        read_BTD = self.attention(own_BTD, keys_values, sees_BTK | is_blind_BT1)
        change_BTD = self.attention_gate.tanh() * read_BTD
        change_BTD = change_BTD + self.feed_forward_gate.tanh() * self.feed_forward(own_BTD + change_BTD)
        return hidden_BTD + change_BTD.masked_fill(is_blind_BT1, 0).to(hidden_BTD.dtype), keys_values


@dataclass
class Memory:
    """The embedded media of each row, and where they stand.

    Args:
        embeddings_BKD: The embeddings, padded with 0.
        position_BK: Index of the token that each stands before.
        segment_BK: The sample that each belongs to; 0 is padding.
        segments_BT: The samples that the tokens of the row belong to.
        attend_to: See `GatedCrossAttentionFusion`.
        branch_BK: The answer in the row that each belongs to; 0: all of the sample. None: there are no answers.
        branches_BT: The answers that the tokens of the row belong to.
    """

    embeddings_BKD: Tensor
    position_BK: Tensor
    segment_BK: Tensor
    segments_BT: Tensor
    attend_to: AttendTo
    branch_BK: Tensor | None = None
    branches_BT: Tensor | None = None
    _seen: tuple[int, Tensor] | None = None

    def seen_by(self, num_tokens: int) -> Tensor:
        """Which media the tokens of a forward pass see: sees_BTK.

        Args:
            num_tokens: Those of the row, and maybe more that were generated since; or 1: the newest token alone, as with a
                cache of keys and values.
        """
        if self._seen is None or self._seen[0] != num_tokens:  # the same for each block
            self._seen = num_tokens, self._seen_by(num_tokens)
        return self._seen[1]

    def _seen_by(self, num_tokens: int) -> Tensor:
        known = self.segments_BT.shape[1]
        assert num_tokens >= known or num_tokens == 1, f"{num_tokens} of {known} tokens: it is not known which they are"
        first = 0 if num_tokens >= known else known
        position_T = torch.arange(first, first + num_tokens, device=self.segments_BT.device)
        known_T = position_T.clamp(max=known - 1)
        segment_BT1 = self.segments_BT[:, known_T, None]  # what is generated goes on with the last sample
        before_BTK = self.position_BK[:, None] <= position_T[:, None]
        sees_BTK = before_BTK & (self.segment_BK[:, None] == segment_BT1) & (segment_BT1 > 0)
        if self.branches_BT is not None and self.branch_BK is not None:
            sees_BTK &= (self.branch_BK[:, None] == 0) | (self.branch_BK[:, None] == self.branches_BT[:, known_T, None])
        if self.attend_to == "last":
            position_BTK = self.position_BK[:, None].where(sees_BTK, -1)
            sees_BTK &= position_BTK == position_BTK.amax(-1, keepdim=True)
        return sees_BTK


def gather(media: Sequence[PlacedMedia], segments_BT: Tensor, attend_to: AttendTo, branches_BT: Tensor | None = None) -> Memory:
    """Brings the media of each row together, whatever their modality; each belongs to the sample of the token after it.

    Args:
        media: At least one modality's.
        segments_BT: The sample in the row that a token belongs to.
        attend_to: See `GatedCrossAttentionFusion`.
        branches_BT: The answer in the row that a token belongs to.
    """
    embeddings_PD = torch.cat([_real(placed.embeddings_OMD, placed) for placed in media])
    row_P = torch.cat([_real(placed.row_O[:, None], placed) for placed in media])
    position_P = torch.cat([_real(placed.position_O[:, None], placed) for placed in media])
    row_P, order_P = row_P.sort(stable=True)
    num_B = row_P.bincount(minlength=len(segments_BT))
    column_P = torch.arange(len(row_P), device=row_P.device) - (num_B.cumsum(0) - num_B)[row_P]
    place = (row_P, column_P)

    shape = (len(segments_BT), int(num_B.max()))
    position_BK = position_P.new_zeros(shape).index_put(place, position_P[order_P])
    token_P = row_P, position_P[order_P].clamp(max=segments_BT.shape[1] - 1)
    segment_P = segments_BT[token_P]
    branch_BK = None
    if branches_BT is not None:
        branch_BK = branches_BT.new_zeros(shape).index_put(place, branches_BT[token_P])
    return Memory(
        embeddings_BKD=embeddings_PD.new_zeros(*shape, embeddings_PD.shape[-1]).index_put(place, embeddings_PD[order_P]),
        position_BK=position_BK,
        segment_BK=segments_BT.new_zeros(shape).index_put(place, segment_P),
        segments_BT=segments_BT,
        attend_to=attend_to,
        branch_BK=branch_BK,
        branches_BT=branches_BT,
    )


def _real(x_OMX: Tensor, media: PlacedMedia) -> Tensor:
    """The entries of real embeddings, in one list; what all embeddings of an item share is repeated."""
    shape_OM = media.embeddings_OMD.shape[:2]
    x_OMX = x_OMX.expand(*shape_OM, *x_OMX.shape[2:])
    return x_OMX.flatten(0, 1) if media.mask_OM is None else x_OMX[media.mask_OM]


class _Look:
    """The hook of a layer: puts a block before it. What it holds lasts as long as the hook does."""

    def __init__(self, block: nn.Module, memory: Memory) -> None:
        self.block = block
        self.memory = memory
        self.keys_values: KeysValues | None = None

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden_BTD: Tensor = args[0] if args else kwargs["hidden_states"]
        assert hidden_BTD.shape[::2] == self.memory.embeddings_BKD.shape[::2], f"got hidden states {tuple(hidden_BTD.shape)}"
        sees_BTK = self.memory.seen_by(hidden_BTD.shape[1])
        hidden_BTD, self.keys_values = self.block(hidden_BTD, self.memory.embeddings_BKD, sees_BTK, self.keys_values)
        return ((hidden_BTD, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden_BTD})


def _check_no_placeholders(media: PlacedMedia) -> None:
    placeholders_B = media.placeholder_BT.sum(1)
    if bool(placeholders_B.any()) or bool(media.num_tokens_O.any()):
        rows = placeholders_B.index_add(0, media.row_O, media.num_tokens_O)
        row = int(rows.nonzero()[0])
        raise ValueError(
            f"row {row} of the batch has {int(placeholders_B[row])} media placeholders, but GatedCrossAttentionFusion keeps "
            "media out of the row: make the rows with a processor that knows the fusion, such as that of the LitModule"
        )
