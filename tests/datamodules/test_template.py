import random

import jinja2
import pytest

from datamodules.template import Chat, ChatTemplate, ConversationError, Render, build_skeleton, plain_template

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = CHATML.replace("m.content", "m.content | trim")
MERGED = (  # the system message goes into the user's, as Mistral's templates have it
    "{% set ns = namespace(s='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.s = m.content + '\n' %}"
    "{% elif m.role == 'user' %}[INST] {{ ns.s + m.content }}{% set ns.s = '' %} [/INST]{% else %} {{ m.content | trim }}</s>"
    "{% endif %}{% endfor %}"
)
LATE_SYSTEM = (  # the system message goes into the last user message
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] "
    "{% if loop.index0 == (messages | selectattr('role', 'ne', 'system') | list | length) - 1 - (messages[-1].role != 'user') "
    "and messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
THINKING = (  # as Qwen3: the last answer has a think block, earlier ones lose theirs
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set reason = '' %}{% set rest = m.content %}"
    "{% if '</think>' in m.content %}{% set reason = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set rest = m.content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n{% if loop.last %}<think>\n{{ reason }}\n</think>\n\n{% endif %}{{ rest }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORCED_THINK = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}")


def renderer(template: str, **values: str) -> Render:
    compiled = jinja2.Environment(keep_trailing_newline=True).from_string(template)

    def render(chat: Chat, add_generation_prompt: bool) -> str:
        messages = [{"role": role, "content": text} for role, text in chat]
        return compiled.render(messages=messages, add_generation_prompt=add_generation_prompt, **values)

    return render


def answers(template: str, chat: Chat) -> list[tuple[str, str]]:
    """What is in front of each answer, and what the model has to write of it, without its end."""
    written = ChatTemplate(renderer(template)).write(chat)
    return [(written.text[: answer.start], written.text[answer.start : answer.content[1]]) for answer in written.answers]


def test_answers_start_where_the_prompt_ends() -> None:
    chat = [("system", "S"), ("user", "U1"), ("assistant", " A1\n"), ("user", "U2"), ("assistant", "A2")]
    first = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\n"
    second = first + " A1\n<|im_end|>\n<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n"
    assert answers(CHATML, chat) == [(first, " A1\n"), (second, "A2")]


def test_contents_are_found_where_the_template_strips_them() -> None:
    chat = [("user", " U "), ("assistant", "\n A \n")]
    assert answers(TRIMMED, chat) == [("<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n", "A")]


def test_a_space_that_the_template_writes_belongs_to_the_answer() -> None:
    assert answers(MERGED, [("system", "S"), ("user", "U"), ("assistant", "A ")]) == [("[INST] S\nU [/INST]", " A")]


def test_messages_may_stand_in_another_order() -> None:
    chat = [("system", "S"), ("user", "U1"), ("assistant", "A1"), ("user", "U2"), ("assistant", "A2")]
    # In front of A1 the prompt for it has the system message, the whole chat has not: only A2 can be prompted.
    assert answers(LATE_SYSTEM, chat) == [("[INST] U1[/INST] A1</s>[INST] S\nU2[/INST]", " A2")]


@pytest.mark.parametrize("template", [CHATML, TRIMMED, MERGED, THINKING, FORCED_THINK, plain_template(bos=False)])
def test_the_prompt_is_the_start_of_the_chat(template: str) -> None:
    draw = random.Random(0)
    chats = ChatTemplate(renderer(template, eos_token="<|end|>"))
    for _ in range(50):
        texts = ["".join(draw.choices(" \n\tabé🙂<|>{}", k=draw.randint(1, 6))) for _ in range(4)]
        chat = [(role, text) for role, text in zip(["user", "assistant"] * 2, texts, strict=True)]
        for number in (1, 3):
            whole, prompt = chats.write(chat[: number + 1]), chats.prompt(chat[:number])
            assert whole.text[: whole.answers[-1].start] == prompt.text


def test_forced_first_words_of_a_prompt_are_left_out_where_given_answers_lack_them() -> None:
    assert ChatTemplate(renderer(FORCED_THINK)).prompt([("user", "U")]).text == (
        "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_empty_think_block_is_learnt_and_reasoning_in_the_templates_form_is_kept() -> None:
    header = "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    assert answers(THINKING, [("user", "U"), ("assistant", "A")]) == [(header, "<think>\n\n</think>\n\nA")]
    reasoned = "<think>\nbecause\n</think>\n\nA"
    assert answers(THINKING, [("user", "U"), ("assistant", reasoned)]) == [(header, reasoned)]


def test_a_template_that_rewrites_an_answer_is_refused() -> None:
    chat = [("user", "U"), ("assistant", "<think>\nbecause\n</think>\n\nA"), ("user", "V"), ("assistant", "B")]
    with pytest.raises(ConversationError, match="rewrites the messages"):
        answers(THINKING, chat)
    with pytest.raises(ConversationError, match="rewrites the messages"):
        answers(CHATML.replace("m.content", "m.content | replace('z', 'y')"), [("user", "U"), ("assistant", "z")])


def test_a_template_that_drops_or_repeats_a_message_is_refused() -> None:
    chat = [("system", "S"), ("user", "U"), ("assistant", "A")]
    with pytest.raises(ConversationError, match=r"message 1 \(role system\) 0 times"):
        answers(CHATML.replace("in messages", "in messages if m.role != 'system'"), chat)
    with pytest.raises(ConversationError, match=r"message 1 \(role system\) 2 times"):
        answers(CHATML + "{{ messages[0].content }}", chat)


def test_a_template_without_generation_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no generation prompt.*assistant"):
        answers(CHATML.split("{% if add_generation_prompt")[0], [("user", "U"), ("assistant", "A")])


def test_a_prompt_in_other_words_than_the_chat_is_refused() -> None:
    template = CHATML + "{% if add_generation_prompt %}Go on:{% endif %}"
    other = template.replace("<|im_start|>assistant\n{% endif %}", "{% endif %}")
    assert ChatTemplate(renderer(other)).write([("user", "U"), ("assistant", "A")]).answers == ()
    with pytest.raises(ConversationError, match="asked for message 2"):
        ChatTemplate(renderer(other)).prompt([("user", "U")])


def test_a_template_that_writes_the_date_outlives_the_day() -> None:
    day = ["Monday"]
    inner = renderer(CHATML)
    chats = ChatTemplate(lambda chat, ask: f"{day[0]}\n{inner(chat, ask)}")
    chat = [("user", "U"), ("assistant", "A")]
    assert chats.write(chat).text.startswith("Monday\n")
    day[0] = "Tuesday"
    assert chats.write(chat).text.startswith("Tuesday\n<|im_start|>user\nU")


def test_where_an_answers_text_is_and_what_follows() -> None:
    written = ChatTemplate(renderer(MERGED)).write([("user", "U"), ("assistant", "A "), ("user", "V")])
    (answer,) = written.answers
    assert written.text[slice(*answer.content)] == "A"
    assert (answer.message, answer.after) == (1, "</s>[INST] ")


def test_more_than_ten_messages_are_told_apart() -> None:
    roles = ["user", "assistant"] * 8
    assert [slot.message for slot in build_skeleton(renderer(CHATML), roles).slots] == list(range(16))


def test_plain_template() -> None:
    chat = [("system", "S"), ("user", "U"), ("assistant", "A")]
    render = renderer(plain_template(bos=True), bos_token="<s>", eos_token="</s>")
    assert render(chat, False) == "<s>System: S\nUser: U\nAssistant: A</s>\n"
    assert render(chat[:2], True) == "<s>System: S\nUser: U\nAssistant:"
