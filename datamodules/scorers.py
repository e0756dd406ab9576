"""What says how good an answer is, from 0 to 1.

The same objects judge preference data (`RewardCriterion`), reward sampled answers in reinforcement learning, and measure answers
in an evaluation. Those that need a model are in `lightning_modules/rewards.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from datamodules.batch import Modality
from datamodules.media import Decoded


@dataclass(frozen=True)
class Response:
    """An answer that is to be scored.

    Args:
        prompt: The last user message before it, as text without its media.
        response: The answer, as text.
        media: The decoded media of the conversation, by modality, in order; there for scorers that need them.
        columns: What else the row has, by its own keys, such as a solution.
    """

    prompt: str
    response: str
    media: Mapping[Modality, Sequence[Decoded]] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)


class Scorer(ABC):
    """Scores answers from 0, bad, to 1, good, each for itself.

    It is pure: the same answer has the same score, in whatever batch, process or epoch. It is sent to the processes that load
    data, so that it must be picklable: weights are read when they are first used, and not in the constructor.

    Attributes:
        name: What metrics and files call it.
        needs_media: Whether it looks at the media, which are then decoded for it.
    """

    name: ClassVar[str]
    needs_media: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, responses: Sequence[Response]) -> list[float | None]:
        """The score of each answer, in [0, 1]; None: it says nothing about this one, which is not the same as 0.

        Args:
            responses: The answers; they need not belong together.
        """
