"""Tiny tokenizers of the families in use, made offline in a few milliseconds: true special tokens, faithful chat templates."""

import json
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

Style = Literal["chatml", "llama3", "gemma", "mistral", "plain"]
STYLES: tuple[Style, ...] = ("chatml", "llama3", "gemma", "mistral", "plain")

CORPUS = [
    "What is in this picture? A red bus waits at the corner of the street.\n\nHow many birds are there? There are three birds.",
    "system\nYou are a helpful assistant.\nuser\nName the animal in the picture.\nassistant\nThe animal is a small brown dog.",
    "User: Is the cat black or white?\nAssistant: The cat is white.\n\n\nmodel\nIt is a picture of a blue boat on the water.",
    "  two spaces and    four spaces;\ta tab, 0 1 2 3 4 5 6 7 8 9 10 42 100 1,234.\n\n\n\nIt's we're don't [INST] [/INST] answer",
] * 4

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHATML = """{% for message in messages %}{% if loop.first and message.role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA3 = """{{- bos_token }}{% for message in messages -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

GEMMA = """{{- bos_token }}{% for message in messages -%}
{%- if message.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- set role = 'model' if message.role == 'assistant' else message.role %}
{{- '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{% endif %}"""

MISTRAL = """{{- bos_token }}{% set ns = namespace(system='') %}{% for message in messages -%}
{%- if message.role == 'system' %}{% set ns.system = message.content + '\n\n' %}
{%- elif message.role == 'user' %}{{- '[INST] ' + ns.system + message.content + ' [/INST]' }}{% set ns.system = '' %}
{%- elif message.role == 'assistant' %}{{- ' ' + message.content | trim + eos_token }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{%- endfor %}"""

TEMPLATES: dict[Style, str | None] = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "plain": None,
}
SPECIALS: dict[Style, list[str]] = {
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
    "mistral": ["<unk>", "<s>", "</s>"],
    "plain": ["<|endoftext|>"],
}
ROLES: dict[Style, dict[str, str]] = {
    "chatml": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "plain": {"eos_token": "<|endoftext|>"},
}


def make_tokenizer(folder: str | Path, style: Style) -> PreTrainedTokenizerFast:
    """A tokenizer of at most 600 tokens that covers every byte, saved to `folder`; "plain" has no chat template."""
    backend = _sentencepiece(style) if style in ("gemma", "mistral") else _byte_level(style)
    template = TEMPLATES[style]
    options: dict[str, Any] = {} if template is None else {"chat_template": template}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **ROLES[style], **options)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _byte_level(style: Style) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if style == "plain":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    if style == "chatml":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600 - len(SPECIALS[style]), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS[style]])
    if style == "llama3":
        bos = ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[bos]),
            ]
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def _sentencepiece(style: Style) -> Tokenizer:
    """Space as "▁", and byte tokens for what the vocabulary lacks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if style == "mistral" else "never")
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    trained = json.loads(tokenizer.to_str())["model"]
    names = [*SPECIALS[style], *(f"<0x{byte:02X}>" for byte in range(256)), *trained["vocab"]]
    vocab = {name: number for number, name in enumerate(names)}
    merges = [tuple(pair) for pair in trained["merges"]]
    tokenizer.model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    if style == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        strip = decoders.Strip(content=" ", left=1)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS[style]])
    bos = ROLES[style]["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer
