"""How answers are decoded.

Shape suffixes: B rows, T positions.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Generation:
    """How answers are decoded, by Hugging Face's `generate`.

    Args:
        max_new_tokens: Length of an answer, in tokens, end token included.
        temperature: 0 is greedy decoding; above 0 the logits are divided by it and a token is drawn.
        top_p: Draw from the fewest tokens whose probabilities sum to this.
        top_k: Draw from this many likeliest tokens; 0 is all.
        repetition_penalty: Above 1 makes tokens of the answer so far less likely.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"generation.max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"generation.temperature must be 0 (greedy) or above, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"generation.top_p is a sum of probabilities, in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"generation.top_k is a number of tokens, or 0 for all, got {self.top_k}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"generation.repetition_penalty must be above 0, got {self.repetition_penalty}; 1 is none")


def continue_prompts(
    model: "PreTrainedModel",
    prompts: Mapping[str, Any],
    segments_BT: Tensor,
    options: Generation,
    eos_ids: Iterable[int],
    pad_id: int,
    is_shared: bool,
) -> Tensor:
    """Continues left-padded prompts with a key-value cache: what `generate` of transformers makes of them.

    Args:
        model: A causal LM.
        prompts: Arguments of its `generate` that hold the prompts, as token ids or embedded.
        segments_BT: 0 where a position is padding.
        options: How to decode.
        eos_ids: Tokens that end an answer.
        pad_id: Fills answers that ended early.
        is_shared: Whether processes share its weights: each goes on until the last has ended.
    """
    from transformers import GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    sampling = {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k}
    config = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        do_sample=options.temperature > 0,
        use_cache=True,
        eos_token_id=sorted(eos_ids),
        pad_token_id=pad_id,
        **(sampling if options.temperature > 0 else {}),
    )
    processors = LogitsProcessorList()
    if options.repetition_penalty != 1:
        # The config's own would spare as many tokens of an answer as its prompt has of padding, where prompts are embedded.
        given = segments_BT.shape[1] if "input_ids" in prompts else 0
        processors.append(RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty), prompt_ignore_length=given))
    return model.generate(  # type: ignore[operator]  # a mixin that every causal LM has
        **prompts,
        synced_gpus=is_shared,
        attention_mask=(segments_BT > 0).long(),
        generation_config=config,
        logits_processor=processors,
    )
