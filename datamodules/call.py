"""A way to call a function: here, or in another process."""

from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Call(Protocol):
    """Calls a function of the data side that reads a file."""

    def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What the function gives for its arguments."""


def call_here(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls it as usual."""
    return function(*args, **kwargs)
