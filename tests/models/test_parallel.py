"""How a model would be spread over processes, and what is refused; the processes are in test_strategies.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from encoders.tuning import LoRA, Tune
from models.language import LanguageModel
from models.multimodal import MultiModalModel
from models.parallel import parallelize, split, tensor_plan
from models.spread import clip_norm, spread_like, total_norm, whole
from tests.lightning_modules.processes import in_two_processes

MakeModel = Callable[..., MultiModalModel]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "granite", "cohere"])
def test_the_plan_of_a_family_names_layers_that_are_there(model_folder: Callable[[str], Path], family: str) -> None:
    model = LanguageModel(str(model_folder(family)))
    model.build()
    plan = tensor_plan(model)
    for layer in model.decoder_layers:
        linear = {name.removesuffix(".base_layer") for name, child in layer.named_modules() if isinstance(child, nn.Linear)}
        named = {name.partition(".lora_")[0] for name in linear}
        assert named == {name for name, style in plan.items() if style != "replicated_with_grad_allreduce"}


@pytest.mark.parametrize("family", ["gpt2", "falcon_h1"])
def test_other_families_are_refused(model_folder: Callable[[str], Path], family: str) -> None:
    model = LanguageModel(str(model_folder(family)))
    with pytest.raises(ValueError, match=rf"{family}\) cannot be split.*Set tensor_parallel_size to 1"):
        tensor_plan(model)


class Mesh:
    """A mesh of so many processes, of which nobody has to be there to be refused."""

    def __init__(self, **sizes: int) -> None:
        self.sizes = sizes

    def __getitem__(self, name: str) -> "Mesh":
        return Mesh(one=self.sizes[name])

    def size(self) -> int:
        return next(iter(self.sizes.values()))


def test_heads_that_cannot_be_shared_out_are_refused(make_model: MakeModel) -> None:
    model = make_model(images=False)
    with pytest.raises(ValueError, match="tensor_parallel_size 3 does not divide the 4 num_attention_heads"):
        split(model.language_model, Mesh(tensor_parallel=3))  # type: ignore[arg-type]


def test_dora_is_refused(make_model: MakeModel) -> None:
    model = make_model(images=False, tune=Tune(mode="lora", lora=LoRA(use_dora=True)))
    with pytest.raises(ValueError, match=r"self_attn\.q_proj has DoRA"):
        split(model.language_model, Mesh(tensor_parallel=2))  # type: ignore[arg-type]


def test_quantised_weights_are_refused(make_model: MakeModel) -> None:
    model = make_model(images=False)
    layer = model.language_model.decoder_layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"1 weights are quantised.*up_proj\.weight.*ddp\.yaml"):
        parallelize(model, Mesh(data_parallel=2, tensor_parallel=1))  # type: ignore[arg-type]


def test_gradients_of_all_kinds_are_clipped_as_torch_clips_those_of_one_kind() -> None:
    """In two processes: gradients that are cut, those that each process has, and those that it has as a whole DTensor."""

    def job(trainer_options: dict[str, Any]) -> None:
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        torch.distributed.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2,))
        generator = torch.Generator().manual_seed(20)
        plain = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(3, 4), (5,), (2, 2), (1, 3)]]
        for weight in plain:
            weight.grad = torch.randn(weight.shape, generator=generator)
        mixed = []
        for weight, placement in zip(plain, [Shard(0), None, Replicate(), Shard(0)], strict=True):
            assert weight.grad is not None
            pair = weight.detach().clone(), weight.grad.clone()
            own = pair if placement is None else [distribute_tensor(tensor, mesh, [placement]) for tensor in pair]
            mixed.append(nn.Parameter(own[0]))
            mixed[-1].grad = own[1]
        with pytest.raises(RuntimeError, match="mixed"):
            nn.utils.clip_grad_norm_(mixed, 0.5)
        norms = clip_norm(mixed, 0.5), nn.utils.clip_grad_norm_(plain, 0.5)
        assert torch.allclose(*norms) and norms[0] > 0.5
        assert float(total_norm([weight.grad for weight in mixed if weight.grad is not None])) == pytest.approx(0.5, rel=1e-5)
        for weight, other in zip(mixed, plain, strict=True):
            assert weight.grad is not None and other.grad is not None
            assert torch.allclose(whole(weight.grad), other.grad)
            assert torch.equal(whole(spread_like(other.grad, weight)), other.grad)

    assert in_two_processes(job) == [0, 0]
