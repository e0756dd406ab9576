"""What a process and its sandbox say to each other: a message is the length of its head, the head, and the bytes of arrays.

What comes out of the sandbox is numbers and texts, never a pickle: whatever a file does to its decoder stays in there.
"""

import json
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.media_audio import AudioHeader, Waveform
from datamodules.media_video import Clip
from datamodules.video_header import VideoHeader

_LENGTH = struct.Struct(">Q")


def _fields(*values: Any) -> tuple[Any, ...]:
    return values


_KINDS: dict[str, Callable[..., Any]] = {
    "Image": Image.fromarray,
    "Clip": Clip,
    "Waveform": Waveform,
    "VideoHeader": VideoHeader,
    "AudioHeader": AudioHeader,
    "tuple": _fields,
}
"""What a sandbox may give, and how it is made of its fields."""


def send(link: socket.socket, head: bytes, arrays: Sequence[NDArray[Any]] = ()) -> None:
    """Sends a message.

    Raises:
        OSError: The other side has ended, or does not take it in time.
    """
    link.sendall(_LENGTH.pack(len(head)) + head)
    for array in arrays:
        link.sendall(array.reshape(-1).view(np.uint8).data)


def receive(link: socket.socket) -> bytearray:
    """The head of the next message.

    Raises:
        EOFError: The other side has ended.
        OSError: As `EOFError`, or nothing came in time.
    """
    length = bytearray(_LENGTH.size)
    _fill(link, memoryview(length))
    head = bytearray(_LENGTH.unpack(length)[0])
    _fill(link, memoryview(head))
    return head


def send_result(link: socket.socket, result: Any) -> None:
    """Sends what a function gave: a picture, a tuple of numbers, or a dataclass whose fields are numbers, texts and arrays."""
    match result:
        case Image.Image():
            pixels_HW3 = np.frombuffer(result.tobytes(), np.uint8).reshape(result.height, result.width, 3)
            values: Sequence[Any] = [pixels_HW3]  # numpy's own way to them takes seven times as long
        case tuple():
            values = result
        case _:
            values = list(vars(result).values())
    arrays = [np.ascontiguousarray(value) for value in values if isinstance(value, np.ndarray)]
    fields = [[value.dtype.str, value.shape] if isinstance(value, np.ndarray) else value for value in values]
    send(link, json.dumps({"kind": type(result).__name__, "fields": fields}).encode(), arrays)


def receive_result(link: socket.socket, head: Mapping[str, Any]) -> Any:
    """What `send_result` sent.

    Args:
        link: From where the arrays are still to come.
        head: The head of the message.
    """
    values = list(head["fields"])
    for place, value in enumerate(values):
        if isinstance(value, list):
            array = np.empty(value[1], np.dtype(value[0]))
            _fill(link, array.reshape(-1).view(np.uint8).data)
            values[place] = array
    return _KINDS[head["kind"]](*values)


def _fill(link: socket.socket, view: memoryview) -> None:
    place = 0
    while place < len(view):
        num_bytes = link.recv_into(view[place:])
        if num_bytes == 0:
            raise EOFError("the other side has ended")
        place += num_bytes
