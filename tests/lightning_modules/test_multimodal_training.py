"""What trains in a fit of the LitModule, and what does not."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor, nn

from datamodules.batch import Batch
from encoders.image import HFVisionEncoder, TimmEncoder
from encoders.projectors import LinearProjector, MLPProjector
from encoders.tuning import LoRA, Tune
from lightning_modules.multimodal import MultiModalLitModule, Stage
from models.language import LanguageModel
from tests.lightning_modules.run_fakes import Watch, examples, make_data, make_trainer, weights, write_rows

pytestmark = pytest.mark.usefixtures("seed")

MakeModule = Callable[..., MultiModalLitModule]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 8)


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.1)


def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def test_it_fits_from_python(make_lit_module: MakeModule, rows: Path, tmp_path: Path) -> None:
    module = make_lit_module()
    trainer = make_trainer(tmp_path)
    trainer.fit(module, make_data(module, rows, val_path=str(rows)))
    assert trainer.global_step == 4
    assert {"train/loss", "val/loss", "val/exact_match", "val/accuracy", "val/media_gain"} <= trainer.callback_metrics.keys()


def test_constructors_make_no_weights_and_read_nothing() -> None:
    tune = Tune(mode="lora", lora=LoRA(target_modules=("qkv",)))
    for encoder in (HFVisionEncoder("no/such/encoder"), TimmEncoder("vit_tiny_patch16_224", tune=tune)):
        module = MultiModalLitModule(LanguageModel("no/such/model"), encoder, MLPProjector(), init_from="no/such.ckpt")
        assert not list(module.parameters()) and not list(module.buffers())


def test_configure_model_builds_once(make_lit_module: MakeModule) -> None:
    module = make_lit_module()
    module.configure_model()
    before = {name: id(parameter) for name, parameter in module.named_parameters()}
    module.configure_model()
    assert before and {name: id(parameter) for name, parameter in module.named_parameters()} == before


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_a_warm_up_beyond_the_run_is_refused(make_lit_module: MakeModule, ratio: float) -> None:
    with pytest.raises(ValueError, match=f"model.warmup_ratio.*{ratio}"):
        make_lit_module(warmup_ratio=ratio)


class TestOptimizer:
    def rates(self, module: MultiModalLitModule, rows: Path, folder: Path, **options: Any) -> list[dict[str, float]]:
        """By optimizer step and group the learning rate with which the step was made."""
        seen: list[dict[str, float]] = []

        class Rates(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                seen.append({group["name"]: group["lr"] for group in self.param_groups})
                return super().step(closure)

        module.optimizer = lambda groups: Rates(groups, lr=0.1)
        make_trainer(folder, **options).fit(module, make_data(module, rows, val_path=str(rows)))
        return seen

    def test_each_part_has_its_learning_rate_on_one_schedule(
        self, make_lit_module: MakeModule, rows: Path, tmp_path: Path
    ) -> None:
        module = make_lit_module(image_projector=MLPProjector(tune=Tune(lr=0.02)), warmup_ratio=0.25)
        seen = self.rates(module, rows, tmp_path, max_epochs=2)
        cosine = [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
        factors = [0, 0.5, *cosine]
        assert [step["language_model"] for step in seen] == pytest.approx([0.1 * factor for factor in factors])
        for name in ("image_projector", "image_projector/no_decay"):
            assert [step[name] for step in seen] == pytest.approx([0.02 * factor for factor in factors])
        assert seen[0].keys() == {"language_model", "image_projector", "image_projector/no_decay"}  # the encoder is frozen

    @pytest.mark.parametrize(("interval", "expected"), [("step", [0.1, 0.05, 0.025, 0.0125]), ("epoch", [0.1, 0.1, 0.05, 0.05])])
    def test_another_scheduler_steps_as_it_is_told(
        self, make_lit_module: MakeModule, rows: Path, tmp_path: Path, interval: str, expected: list[float]
    ) -> None:
        module = make_lit_module(
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
            lr_scheduler_interval=interval,
        )
        seen = self.rates(module, rows, tmp_path, max_epochs=2, limit_train_batches=2)
        assert [step["language_model"] for step in seen] == pytest.approx(expected)

    def test_a_scheduler_may_follow_a_metric(self, make_lit_module: MakeModule, rows: Path, tmp_path: Path) -> None:
        plateau = {"monitor": "val/loss", "factor": 0.5, "patience": 0, "threshold": 100.0, "threshold_mode": "abs"}
        module = make_lit_module(lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, **plateau))
        seen = self.rates(module, rows, tmp_path, max_epochs=3, limit_train_batches=1)
        assert [step["language_model"] for step in seen] == pytest.approx([0.1, 0.1, 0.05])

    def test_a_schedule_without_end_is_refused(self, make_lit_module: MakeModule, rows: Path, tmp_path: Path) -> None:
        module = make_lit_module()
        with pytest.raises(ValueError, match=r"trainer\.max_steps"):
            make_trainer(tmp_path, max_epochs=-1).fit(module, make_data(module, rows))

    @pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 1), (2, 2), (1, 4)])
    def test_a_step_is_the_same_in_one_batch_and_in_several(
        self, make_lit_module: MakeModule, rows: Path, tmp_path: Path, batch_size: int, accumulate: int
    ) -> None:
        module = make_lit_module(optimizer=sgd, lr_scheduler=constant)
        module.configure_model()
        other = copy.deepcopy(module)
        data = make_data(module, rows, shuffle=False, batch_size=batch_size)
        options = {"accumulate_grad_batches": accumulate, "max_steps": 1, "gradient_clip_val": 1e9, "log_every_n_steps": 1}
        trainer = make_trainer(tmp_path, **options)
        trainer.fit(module, data)
        four = data.collate(examples(data)[:4])
        assert len({int((row != -100).sum()) for row in four["labels_BT"]}) > 1  # or a mean of means would do
        total, count = other.step(four, "train") or (None, None)
        (total / count).backward()
        assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(float(total / count), rel=1e-5)
        with torch.no_grad():
            for name, parameter in other.model.named_parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                assert torch.allclose(parameter, module.model.get_parameter(name), atol=1e-6), name


def test_what_is_frozen_stays_as_it_is(tiny_llm: Path, tmp_path: Path, rows: Path) -> None:
    """A CNN with batch norm and dropout, frozen beside a language model with LoRA; validated in the middle of training."""
    encoder = TimmEncoder("resnet10t", pretrained=False, image_size=32, tune=Tune(mode="frozen"))
    lora = LoRA(dropout=0.5)
    module = MultiModalLitModule(
        LanguageModel(str(tiny_llm), tune=Tune(mode="lora", lora=lora)), encoder, LinearProjector(), optimizer=sgd
    )
    modes: list[tuple[set[bool], set[bool]]] = []
    frozen: list[dict[str, Tensor]] = []

    def look(trainer: Any, module: MultiModalLitModule) -> None:
        parts = module.model.image_encoder, module.model.language_model
        dropouts = [m for m in parts[1].modules() if isinstance(m, nn.Dropout)]
        modes.append(({m.training for m in parts[0].modules()}, {m.training for m in dropouts}))
        frozen.append({name: tensor for name, tensor in weights(module).items() if name.startswith("image_encoder")})

    options = {"max_epochs": 2, "val_check_interval": 1, "limit_train_batches": 2}
    make_trainer(tmp_path, Watch(look), **options).fit(module, make_data(module, rows, val_path=str(rows)))
    assert modes == [({False}, {True})] * 4
    assert any("running_mean" in name for name in frozen[0])
    assert all(torch.equal(frozen[-1][name], tensor) for name, tensor in frozen[0].items())
    assert {torch.equal(frozen[-1][name], tensor) for name, tensor in weights(module).items() if name in frozen[0]} == {True}


class Scaled(MultiModalLitModule):
    """What a researcher writes.

    Args:
        beta: Factor of the loss.
    """

    def __init__(self, *args: Any, beta: float = 0.5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.beta = beta

    def step(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor] | None:
        """The loss, scaled."""
        loss = super().step(batch, stage)
        return loss if loss is None or stage != "train" else (self.beta * loss[0], loss[1])


def test_a_subclass_needs_its_own_option_and_its_step(make_lit_module: MakeModule, rows: Path, tmp_path: Path) -> None:
    trained: dict[float, dict[str, Tensor]] = {}
    start: dict[str, Tensor] = {}
    for beta in (0.0, 0.5, 1.0):
        torch.manual_seed(4)
        plain = make_lit_module()
        module = Scaled(
            plain.model.language_model,
            plain.model.image_encoder,
            plain.model.image_projector,
            optimizer=sgd,
            lr_scheduler=constant,
            beta=beta,
        )
        module.configure_model()
        start = weights(module)
        make_trainer(tmp_path, max_steps=1).fit(module, make_data(module, rows, shuffle=False))
        trained[beta] = weights(module)
    moved = {name for name, tensor in start.items() if not torch.equal(trained[1.0][name], tensor)}
    assert any("lora_B" in name for name in moved)
    for name, tensor in start.items():
        assert torch.equal(trained[0.0][name], tensor)
        assert torch.allclose(trained[0.5][name] - tensor, 0.5 * (trained[1.0][name] - tensor), atol=1e-6)


def test_a_subclass_resolves_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from train import main

    arguments = ["--model", f"{__name__}.Scaled", "--model.beta=0.25", "--model.warmup_ratio=0.5", "--trainer.max_steps=1"]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.limit_val_batches", "0"]
    cli = main(
        ["fit", "--config", "configs/sft/tiny.yaml", "--trainer.default_root_dir", str(tmp_path), *arguments, *quiet],
    )
    assert type(cli.model) is Scaled
    assert (cli.model.beta, cli.model.warmup_ratio) == (0.25, 0.5)
    assert cli.model.generation.max_new_tokens == 8  # of the recipe
    assert cli.trainer.global_step == 1
