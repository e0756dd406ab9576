import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise_adapters
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from encoders.tuning import LoRA, Tune
from models.language import Generation, LanguageModel
from tests.tiny_configs import VOCABULARY

FAMILIES = ["llama", "qwen2", "gemma2", "granite", "cohere", "gpt2", "gptj"]
LENGTHS = [7, 3, 5]
FROZEN = Tune(mode="frozen")


def built(folder: Path, **options: Any) -> LanguageModel:
    model = LanguageModel(str(folder), **({"tune": FROZEN} | options))
    model.build()
    return model.eval()


def prompts(generator: torch.Generator, side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Three rows of different length: tokens_BT, segments_BT, positions_BT."""
    longest = max(LENGTHS)
    tokens_BT = torch.zeros(len(LENGTHS), longest, dtype=torch.long)
    segments_BT, positions_BT = torch.zeros_like(tokens_BT), torch.zeros_like(tokens_BT)
    for row, length in enumerate(LENGTHS):
        span = slice(longest - length, None) if side == "left" else slice(0, length)
        tokens_BT[row, span] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        segments_BT[row, span] = 1
        positions_BT[row, span] = torch.arange(length)
    return tokens_BT, segments_BT, positions_BT


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(model_folder, generator, family, side):
    model = built(model_folder(family))
    tokens_BT, segments_BT, positions_BT = prompts(generator, side)
    with torch.no_grad():
        hidden_BTD = model(model.embed(tokens_BT), segments_BT, positions_BT)
        for row in range(len(LENGTHS)):
            own = segments_BT[row] > 0
            alone_1TD = model(*(x[row : row + 1, own] for x in (model.embed(tokens_BT), segments_BT, positions_BT)))
            torch.testing.assert_close(hidden_BTD[row, own], alone_1TD[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(model_folder, generator, family):
    model = built(model_folder(family))
    tokens_BT, segments_BT, positions_BT = prompts(generator, "right")
    with torch.no_grad():
        logits_BTV = model.head(model(model.embed(tokens_BT), segments_BT, positions_BT)) * model.logit_scale
        if model.softcap is not None:
            logits_BTV = model.softcap * torch.tanh(logits_BTV / model.softcap)
        reference = AutoModelForCausalLM.from_pretrained(model_folder(family)).eval()
        expected_BTV = reference(input_ids=tokens_BT, attention_mask=segments_BT).logits
    own_BT = segments_BT > 0
    torch.testing.assert_close(logits_BTV[own_BT], expected_BTV[own_BT], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "softcap", "logit_scale"),
    [("llama", None, 1.0), ("gemma2", 2.0, 1.0), ("granite", None, 0.25), ("cohere", None, 0.25)],
)
def test_caps_and_scales_are_read_from_the_configuration(model_folder, family, softcap, logit_scale):
    model = LanguageModel(str(model_folder(family)))
    assert (model.softcap, model.logit_scale, model.hidden_size) == (softcap, logit_scale, 32)


def test_another_transformation_of_the_logits_is_refused(model_folder):
    with pytest.raises(ValueError, match=r"FalconH1ForCausalLM.*Subclass LanguageModel"):
        built(model_folder("falcon_h1"))


def answers_of_transformers(folder: Path, tokens_BT: Tensor, mask_BT: Tensor, **options: Any) -> list[list[int]]:
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    config = GenerationConfig(pad_token_id=0, **options)
    return reference.generate(input_ids=tokens_BT, attention_mask=mask_BT, generation_config=config)[
        :, tokens_BT.shape[1] :
    ].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_transformers(model_folder, generator, family):
    model = built(model_folder(family))
    tokens_BT, segments_BT, _ = prompts(generator, "left")
    options = Generation(max_new_tokens=9)
    answers = model.generate(model.embed(tokens_BT), segments_BT, options, eos_ids=[1], pad_id=0).tolist()
    assert answers == answers_of_transformers(
        model_folder(family), tokens_BT, segments_BT, max_new_tokens=9, do_sample=False, eos_token_id=1
    )
    for row, length in enumerate(LENGTHS):
        alone = model.embed(tokens_BT[row : row + 1, -length:])
        assert model.generate(alone, torch.ones(1, length), options, eos_ids=[1], pad_id=0).tolist() == [answers[row]]


@pytest.mark.parametrize("sampling", [{"temperature": 0.8}, {"temperature": 1.3, "top_p": 0.8}, {"temperature": 1.0, "top_k": 5}])
def test_sampled_answers_are_those_of_transformers(tiny_llm, generator, sampling):
    model = built(tiny_llm)
    tokens_BT, segments_BT, _ = prompts(generator, "left")
    embeddings_BTD = model.embed(tokens_BT)
    everything = {"top_p": 1.0, "top_k": 0}
    with torch.random.fork_rng():
        torch.manual_seed(4)
        answers = model.generate(embeddings_BTD, segments_BT, Generation(max_new_tokens=9, **sampling), [1], 0).tolist()
        torch.manual_seed(4)
        expected = answers_of_transformers(
            tiny_llm, tokens_BT, segments_BT, max_new_tokens=9, do_sample=True, eos_token_id=1, **(everything | sampling)
        )
        torch.manual_seed(5)
        other = model.generate(embeddings_BTD, segments_BT, Generation(max_new_tokens=9, **sampling), [1], 0).tolist()
    assert answers == expected != other


def test_answers_end_at_any_end_token(tiny_llm, generator):
    model = built(tiny_llm)
    tokens_BT, segments_BT, _ = prompts(generator, "left")
    embeddings_BTD = model.embed(tokens_BT)
    free = model.generate(embeddings_BTD, segments_BT, Generation(max_new_tokens=9), eos_ids=[1], pad_id=0).tolist()
    ends = {free[0][2], free[1][4]}
    assert not ends & {0, 1}
    stopped = model.generate(embeddings_BTD, segments_BT, Generation(max_new_tokens=9), eos_ids=ends, pad_id=0).tolist()
    for long, short in zip(free, stopped, strict=True):
        length = next((n + 1 for n, token in enumerate(long) if token in ends), 9)
        assert short == long[:length] + [0] * (len(short) - length)
    assert stopped != free


def test_a_repetition_penalty_holds_for_the_whole_answer(tiny_llm, generator):
    model = built(tiny_llm)
    tokens_BT, segments_BT, _ = prompts(generator, "left")
    for penalty in (1.0, 1e6):
        options = Generation(max_new_tokens=40, repetition_penalty=penalty)
        answers = model.generate(model.embed(tokens_BT), segments_BT, options, [VOCABULARY + 1], pad_id=0).tolist()
        assert all(len(set(answer)) == len(answer) for answer in answers) == (penalty > 1)


def test_the_checkpoints_own_way_of_decoding_is_left_alone(tiny_llm, generator, tmp_path):
    folder = shutil.copytree(tiny_llm, tmp_path / "llm")
    own = {
        "do_sample": True,
        "num_beams": 3,
        "no_repeat_ngram_size": 1,
        "min_p": 0.5,
        "suppress_tokens": list(range(300)),
        "use_cache": False,
    }
    (folder / "generation_config.json").write_text(json.dumps(own))
    tokens_BT, segments_BT, _ = prompts(generator, "left")
    answers = [
        model.generate(model.embed(tokens_BT), segments_BT, Generation(max_new_tokens=9), eos_ids=[1], pad_id=0).tolist()
        for model in (built(tiny_llm), built(folder))
    ]
    assert answers[0] == answers[1]
    assert min(min(answer) for answer in answers[0]) < 300


def names(model: LanguageModel, requires_grad: bool) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad is requires_grad}


def test_frozen_trains_nothing_and_stays_in_evaluation_mode(tiny_llm):
    model = built(tiny_llm, tune=FROZEN).train()
    assert not names(model, requires_grad=True)
    assert not any(module.training for module in model.modules())


def test_full_trains_everything(tiny_llm):
    model = built(tiny_llm, tune=Tune(mode="full")).train()
    assert names(model, requires_grad=True) and not names(model, requires_grad=False)
    assert all(module.training for module in model.modules())


def test_lora_starts_as_the_base_and_trains_adapters_alone(tiny_llm, generator):
    inputs = prompts(generator, "right")
    base, model = built(tiny_llm), built(tiny_llm, tune=Tune(mode="lora"))
    adapters = names(model, requires_grad=True)
    assert adapters == {
        f"model.model.layers.{layer}.self_attn.{target}.lora_{matrix}.default.weight"
        for layer in (0, 1) for target in ("q_proj", "v_proj") for matrix in "AB"
    }  # fmt: skip
    hidden_BTD = model(model.embed(inputs[0]), *inputs[1:])
    torch.testing.assert_close(hidden_BTD, base(base.embed(inputs[0]), *inputs[1:]), rtol=0, atol=0)
    hidden_BTD.square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == adapters


def test_the_head_has_its_adapter(tiny_llm, generator):
    model = built(tiny_llm, tune=Tune(mode="lora", lora=LoRA(r=4, alpha=8.0, target_modules=("lm_head",))))
    randomise_adapters(model)
    hidden_SD = torch.randn(3, 32, generator=generator)
    weights = model.state_dict()
    a_RD, b_VR = (weights[f"model.lm_head.lora_{matrix}.default.weight"] for matrix in "AB")
    expected_SV = hidden_SD @ (weights["model.lm_head.base_layer.weight"] + 2 * b_VR @ a_RD).T
    torch.testing.assert_close(model.head(hidden_SD), expected_SV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_have_the_dtype_and_adapters_float32(tiny_llm, generator, dtype):
    model = built(tiny_llm, dtype=dtype, tune=Tune(mode="lora"))
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {getattr(torch, dtype)}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    tokens_BT, *rest = prompts(generator, "right")
    with torch.no_grad():
        hidden_BTD = model(model.embed(tokens_BT), *rest)
        exact = built(tiny_llm)
        expected_BTD = exact(exact.embed(tokens_BT), *rest)
    assert hidden_BTD.dtype == getattr(torch, dtype)
    own_BT = rest[0] > 0
    torch.testing.assert_close(hidden_BTD[own_BT].float(), expected_BTD[own_BT], rtol=0.1, atol=0.1)


def test_random_weights_come_from_the_seed(tiny_llm):
    drawn = []
    for seed in (1, 1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            drawn.append(built(tiny_llm, pretrained=False).head.weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not LanguageModel(str(tiny_llm), pretrained=False).has_source
    assert LanguageModel(str(tiny_llm)).has_source


def test_samples_in_one_row_are_refused_where_they_would_see_each_other(tiny_llm, generator):
    model = built(tiny_llm)
    model.takes_packs = False
    tokens_BT, segments_BT, positions_BT = prompts(generator, "right")
    segments_BT[0, 4:] = 2
    with pytest.raises(AssertionError, match="see each other"):
        model(model.embed(tokens_BT), segments_BT, positions_BT)


def spoil(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "without weights":
        weights.unlink()
    elif how == "unknown model":
        (folder / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    elif how == "no json":
        (folder / "config.json").write_text("{")
    else:
        state = load_file(weights)
        if how == "a weight is missing":
            del state["model.layers.1.mlp.up_proj.weight"]
        else:
            state["model.norm.weight"] = torch.ones(7)
        save_file(state, weights, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "cannot be read as a causal language model.*It holds .*config.json"),
        ("without weights", "cannot be read as a causal language model.*no file named model.safetensors"),
        ("unknown model", "cannot be read as a causal language model.*no_such_model"),
        ("no json", "cannot be read as a causal language model.*not a valid JSON"),
        ("a weight is missing", r"1 are missing or have another shape, such as model.layers.1.mlp.up_proj.weight"),
        ("another shape", r"such as model.norm.weight \(7,\) instead of \(32,\)"),
    ],
)
def test_a_spoilt_folder_is_refused(tiny_llm, tmp_path, how, message):
    folder = shutil.copytree(tiny_llm, tmp_path / "llm")
    spoil(folder, how)
    with pytest.raises(ValueError, match=message):
        built(folder)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no folder here, and was not found on the hub") as caught:
        built(tmp_path / "nowhere")
    assert "nowhere" in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_target_is_refused_with_the_names_there_are(tiny_llm):
    with pytest.raises(ValueError, match=r"LanguageModel: lora.target_modules names 'q_prj'.*down_proj.*q_proj"):
        built(tiny_llm, tune=Tune(mode="lora", lora=LoRA(target_modules=("q_prj",))))


@pytest.mark.parametrize(
    "options",
    [{"max_new_tokens": 0}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.2}, {"top_k": -1}, {"repetition_penalty": 0.0}],
)
def test_generation_options_are_checked(options):
    with pytest.raises(ValueError, match=f"generation.{next(iter(options))}.*got {next(iter(options.values()))}"):
        Generation(**options)
