"""Configurations of the tiny models that `model_folder` of conftest.py makes."""

from typing import Any

VOCABULARY = 600
IMAGE_SIZE = 32
PATCH_SIZE = 8

LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "initializer_range": 0.2,
}


def tiny_config(family: str) -> Any:
    """The configuration of transformers for a family."""
    import transformers as hf

    match family:
        case "llama":
            return hf.LlamaConfig(**LLAMA)
        case "llama_64":  # as wide as a block of NF4
            return hf.LlamaConfig(**LLAMA | {"hidden_size": 64, "intermediate_size": 128})
        case "qwen2":
            return hf.Qwen2Config(**LLAMA)
        case "mistral":
            return hf.MistralConfig(**LLAMA, sliding_window=5)
        case "qwen2_window":
            return hf.Qwen2Config(**LLAMA, use_sliding_window=True, sliding_window=5, max_window_layers=1)
        case "gemma3_text":
            kinds = ["sliding_attention", "full_attention"]
            return hf.Gemma3TextConfig(**LLAMA, head_dim=8, query_pre_attn_scalar=8, sliding_window=4, layer_types=kinds)
        case "qwen3":
            return hf.Qwen3Config(**LLAMA, head_dim=8, tie_word_embeddings=True)
        case "gemma2":
            return hf.Gemma2Config(**LLAMA, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=2.0, sliding_window=4)
        case "granite":
            return hf.GraniteConfig(**LLAMA, logits_scaling=4.0, embedding_multiplier=3.0)
        case "cohere":
            return hf.CohereConfig(**LLAMA, logit_scale=0.25)
        case "gpt2":
            return hf.GPT2Config(**GPT2)
        case "gptj":
            return hf.GPTJConfig(**GPT2, rotary_dim=4)
        case "falcon_h1":
            return hf.FalconH1Config(**LLAMA, lm_head_multiplier=0.5, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8)
        case "clip":
            return hf.CLIPVisionConfig(**VISION)
        case "siglip":
            return hf.SiglipVisionConfig(**VISION)
        case "dinov2":
            return hf.Dinov2Config(**VISION)
    raise ValueError(f"no tiny model is called {family}")
