import json

import pytest
import torch

from trainer.encoding import Answer, BadMessages, ChatFormat, by_length, collate


def test_a_query_ends_where_the_assistant_speaks(chat: ChatFormat) -> None:
    query = chat.query([{"role": "user", "content": "hello"}])
    assert chat.tokenizer.decode(query) == "<user>hello<assistant>"


def test_content_in_parts_and_no_content_are_what_vllm_makes_of_them(chat: ChatFormat) -> None:
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "there"}]
    for content, text in ((parts, "hello\nthere"), ([], ""), (None, "")):
        query = chat.query([{"role": "user", "content": content}])
        assert query == chat.query([{"role": "user", "content": text}])


TOOLS = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}]{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ('{"city": "Rome", "days": 3}', "[weather city=Rome days=3]"), ({"city": "Rome"}, "[weather city=Rome]"),
        ("", "[weather]"), (None, "[weather]"), ("{city:", "[weather]"), ("[1, 2]", "[weather]"),
    ],
)  # fmt: skip
def test_arguments_of_tool_calls_are_objects_to_the_template(chat: ChatFormat, arguments: object, seen: str) -> None:
    chat.tokenizer.chat_template = TOOLS
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    before = json.dumps(messages)
    assert chat.tokenizer.decode(chat.query(messages)) == "?" + seen
    assert json.dumps(messages) == before


def test_no_tool_calls_are_none_to_the_template_and_others_than_functions_are_refused(chat: ChatFormat) -> None:
    chat.tokenizer.chat_template = "{% for m in messages %}{{ 'calls' if 'tool_calls' in m else 'none' }}{% endfor %}"
    for calls in ([], None):
        query = chat.query([{"role": "assistant", "content": "", "tool_calls": calls}])
        assert chat.tokenizer.decode(query) == "none"
    for call in ({"type": "custom", "function": {}}, {"type": "function"}, "weather"):
        with pytest.raises(BadMessages):
            chat.query([{"role": "assistant", "content": "", "tool_calls": [call]}])


PARTS = "{% for p in m.content %}{% if p.type == 'text' %}({{ p.text }}){% endif %}{% endfor %}"
EITHER = "{% if m.content is string %}({{ m.content }}){% else %}" + PARTS + "{% endif %}"


@pytest.mark.parametrize("content", [PARTS, EITHER], ids=["parts alone", "strings too"])
def test_a_template_that_takes_parts_is_given_parts(chat: ChatFormat, content: str) -> None:
    chat.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'tool' %}{{ m.content }}{% else %}" + content
        + "{% endif %}{% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )  # fmt: skip
    form = ChatFormat(chat.tokenizer, chat.end_ids)
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "there"}]
    for given, seen in (("hello", "(hello)"), (parts, "(hello)(there)"), (None, "")):
        query = form.query([{"role": "user", "content": given}])
        assert chat.tokenizer.decode(query) == f"<user>{seen}<assistant>"
    assert chat.tokenizer.decode(form.query([{"role": "tool", "content": parts}])) == "<tool>hello\nthere<assistant>"
    assert form.end_id == chat.end_id


def test_a_template_that_leaves_out_what_a_user_says_is_refused(chat: ChatFormat) -> None:
    chat.tokenizer.name_or_path = "some/model"
    for template in ("{% for m in messages %}{{ m.role }}: {{ m.text }}{% endfor %}", "{{ raise_exception('no') }}"):
        chat.tokenizer.chat_template = template
        with pytest.raises(ValueError, match="some/model: the chat template leaves out what a user says"):
            ChatFormat(chat.tokenizer, chat.end_ids)


def test_messages_that_the_template_refuses_are_told_from_other_faults(chat: ChatFormat) -> None:
    chat.tokenizer.chat_template = "{{ raise_exception('no system message, please') }}"
    with pytest.raises(BadMessages, match="no system message, please"):
        chat.query([{"role": "system", "content": "hello"}])


def test_an_answer_is_closed_by_the_end_token_of_the_template(chat: ChatFormat) -> None:
    answer = chat.answer([{"role": "user", "content": "hello"}], "hello there")
    assert chat.tokenizer.decode(answer.response) == "hello there<end>"
    assert chat.text(answer) == "hello there"


def test_an_answer_that_was_cut_off_has_no_end_token(chat: ChatFormat) -> None:
    answer = chat.answer([{"role": "user", "content": "hello"}], "hello there", finished=False)
    assert chat.tokenizer.decode(answer.response) == "hello there"
    assert not answer.finished


def test_a_tokenizer_without_chat_template_is_refused(chat: ChatFormat) -> None:
    chat.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        ChatFormat(chat.tokenizer, frozenset({1}))


def test_columns_point_one_before_each_response_token() -> None:
    answers = [Answer((5, 6, 7), (8, 9), True), Answer((5,), (6, 7, 8), True)]
    batch = collate(answers)
    for row, answer in enumerate(answers):
        for t, token in enumerate(answer.response):
            assert batch.mask[row, t]
            assert batch.input_ids[row, batch.columns[row, t] + 1] == token
        first, last = batch.spans[row, 0].tolist()
        assert tuple(batch.input_ids[row, first : last + 1].tolist()) == answer.response
    assert batch.mask.sum() == 5
    assert torch.equal(batch.input_ids[0], torch.tensor([5, 6, 7, 8, 9]))


def test_groups_by_length_hold_every_index_once_within_the_budget() -> None:
    lengths = [7, 3, 50, 3, 8, 4, 120, 9]
    groups = by_length(lengths, 100)
    assert sorted(i for group in groups for i in group) == list(range(8))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 100
    assert [120] in [[lengths[i] for i in g] for g in groups]


@pytest.mark.parametrize(("query", "response"), [((), (1,)), ((1,), ())])
def test_an_answer_without_tokens_is_refused(query: tuple[int, ...], response: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        Answer(query, response, True)
