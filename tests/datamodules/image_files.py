"""Image files of a test."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


def noise(*shape: int, below: int = 256) -> np.ndarray:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(11)).numpy()


def put(folder: Path, content: Image.Image | bytes, image_format: str = "", **options: Any) -> str:
    """Writes a file, and returns it as a source."""
    if isinstance(content, Image.Image):
        content.save(folder / "picture", image_format, **options)
    else:
        (folder / "picture").write_bytes(content)
    return "picture"
