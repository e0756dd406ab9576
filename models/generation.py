"""How answers are decoded."""

from dataclasses import dataclass


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
