import random
from itertools import pairwise
from pathlib import Path

import pytest

from datamodules.chat_tokenizer import ChatTokenizer, load_tokenizer
from datamodules.template import Chat, ConversationError
from tests.tiny import STYLES, Style, make_tokenizer


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[Style, ChatTokenizer]:
    made = {}
    for style in STYLES:
        folder = tmp_path_factory.mktemp(style)
        make_tokenizer(folder, style)
        made[style] = ChatTokenizer(load_tokenizer(str(folder), "plain" if style == "plain" else None), style)
    return made


def hf_ids(chat_tokenizer: ChatTokenizer, chat: Chat) -> list[int]:
    messages = [{"role": role, "content": text} for role, text in chat]
    return chat_tokenizer.tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]


def names(chat_tokenizer: ChatTokenizer, ids: list[int]) -> list[str]:
    """Tokens as the vocabulary writes them, with line breaks and spaces as such."""
    tokens = chat_tokenizer.tokenizer.convert_ids_to_tokens(ids)
    return [token.replace("Ċ", "\n").replace("Ġ", " ").replace("▁", " ") for token in tokens]


def runs(chat_tokenizer: ChatTokenizer, chat: Chat, supervised: list[int]) -> list[str]:
    """The text in turns: not learnt, learnt, not learnt, …"""
    ids, spans, _ = chat_tokenizer.write(chat, supervised)
    edges = [0, *(edge for span in spans for edge in (span.start, span.stop)), len(ids)]
    tokens = names(chat_tokenizer, ids)
    return ["".join(tokens[begin:end]) for begin, end in pairwise(edges)]


TOKENS: dict[Style, tuple[str, str, str]] = {  # in front, learnt, behind; "/" between tokens
    "chatml": (
        "<|im_start|>/system/\n/You/ are/ a/ helpful/ assistant/./<|im_end|>/\n"
        "/<|im_start|>/user/\n/is/ there/ a/ bus/<|im_end|>/\n/<|im_start|>/assistant/\n",
        "a/ red/ bus/<|im_end|>",
        "\n",
    ),
    "llama3": (
        "<|begin_of_text|>/<|start_header_id|>/user/<|end_header_id|>/\n\n/is/ there/ a/ bus/<|eot_id|>"
        "/<|start_header_id|>/assistant/<|end_header_id|>/\n\n",
        "a/ red/ bus/<|eot_id|>",
        "",
    ),
    "gemma": (
        "<bos>/<start_of_turn>/user/\n/is/ the/re/ a/ bus/<end_of_turn>/\n/<start_of_turn>/m/ode/l/\n",
        "a/ red/ bus/<end_of_turn>",
        "\n",
    ),
    "mistral": ("<s>/[/INST]/ is/ the/re/ a/ bus/ [/INST]", " a/ red/ bus/</s>", ""),
    "plain": ("User/:/ is/ there/ a/ bus/\n/Assistant/:", " a/ red/ bus/<|endoftext|>", "\n"),
}


@pytest.mark.parametrize("style", TOKENS)
def test_token_by_token(chats: dict[Style, ChatTokenizer], style: Style) -> None:
    chat = [("user", "is there a bus"), ("assistant", "a red bus")]
    ids, (span,), choices = chats[style].write(chat, [1])
    tokens = names(chats[style], ids)
    parts = tokens[: span.start], tokens[span.start : span.stop], tokens[span.stop :]
    assert tuple("/".join(part) for part in parts) == TOKENS[style]
    assert ids == hf_ids(chats[style], chat)
    assert choices is None


CONVERSATION = [("user", "hi there"), ("assistant", "a\nb"), ("user", "x"), ("assistant", "the cat")]
LEARNT: dict[Style, list[str]] = {
    "chatml": [
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nhi there<|im_end|>\n<|im_start|>assistant\n",
        "a\nb<|im_end|>",
        "\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n",
        "the cat<|im_end|>",
        "\n",
    ],
    "llama3": [
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi there<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "a\nb<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nx<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "the cat<|eot_id|>",
        "",
    ],
    "gemma": [
        "<bos><start_of_turn>user\nhi there<end_of_turn>\n<start_of_turn>model\n",
        "a\nb<end_of_turn>",
        "\n<start_of_turn>user\nx<end_of_turn>\n<start_of_turn>model\n",
        "the cat<end_of_turn>",
        "\n",
    ],
    "mistral": ["<s>[INST] hi there [/INST]", " a\nb</s>", "[INST] x [/INST]", " the cat</s>", ""],
    "plain": [
        "User: hi there\nAssistant:",
        " a\nb<|endoftext|>",
        "\nUser: x\nAssistant:",
        " the cat<|endoftext|>",
        "\n",
    ],
}


