"""A reward model's head: one number of the last hidden state.

Shape suffixes: A answers, D hidden size.
"""

import torch
from torch import Tensor, nn

from encoders.base import Part
from encoders.tuning import Tune

_FULL = Tune(mode="full")


class RewardHead(Part):
    """A linear layer without bias, in float32, whose weights start with variance 1 / (D + 1) (Stiennon et al. 2020, arXiv
    2009.01325, appendix B.1).

    Args:
        tune: What of it is trained, and how fast.
    """

    def __init__(self, tune: Tune = _FULL) -> None:
        super().__init__(tune)

    def build(self, hidden_size: int) -> None:
        """Makes the weights.

        Args:
            hidden_size: Width D of the language model.
        """
        self.score = nn.Linear(hidden_size, 1, bias=False, dtype=torch.float32)
        nn.init.normal_(self.score.weight, std=(hidden_size + 1) ** -0.5)
        self.apply_tune(self.score)

    def forward(self, hidden_AD: Tensor) -> Tensor:
        """Hidden states to rewards, reward_A."""
        with torch.autocast(hidden_AD.device.type, enabled=False):
            return self.score(hidden_AD.float())[:, 0]
