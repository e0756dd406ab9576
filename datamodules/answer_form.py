"""What an objective wants an example to be: one answer, a pair of them, or answers with feedback."""

from dataclasses import dataclass, field
from typing import Literal

from datamodules.corrupt import MediaCorruption


@dataclass(frozen=True)
class AnswerForm:
    """Which answers of a row an example has. It comes from the model's objective, so that any data serves any objective.

    Args:
        kind: `single`: the answer of the row, of a preference row the chosen one. `pairs`: the chosen answer and each rejected
            one. `feedback`: each answer with its label; of a pair the chosen one is desirable, the rejected ones are not.
        corrupt_media: Add the chosen answer behind corrupted media (mDPO, Wang et al. 2024, arXiv 2406.11839).
        corruption: How they are corrupted. It is drawn from the seed and the row, the same in each epoch.
        mismatched: Add to each row the answers of another row of the batch (KTO's estimate of the divergence, Ethayarajh et
            al. 2024, arXiv 2402.01306, section 4.1).
        scores_answers: Prediction is about the answers that rows have (a reward model), not about prompts.
        takes_margin: The loss reads the margin of a pair.
        shared_prompt: Answers share the tokens of their prompt where they can; False: each answer is a row of its own.
    """

    kind: Literal["single", "pairs", "feedback"] = "single"
    corrupt_media: bool = False
    corruption: MediaCorruption = field(default_factory=MediaCorruption)
    mismatched: bool = False
    scores_answers: bool = False
    takes_margin: bool = False
    shared_prompt: bool = True
