import pytest
from transformers import AutoTokenizer

from slimlm.calibration.rows import document_of
from slimlm.checkpoint.resolve import BUNDLED
from slimlm.errors import UserError

TEMPLATE = (
    "{% if tools %}[{{ tools[0].name }}]{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}!{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED["llama"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "document"),
    [
        ("a text", "a text"),
        ({"text": "a", "messages": CHAT}, "a"),
        ({"text": None}, ""),
        ({"input_ids": [1, 2], "labels": [3]}, [1, 2]),
        ({"id": 3, "body": "the only text"}, "the only text"),
        ({"messages": CHAT, "id": "x"}, "<user>a<assistant>b"),
        ({"messages": []}, []),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "<user>a<assistant>b"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}]}, "<user>ab"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "<assistant>!"),
        ({"messages": CHAT, "tools": '[{"name": "t"}]'}, "[t]<user>a<assistant>b"),
        ({"prompt": "a", "completion": "b"}, "<user>a<assistant>b"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "<user>a<assistant>b"),
        ({"instruction": "a", "input": "c", "output": "b"}, "<user>a\n\nc<assistant>b"),
        ({"instruction": "a", "input": "", "output": "b"}, "<user>a<assistant>b"),
        ({"instruction": "a", "output": "b"}, "<user>a<assistant>b"),
        ({"instruction": "a", "context": "c", "response": "b", "category": "x"}, "<user>a\n\nc<assistant>b"),
        ({"question": "a", "answer": "b"}, "<user>a<assistant>b"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "<user>a<assistant>b"),
        ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]}, "<user>a<assistant>b"),
        ({"prompt": "a", "chosen": CHAT, "rejected": CHAT}, "<user>a<assistant>b"),
        ({"chosen": CHAT, "rejected": CHAT}, "<user>a<assistant>b"),
    ],
)
def test_rows_of_every_kind_become_documents(row, document, tokenizer):
    assert document_of(row, None, tokenizer, "data") == document


def test_a_column_that_is_named_is_taken(tokenizer):
    row = {"text": "no", "body": "yes", "talk": CHAT}
    assert document_of(row, "body", tokenizer, "data") == "yes"
    assert document_of(row, "talk", tokenizer, "data") == "<user>a<assistant>b"


@pytest.mark.parametrize(
    ("row", "column", "words"),
    [
        ({"title": "a", "body": "b"}, None, r"not clear \(it has: title, body\): pass --text-column"),
        ({"id": 1}, None, r"not clear \(it has: id\)"),
        ({"body": "a"}, "bdy", "no column 'bdy'; did you mean 'body'"),
        ({"messages": [{"content": "a"}]}, None, "no role or content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, None, "only text can be taken"),
        ({"prompt": "a", "completion": 5}, None, "holds 5, neither text nor turns"),
        ({"messages": 5}, None, "holds 5, not text, tokens or a chat"),
    ],
)
def test_rows_that_are_no_documents_are_one_clear_line(row, column, words: str, tokenizer):
    with pytest.raises(UserError, match=words) as caught:
        document_of(row, column, tokenizer, "data")
    assert "\n" not in str(caught.value)


def test_without_a_template_chats_are_refused_and_texts_are_not(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="the tokenizer has no chat template: put a chat_template.jinja"):
        document_of({"messages": CHAT}, None, tokenizer, "data")
    assert document_of({"text": "a"}, None, tokenizer, "data") == "a"