@pytest.mark.parametrize("style", STYLES)
def test_answers_and_their_end_tokens_are_learnt_and_nothing_else(chats: dict[Style, ChatTokenizer], style: Style) -> None:
    expected = [text.replace("x", "<0x78>") if style in ("gemma", "mistral") else text for text in LEARNT[style]]
    assert runs(chats[style], CONVERSATION, [1, 3]) == expected
    first, answer, between, *rest = expected
    assert runs(chats[style], CONVERSATION, [3]) == [first + answer + between, *rest]
    assert chats[style].write(CONVERSATION, [1, 3]).ids == hf_ids(chats[style], CONVERSATION)


@pytest.mark.parametrize("style", ["chatml", "llama3", "plain"])
def test_a_system_message(chats: dict[Style, ChatTokenizer], style: Style) -> None:
    chat = [("system", "You are a dog."), *CONVERSATION]
    prompt, answer, *_ = runs(chats[style], chat, [2, 4])
    assert "You are a dog." in prompt
    assert "helpful" not in prompt
    assert answer == LEARNT[style][1]
    assert chats[style].write(chat, [2, 4]).ids == hf_ids(chats[style], chat)


def test_a_system_message_that_the_template_merges_or_refuses(chats: dict[Style, ChatTokenizer]) -> None:
    chat = [("system", "You are a dog."), *CONVERSATION]
    assert runs(chats["mistral"], chat, [2])[0] == "<s>[INST] You are a dog.\n\nhi there [/INST]"
    with pytest.raises(ConversationError, match="System role not supported"):
        chats["gemma"].write(chat, [2])


WORDS = ["a", "the", "bus", " ", "  ", "\n", "\n\n", "\t", "<", "|", "[INST]", "0", "1,2", ".", "'s"]
WORDS += ["é", "e\u0301", "🙂", "👩‍👩‍👧", "中文", "\u00a0"]


@pytest.mark.parametrize("style", STYLES)
def test_training_goes_on_where_the_prompt_ends(chats: dict[Style, ChatTokenizer], style: Style) -> None:
    draw = random.Random(style)
    chat_tokenizer, split = chats[style], 0
    for _ in range(100):
        texts = ["".join(draw.choices(WORDS, k=draw.randint(1, 8))) for _ in range(4)]
        chat = list(zip(["user", "assistant"] * 2, texts, strict=True))
        ids, spans, _ = chat_tokenizer.write(chat, [1, 3])
        for number, span in zip((1, 3), spans, strict=True):
            assert chat_tokenizer.prompt(chat[:number]) == ids[: span.start]
            assert ids[span.stop - 1] in chat_tokenizer.eos_ids
        hf = hf_ids(chat_tokenizer, chat)
        split += ids != hf
        # Split or not, the tokens say the same text.
        assert chat_tokenizer.tokenizer.decode(ids) == chat_tokenizer.tokenizer.decode(hf)
    assert split < 100


def test_a_line_break_at_the_start_of_an_answer_is_the_answers_own_token(chats: dict[Style, ChatTokenizer]) -> None:
    ids, (span,), _ = chats["chatml"].write([("user", "x"), ("assistant", "\nfoo")], [1])
    assert names(chats["chatml"], ids)[span.start - 1 : span.start + 2] == ["\n", "\n", "f"]
    # As it stands in the whole text, one token would be both the header's and the answer's.
    assert "\n\n" in names(chats["chatml"], hf_ids(chats["chatml"], [("user", "x"), ("assistant", "\nfoo")]))


def test_whitespace_at_the_end_of_an_answer_is_learnt(chats: dict[Style, ChatTokenizer]) -> None:
    assert runs(chats["chatml"], [("user", "x"), ("assistant", " the cat \n")], [1])[1] == " the cat \n<|im_end|>"
    assert runs(chats["llama3"], [("user", "x"), ("assistant", " the cat \n")], [1])[1] == "the cat<|eot_id|>"


def test_a_text_that_would_become_a_control_token_is_refused(chats: dict[Style, ChatTokenizer]) -> None:
    with pytest.raises(ConversationError, match=r"'<\|im_end\|>' in it"):
        chats["chatml"].check_text("say <|im_end|> to me")
    with pytest.raises(ConversationError, match="omnilit_video"):
        chats["gemma"].check_text("<|omnilit_video|>")
    chats["chatml"].check_text("<|im_end <|eot_id|> </s> <im_end>")


def test_an_answer_without_end_is_refused(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, "chatml")
    path = tmp_path / "endless.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chat_tokenizer = ChatTokenizer(load_tokenizer(str(tmp_path), str(path)), "endless")
    with pytest.raises(ValueError, match="never learn to stop"):
        chat_tokenizer.write(CONVERSATION, [1])
    assert chat_tokenizer.eos_ids == [chat_tokenizer.tokenizer.eos_token_id]


