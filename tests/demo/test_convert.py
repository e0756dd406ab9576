"""Each converter is given a small file in the foreign layout, written here from a random model whose output is known."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType, GGUFWriter, quants
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

from demo.convert import convert_dinov2, convert_efficientnet_lite0, convert_smollm2

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "Ċ Ċ", "1 2", "Ġ he"]
VOCABULARY = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
CHAT = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"

GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every weight random, also those that start at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.eval()


def random_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=True,
    )
    return randomised(LlamaForCausalLM(config))


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head in the order of llama.cpp: 0, half, 1, half + 1 ..."""
    size = len(weight) // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[order]


def write_gguf(model: LlamaForCausalLM, path: Path, quantised: tuple[str, ...] = ()) -> None:
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in VOCABULARY])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT)
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        array = weight.numpy()
        if name not in names:
            _, _, layer, rest = name.removesuffix(".weight").split(".", 3)
            array = interleave(array, heads[rest]) if rest in heads else array
            names[name] = f"blk.{layer}.{GGUF_NAMES[rest]}.weight"
        if name in quantised:
            kind = GGMLQuantizationType.Q4_1
            writer.add_tensor(names[name], quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(names[name], array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[LlamaForCausalLM, Path]:
    folder = tmp_path_factory.mktemp("llama")
    model = random_llama()
    write_gguf(model, folder / "tiny.gguf")
    convert_smollm2(folder / "tiny.gguf", folder)
    return model, folder


def test_gguf_gives_the_same_logits(llama):
    model, folder = llama
    tokens_BT = torch.randint(len(VOCABULARY), (2, 17), generator=torch.Generator().manual_seed(1))
    converted = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert converted.generation_config.eos_token_id == converted.config.eos_token_id == 2
    with torch.no_grad():
        assert torch.equal(converted(tokens_BT).logits, model(tokens_BT).logits)


def test_gguf_quantised_weights_are_scale_times_integer_plus_minimum(tmp_path):
    model = random_llama()
    name = "model.layers.1.mlp.up_proj.weight"
    integers = torch.randint(16, (96, 2, 32), generator=torch.Generator().manual_seed(2))
    integers[..., :2] = torch.tensor([0, 15])  # each block of 32 spans its whole range: quantising is exact
    expected = (0.125 * integers - 1.5).reshape(96, 64)
    model.get_parameter(name).data.copy_(expected)
    write_gguf(model, tmp_path / "tiny.gguf", quantised=(name,))
    convert_smollm2(tmp_path / "tiny.gguf", tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")[name], expected)


def test_gguf_tokenizer_splits_digits_before_it_merges(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama[1])
    assert tokenizer.tokenize("he he\n\n12") == ["he", "Ġhe", "ĊĊ", "1", "2"]
    text = "Ünïcode 日本 😀\t\r\n  x = 3.14;\n\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 128


def test_gguf_chat_template_uses_the_special_tokens(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama[1])
    tokens = tokenizer.apply_chat_template([{"role": "user", "content": "he"}], return_dict=False)
    assert (tokens[0], tokens[-2]) == (1, 2)
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "user\nhe\n"
    assert tokenizer("<|endoftext|>")["input_ids"] == [0]


def write_onnx(model: Dinov2Model, folder: Path) -> None:
    """Stores the weights as the exporter does: matrices transposed and unnamed, the position embeddings in two pieces."""
    model.save_pretrained(folder / "reference")
    weights = {name: weight.numpy() for name, weight in load_file(folder / "reference" / "model.safetensors").items()}
    del weights["embeddings.mask_token"]
    positions = weights.pop("embeddings.position_embeddings")
    stored = {"onnx::Concat_1": positions[:, :1], "onnx::Reshape_2": positions[:, 1:], "decoder.weight": positions[0]}
    nodes = [
        helper.make_node("Reshape", ["onnx::Reshape_2", "shape"], ["a"], name="/backbone/embeddings/Reshape_1"),
        helper.make_node("Concat", ["onnx::Concat_1", "a"], ["b"], name="/backbone/embeddings/Concat_6", axis=1),
        helper.make_node("MatMul", ["b", "decoder.weight"], ["c"], name="/decoder/MatMul"),
        helper.make_node("MatMul", ["c", "c"], ["d"], name="/backbone/encoder/layer.0/attention/attention/MatMul"),
    ]
    for name, weight in weights.items():
        if name.startswith("encoder.") and weight.ndim == 2:
            node = "/backbone/" + name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.") + "/MatMul"
            stored[f"onnx::MatMul_{len(stored)}"] = weight.T
            nodes.append(helper.make_node("MatMul", ["x", list(stored)[-1]], [f"{node}_output_0"], name=node))
        else:
            stored[f"backbone.{name}"] = weight
    initialisers = [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in stored.items()]
    output = helper.make_tensor_value_info("d", TensorProto.FLOAT, None)
    onnx.save(helper.make_model(helper.make_graph(nodes, "tiny", [], [output], initialisers)), folder / "tiny.onnx")


def test_onnx_gives_the_same_features(tmp_path):
    config = Dinov2Config(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=12, patch_size=3)
    model = randomised(Dinov2Model(config))
    write_onnx(model, tmp_path)
    (tmp_path / "converted").mkdir()
    convert_dinov2(tmp_path / "tiny.onnx", tmp_path / "converted")
    converted, loading = Dinov2Model.from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert not any(loading.values())
    image_BCHW = torch.randn(2, 3, 18, 15, generator=torch.Generator().manual_seed(1))  # positions are resized
    with torch.no_grad():
        expected = model(image_BCHW, output_hidden_states=True).hidden_states
        got = converted.eval()(image_BCHW, output_hidden_states=True).hidden_states
    assert len(got) == 3
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# Expansion, kernel, stride, channels, repeats: Tan & Le 2019 (arXiv 1905.11946), table 1.
LITE0 = [
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
]


class Lite0:
    """EfficientNet-Lite0 by hand, in the names of EfficientNet-PyTorch; draws each weight where the forward pass needs it."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.weights: dict[str, torch.Tensor] = {}

    def draw(self, name: str, *shape: int) -> torch.Tensor:
        assert name not in self.weights
        self.weights[name] = torch.randn(shape, generator=self.generator)
        return self.weights[name]

    def conv(self, name: str, x: torch.Tensor, out: int, kernel: int, stride: int = 1, groups: int = 1) -> torch.Tensor:
        weight = self.draw(f"{name}.weight", out, x.shape[1] // groups, kernel, kernel).div_(
            kernel * (x.shape[1] // groups) ** 0.5
        )
        vertical, horizontal = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:])
        top, left = vertical // 2, horizontal // 2  # TensorFlow's SAME: the odd pixel goes below and to the right
        return F.conv2d(F.pad(x, (left, horizontal - left, top, vertical - top)), weight, stride=stride, groups=groups)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        scale, bias, mean = (self.draw(f"{name}.{kind}", x.shape[1]) for kind in ("weight", "bias", "running_mean"))
        variance = self.draw(f"{name}.running_var", x.shape[1]).abs_().add_(0.5)
        self.weights[f"{name}.num_batches_tracked"] = torch.tensor(7)
        return F.batch_norm(x, mean, variance, scale, bias, eps=1e-3)

    def block(self, name: str, x: torch.Tensor, expand: int, kernel: int, stride: int, out: int) -> torch.Tensor:
        y = x
        if expand > 1:
            y = F.relu6(self.norm(f"{name}._bn0", self.conv(f"{name}._expand_conv", y, expand * x.shape[1], 1)))
        y = self.conv(f"{name}._depthwise_conv", y, y.shape[1], kernel, stride, groups=y.shape[1])
        y = F.relu6(self.norm(f"{name}._bn1", y))
        y = self.norm(f"{name}._bn2", self.conv(f"{name}._project_conv", y, out, 1))
        return x + y if x.shape == y.shape else y

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.norm("_bn0", self.conv("_conv_stem", x, 32, 3, stride=2)))
        number = 0
        for expand, kernel, stride, out, repeats in LITE0:
            for repeat in range(repeats):
                x = self.block(f"_blocks.{number}", x, expand, kernel, stride if repeat == 0 else 1, out)
                number += 1
        x = F.relu6(self.norm("_bn1", self.conv("_conv_head", x, 1280, 1)))
        return F.linear(x.mean((2, 3)), self.draw("_fc.weight", 1000, 1280), self.draw("_fc.bias", 1000))


def test_efficientnet_lite0_gives_the_same_logits(tmp_path):
    image_BCHW = torch.randn(2, 3, 65, 50, generator=torch.Generator().manual_seed(1))
    lite0 = Lite0()
    expected = lite0(image_BCHW)
    torch.save(lite0.weights, tmp_path / "lite0.pth")
    convert_efficientnet_lite0(tmp_path / "lite0.pth", tmp_path)
    model = timm.create_model("tf_efficientnet_lite0", checkpoint_path=str(tmp_path / "model.safetensors")).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(image_BCHW), expected, rtol=1e-4, atol=1e-4)
    config = timm.create_model(f"local-dir:{tmp_path}").pretrained_cfg
    assert [255 * config["mean"][0], 255 * config["std"][0]] == pytest.approx([127, 128])
