"""What a process has of what trains, and of the optimizer's state, where DeepSpeed has cut both; a checkpoint has them whole."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Place = tuple[slice, slice]
"""Which values of a weight, in one row, a process has, and where in its share; both may be empty."""


class Shares:
    """The shares of ZeRO-2: of all weights of a group in one row, each process has a piece, which ends in the midst of one.

    Args:
        zero: The engine's optimizer, around that of the run.
        device: Over which the processes exchange tensors.
    """

    def __init__(self, zero: Any, device: torch.device) -> None:
        self.zero = zero
        self.device = device
        self.optimizer: torch.optim.Optimizer = zero.optimizer

    def groups(self) -> list[tuple[list[nn.Parameter], Tensor]]:
        """By group of the optimizer the weights, and the share of them that this process trains, in one row."""
        groups = zip(self.zero.bit16_groups, self.optimizer.param_groups, strict=True)
        return [(weights, group["params"][0]) for weights, group in groups]

    def shape(self, weight: Any) -> torch.Size:
        """Of the whole weight."""
        shape: torch.Size = weight.shape
        return shape

    def place(self, weight: Any) -> Place:
        """Where the share of a weight is."""
        if (mapping := weight._hp_mapping) is None:  # set by the engine
            return slice(0, 0), slice(0, 0)
        mine, here = mapping.lp_fragment_address, mapping.hp_fragment_address
        return slice(mine.start, mine.start + mine.numel), slice(here.start, here.start + here.numel)

    def whole_state(self, is_first: bool) -> dict[str, Any]:
        """The state of the optimizer as torch has it, weight by weight; the processes must meet here.

        Args:
            is_first: This process keeps the values; others only help.

        Raises:
            ValueError: The optimizer keeps what is not one number a value.
        """
        state: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        number = 0
        for (weights, share), group in zip(self.groups(), self.optimizer.param_groups, strict=True):
            groups.append({**group, "params": list(range(number, number + len(weights)))})
            values = self.optimizer.state.get(share, {})
            for weight in weights:
                own = {name: self._whole(value, share, weight) for name, value in values.items()}
                if own and is_first:
                    state[number] = own
                number += 1
        return {"state": state, "param_groups": groups}

    def load_state(self, saved: Mapping[str, Any]) -> None:
        """Takes this process's share of a state as torch has it."""
        state: dict[int, dict[str, Any]] = {}
        groups = self.groups()
        for number, ((weights, share), group) in enumerate(zip(groups, saved["param_groups"], strict=True)):
            of_weights = [saved["state"].get(of_weight, {}) for of_weight in group["params"]]
            for name in {name: None for values in of_weights for name in values}:
                values = [values.get(name) for values in of_weights]
                state.setdefault(number, {})[name] = self._own(name, values, share, weights)
        self.put(state, [{**group, "params": [number]} for number, group in enumerate(saved["param_groups"])])

    def put(self, state: dict[int, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        """Gives the optimizer the state of its shares, numbered by group."""
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _whole(self, value: Any, share: Tensor, weight: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value  # such as the number of steps
        if value.shape != share.shape:
            raise ValueError(
                "trainer.strategy: ZeroStrategy cuts weights into shares without regard to their shape, and the optimizer keeps "
                "what is not one number a value: take one that treats each value by itself, such as AdamW, or "
                "configs/strategy/ddp.yaml"
            )
        shape, (mine, here) = self.shape(weight), self.place(weight)
        whole = value.new_zeros(shape.numel(), device=self.device)
        whole[mine] = value[here].to(self.device)
        dist.all_reduce(whole)
        return whole.view(shape).cpu()

    def _own(self, name: str, values: Sequence[Any], share: Tensor, weights: Sequence[nn.Parameter]) -> Any:
        """The share of a state that is given by weight; None: a weight has none yet."""
        first = next(value for value in values if value is not None)
        if name == "step" or not isinstance(first, Tensor):
            return first
        own = torch.zeros_like(share, dtype=first.dtype)
        for value, weight in zip(values, weights, strict=True):
            if value is not None:
                mine, here = self.place(weight)
                own[here] = value.flatten()[mine]
        return own


class SharesOfWeights(Shares):
    """The shares of ZeRO-3: of each weight by itself a process has a piece, the last of which may be shorter, or empty."""

    def groups(self) -> list[tuple[list[nn.Parameter], Tensor]]:
        return list(zip(self.zero.fp16_groups, self.zero.fp32_partitioned_groups_flat, strict=True))

    def shape(self, weight: Any) -> torch.Size:
        shape: torch.Size = weight.ds_shape
        return shape

    def place(self, weight: Any) -> Place:
        _, start, size = self.zero.grad_position[self.zero.get_param_id(weight)]
        first = min(size * dist.get_rank(), weight.ds_numel)
        number = min(size, weight.ds_numel - first)
        return slice(first, first + number), slice(start, start + number)

    def put(self, state: dict[int, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        for (_, share), group in zip(self.groups(), self.optimizer.param_groups, strict=True):
            group["params"] = [share]
        super().put(state, groups)
        for group in self.optimizer.param_groups:
            group["params"] = []  # the engine says in each step which shares it makes it for
