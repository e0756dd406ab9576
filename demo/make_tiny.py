"""Draws the rows of configs/sft/tiny.yaml and makes its language model's folder, without weights.

`python -m demo.make_tiny` wrote what is in demo/tiny; run it again to change that.
"""

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

FOLDER = Path(__file__).parent / "tiny"
COLOURS = {"red": (220, 50, 47), "green": (60, 160, 60), "blue": (50, 90, 210), "yellow": (230, 200, 40)}
SHAPES = ("circle", "square")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def draw(path: Path, colour: str, shape: str, generator: random.Random) -> None:
    """One coloured shape at a random place on a light ground, 32 x 32 pixels."""
    image = Image.new("RGB", (32, 32), (245, 245, 240))
    size = generator.randint(14, 22)
    left, top = generator.randint(1, 30 - size), generator.randint(1, 30 - size)
    box = (left, top, left + size, top + size)
    pen = ImageDraw.Draw(image)
    (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=COLOURS[colour])
    image.save(path, optimize=True)


def another(answers: list[str], right: str, number: int) -> str:
    """An answer that is wrong, each of them in turn; supervised training does not look at it."""
    wrong = [answer for answer in answers if answer != right]
    return wrong[number % len(wrong)]


def write_rows(name: str, per_kind: int, generator: random.Random) -> None:
    """Rows with `per_kind` pictures of each colour and shape."""
    rows = []
    for colour in COLOURS:
        for shape in SHAPES:
            for number in range(per_kind):
                picture = f"images/{name}-{colour}-{shape}-{number}.png"
                draw(FOLDER / picture, colour, shape, generator)
                messages = [
                    {"role": "user", "content": "<image>Which colour?"},
                    {"role": "assistant", "content": colour},
                ]
                wrong = another(list(COLOURS), colour, number)
                row = {"messages": messages, "rejected_response": wrong, "images": [picture], "choices": list(COLOURS)}
                rows.append(row)
    generator.shuffle(rows)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (FOLDER / f"{name}.jsonl").write_text(text, encoding="utf-8")


def write_language_model() -> None:
    """A two-layer Llama's configuration, and a byte-level tokenizer with ChatML's tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Which colour?", "system user assistant", *COLOURS, *SHAPES] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(FOLDER / "llm")
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(FOLDER / "llm")


def main() -> None:
    """Writes demo/tiny."""
    (FOLDER / "images").mkdir(parents=True, exist_ok=True)
    generator = random.Random(20)
    write_rows("train", 4, generator)
    write_rows("val", 1, generator)
    write_language_model()


if __name__ == "__main__":
    main()
