"""Weights of other layouts, rewritten as the folders that transformers and timm read.

Shape suffixes: B 1, N tokens, D width.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    import onnx

GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
GGUF_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}
GGUF_CONTROL = 3  # token type

DINOV2_HEAD_SIZE = 64  # of every DINOv2 model (Oquab et al. 2023, arXiv 2304.07193); no shape of a weight tells it
DINOV2_PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}

LITE0_STAGES = (1, 2, 2, 3, 3, 4, 1)
"""Blocks in each stage of EfficientNet-B0 and Lite0 (Tan & Le 2019, arXiv 1905.11946, table 1)."""
LITE0_NAMES = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
LITE0_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
LITE0_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
LITE0_CONFIG = {
    "architecture": "tf_efficientnet_lite0",
    "num_classes": 1000,
    "num_features": 1280,
    "pretrained_cfg": {
        "input_size": [3, 224, 224],
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "mean": [127 / 255] * 3,
        "std": [128 / 255] * 3,
        "num_classes": 1000,
        "pool_size": [7, 7],
        "first_conv": "conv_stem",
        "classifier": "classifier",
    },
}


def convert_smollm2(gguf_file: Path, folder: Path) -> None:
    """GGUF of a Llama with SmolLM's tokenizer to a transformers folder: model, tokenizer and chat template.

    Quantised weights become float32: `scale * integer + minimum`, both factors in half precision, fits no 16-bit type.

    Args:
        gguf_file: The GGUF file.
        folder: Gets the files.
    """
    from gguf import GGUFReader, dequantize
    from transformers import GenerationConfig, LlamaConfig

    reader = GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    special_ids = {f"{ours}_token_id": fields[f"tokenizer.ggml.{theirs}_token_id"] for ours, theirs in GGUF_SPECIAL.items()}
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        **special_ids,
    )
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        if tensor.name in GGUF_NAMES:
            weights[GGUF_NAMES[tensor.name]] = weight
            continue
        _, layer, kind, _ = tensor.name.split(".")
        if kind in heads:
            weight = _unpermute_rotary(weight, heads[kind])
        weights[f"model.layers.{layer}.{GGUF_LAYER_NAMES[kind]}.weight"] = weight
    save_file(weights, folder / "model.safetensors")
    config.save_pretrained(folder)
    GenerationConfig(**special_ids).save_pretrained(folder)
    _save_tokenizer(fields, folder)


def _unpermute_rotary(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection: GGUF interleaves the halves that transformers' rotary embedding keeps apart."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape).contiguous()


def _save_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Writes the byte-level BPE of a GGUF file, which splits numbers into digits before anything else (`pre` is smollm)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == GGUF_CONTROL])
    special = {f"{ours}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in GGUF_SPECIAL.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **special,
    )
    tokenizer.save_pretrained(folder)


def convert_dinov2(onnx_file: Path, folder: Path) -> None:
    """ONNX of a model around a transformers `Dinov2Model` called `backbone` to a transformers folder of that backbone.

    Args:
        onnx_file: The ONNX file.
        folder: Gets the files.
    """
    import onnx
    from transformers import Dinov2Config

    graph = onnx.load(onnx_file).graph
    weights = _dinov2_weights(graph)
    positions_BND = weights["embeddings.position_embeddings"]
    hidden_size, _, patch_size, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
    config = Dinov2Config(
        architectures=["Dinov2Model"],
        dtype="float32",
        hidden_size=hidden_size,
        num_hidden_layers=sum(name.endswith("layer_scale1.lambda1") for name in weights),
        num_attention_heads=hidden_size // DINOV2_HEAD_SIZE,
        mlp_ratio=weights["encoder.layer.0.mlp.fc1.weight"].shape[0] // hidden_size,
        patch_size=patch_size,
        image_size=math.isqrt(positions_BND.shape[1] - 1) * patch_size,
    )
    save_file(weights, folder / "model.safetensors")
    config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(DINOV2_PREPROCESSOR, indent=2) + "\n")


def _dinov2_weights(graph: "onnx.GraphProto") -> dict[str, Tensor]:
    """Weights by the names of the model hub, which `Dinov2Model.from_pretrained` understands.

    Named in the file are all but the matrices of the linear layers, stored transposed, and the position embeddings:
    these are known by the node that uses them.
    """
    from onnx import numpy_helper

    stored = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    weights = {name.removeprefix("backbone."): stored[name] for name in stored if name.startswith("backbone.")}
    positions = {}
    for node in graph.node:
        for weight in (stored[name] for name in node.input if name in stored and not name.startswith("backbone.")):
            if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/"):
                layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
                weights[f"{layer}.weight"] = weight.T.contiguous()
            elif node.name.startswith("/backbone/embeddings/") and node.op_type in ("Concat", "Reshape"):
                positions[node.op_type] = weight
    # The class token's own position is concatenated, those of the patches are reshaped to be resized.
    weights["embeddings.position_embeddings"] = torch.cat([positions["Concat"], positions["Reshape"]], 1)
    # Pretraining alone uses the mask token, and the file lacks it; without it the loader would report a missing weight.
    weights["embeddings.mask_token"] = torch.zeros(1, positions["Concat"].shape[-1])
    return weights


def convert_efficientnet_lite0(state_dict_file: Path, folder: Path) -> None:
    """State dict of EfficientNet-PyTorch to timm's `tf_efficientnet_lite0`, with a config.json as timm's hub has it.

    Args:
        state_dict_file: The .pth file.
        folder: Gets the files.
    """
    state_dict = torch.load(state_dict_file, weights_only=True)
    weights = {lite0_name(name): weight.contiguous() for name, weight in state_dict.items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(LITE0_CONFIG, indent=2) + "\n")


def lite0_name(name: str) -> str:
    """timm's name of an EfficientNet-Lite0 weight that EfficientNet-PyTorch calls `name`.

    Blocks are counted through there, by stage here; the first block has no expansion and so other names.
    """
    if not name.startswith("_blocks."):
        layer, kind = name.split(".")
        return f"{LITE0_NAMES[layer]}.{kind}"
    _, number, layer, kind = name.split(".")
    stage, block = [(stage, block) for stage, blocks in enumerate(LITE0_STAGES) for block in range(blocks)][int(number)]
    names = LITE0_FIRST_BLOCK if stage == 0 else LITE0_BLOCK
    return f"blocks.{stage}.{block}.{names[layer]}.{kind}"
