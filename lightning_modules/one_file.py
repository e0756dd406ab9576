"""What strategies have in common that cut a model into shares when its weights are there, and save it in one file."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.strategies import ParallelStrategy

from models.zero import check_whole


class OneFileStrategy(ParallelStrategy):
    """Takes up weights and checkpoints while a model is whole, and writes checkpoints of one file, as on one device.

    To be named before the strategy of Lightning or of another library that cuts the model.
    """

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False  # the model takes up a checkpoint while it is whole

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Nothing: the weights are read whole, on the processor, and are cut afterwards."""
        yield

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Writes a file, as on one device."""
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)  # not that of the library

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint of any strategy that is a file.

        Raises:
            ValueError: It is a folder, damaged, or no checkpoint of ours.
        """
        return self.checkpoint_io.load_checkpoint(self.broadcast(checkpoint_path))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads the weights of a checkpoint, before they are cut.

        Raises:
            ValueError: They have been.
        """
        module: Any = self.lightning_module
        check_whole(module.model)
        module.load_state_dict(checkpoint["state_dict"], strict=strict)
