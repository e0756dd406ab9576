import pytest
import torch
from PIL import Image

from datamodules.parts import media_shape, part_from_spec


def test_media_shape() -> None:
    assert media_shape(Image.new("RGB", (30, 20))) == (20, 30)
    assert media_shape(torch.ones(4, 20, 30)) == (4, 20, 30)


@pytest.mark.parametrize("path", ["encoders.base.NoSuchPart", "no_such_module.Part", "Part"])
def test_a_class_that_is_not_there_is_named(path: str) -> None:
    with pytest.raises(ValueError, match=f"needs the class '{path}', which is not there"):
        part_from_spec({"class_path": path, "init_args": {}})