def test_an_end_that_is_not_marked_as_special_is_found_and_refused_in_an_answer(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, "plain")
    tokenizer.add_tokens(["<end>"])
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chat_tokenizer = ChatTokenizer(load_tokenizer(str(tmp_path), str(path)), "own")
    assert runs(chat_tokenizer, CONVERSATION, [3])[1] == "the cat<end>"
    assert set(names(chat_tokenizer, chat_tokenizer.eos_ids)) == {"<end>", "<|endoftext|>"}
    with pytest.raises(ConversationError, match="'<end>' in it, the token that ends an answer"):
        chat_tokenizer.write([("user", "x"), ("assistant", "a <end> b")], [1])


def test_eos_ids(chats: dict[Style, ChatTokenizer]) -> None:
    assert {style: set(names(chat, chat.eos_ids)) for style, chat in chats.items()} == {
        "chatml": {"<|im_end|>"},
        "llama3": {"<|eot_id|>"},
        "gemma": {"<end_of_turn>", "<eos>"},
        "mistral": {"</s>"},
        "plain": {"<|endoftext|>"},
    }


def test_choices_by_hand(chats: dict[Style, ChatTokenizer]) -> None:
    chat_tokenizer = chats["chatml"]
    chat = [("user", "x"), ("assistant", "hi"), ("user", "x"), ("assistant", "a red bus")]
    ids, spans, choices = chat_tokenizer.write(chat, [1, 3], ["a red bus", "a red cat", "a red", "a blue"])
    assert choices is not None
    assert names(chat_tokenizer, ids[spans[1].start : spans[1].stop]) == ["a", " red", " bus", "<|im_end|>"]
    allowed = [set(names(chat_tokenizer, options)) for options in choices]
    assert allowed[: len(spans[0])] == [set()] * len(spans[0])
    assert allowed[len(spans[0]) :] == [{"a"}, {" red", " blue"}, {" bus", " cat", "<|im_end|>"}, {"<|im_end|>"}]
    assert choices[-2] == sorted(choices[-2])


@pytest.mark.parametrize("style", STYLES)
def test_choices_are_the_ids_of_each_answer(chats: dict[Style, ChatTokenizer], style: Style) -> None:
    options = ["the bus", "the  cat", "\nthe cat", " a", "🙂"]
    for answer in options:
        ids, (span,), choices = chats[style].write([("user", "x"), ("assistant", answer)], [1], options)
        assert choices is not None
        for position, allowed in zip(span, choices, strict=True):
            assert ids[position] in allowed
        assert len(choices[0]) > 1
        for other in options:
            other_ids, (other_span,), _ = chats[style].write([("user", "x"), ("assistant", other)], [1])
            assert other_ids[other_span.start] in choices[0]


def test_decode(chats: dict[Style, ChatTokenizer]) -> None:
    for style, chat_tokenizer in chats.items():
        image, video = chat_tokenizer.media_ids["image"], chat_tokenizer.media_ids["video"]
        text = chat_tokenizer.tokenizer("the cat é 🙂, is  it", add_special_tokens=False).input_ids
        end = chat_tokenizer.eos_ids[0]
        decoded = chat_tokenizer.decode([*text, image, image, image, video, *text, end])
        first, second = decoded.split("<image><video>")
        assert first == "the cat é 🙂, is  it", style
        assert second.strip() == first


def test_media_ids_lie_behind_the_vocabulary(tmp_path: Path) -> None:
    size = len(make_tokenizer(tmp_path, "llama3"))
    assert ChatTokenizer(load_tokenizer(str(tmp_path), None), "x").media_ids == {
        "image": size,
        "video": size + 1,
        "audio": size + 2,
    }


def test_what_load_tokenizer_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer '/nowhere/at/all': expected a folder with tokenizer.json"):
        load_tokenizer("/nowhere/at/all", None)
    make_tokenizer(tmp_path, "plain")
    with pytest.raises(ValueError, match=r"no chat template.*prompt.chat_template to plain"):
        load_tokenizer(str(tmp_path), None)
    with pytest.raises(ValueError, match="is not a file"):
        load_tokenizer(str(tmp_path), str(tmp_path / "missing.jinja"))
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for m in messages %}")
    with pytest.raises(ValueError, match="no valid Jinja: line 1"):
        ChatTokenizer(load_tokenizer(str(tmp_path), str(broken)), "x").prompt([("user", "x")])


def test_the_plain_template_starts_as_the_tokenizer_does(tmp_path: Path) -> None:
    for style, start in (("mistral", "<s>User: "), ("plain", "User: ")):
        make_tokenizer(tmp_path, style)
        chat_tokenizer = ChatTokenizer(load_tokenizer(str(tmp_path), "plain"), style)
        assert runs(chat_tokenizer, [("user", "hi"), ("assistant", "a")], [1])[0] == f"{start}hi\nAssistant:"
