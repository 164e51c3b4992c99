"""Rows of data sets as documents: a text, tokens, or a chat as the tokenizer's own template writes it."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from slimlm.calibration.files import Row
from slimlm.errors import UserError, nearest, one_line
from slimlm.plain import Json

Document = str | list[int]  # text, or tokens
Columns = Mapping[str, Json]
BY_THEMSELVES = ("text", "input_ids", "messages", "conversations", "conversation")  # in this order
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function": "tool", "observation": "tool",
}  # fmt: skip
QUESTIONS = (  # what is asked, what it is about, and the answer
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("prompt", "", "completion"),
    ("prompt", "", "response"),
    ("question", "", "answer"),
)


def named_column(names: Collection[str], column: str | None, source: str) -> str | None:
    """The column that is a document by itself; None where several make one. Raises UserError where it is not there."""
    if column is not None and column not in names:
        known = ", ".join(names) or "none"
        raise UserError(f"calibration data {source} has no column {column!r}{nearest(column, names)} (it has: {known})")
    return column or next((name for name in BY_THEMSELVES if name in names), None)


def needed_columns(names: Collection[str], column: str | None, source: str) -> list[str]:
    """Those that documents are made of, as far as names tell."""
    name = named_column(names, column, source)
    return [one for one in names if name is None or one in (name, "tools")]


def document_of(row: Row, column: str | None, tokenizer: PreTrainedTokenizerBase, source: str) -> Document:
    """A row as one document, empty where it holds none. column: the one that is meant, where it is not to be found
    out. Raises UserError for a row that is no document, and for chats that the tokenizer's template does not take."""
    if isinstance(row, str):
        return row
    name = named_column(row, column, source)
    if name is not None:
        return _of_column(row, name, tokenizer, source)
    if "chosen" in row:  # of a preference
        return _answered(row.get("prompt"), "", row["chosen"], tokenizer, source)
    for asked, about, answer in QUESTIONS:
        if asked in row and answer in row:
            return _answered(row[asked], row.get(about), row[answer], tokenizer, source)
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if len(texts) != 1:
        raise UserError(
            f"calibration data {source}: which column is the text is not clear (it has: {', '.join(row) or 'none'}): "
            "pass --text-column"
        )
    return _of_column(row, texts[0], tokenizer, source)


def _of_column(row: Columns, name: str, tokenizer: PreTrainedTokenizerBase, source: str) -> Document:
    content = row[name]
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(type(one) is int for one in content):
        return [int(str(one)) for one in content]
    if _is_chat(content):
        return _chat(_turns(content, source), row.get("tools"), tokenizer, source)
    raise UserError(f"calibration data {source}: column {name!r} holds {content!r:.40}, not text, tokens or a chat")


def _is_chat(content: Json) -> bool:
    turns = content if isinstance(content, Sequence) and not isinstance(content, str) else []
    return bool(turns) and all(isinstance(turn, Mapping) for turn in turns)


def _answered(asked: Json, about: Json, answer: Json, tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    """A question and its answer, each a text or turns of a chat; turns of an answer may hold the question, too."""
    turns = [*_said("user", asked, source), *_said("user", about, source)]
    if len(turns) == 2 and all(isinstance(one, str) for one in (asked, about)):
        turns = [{"role": "user", "content": f"{asked}\n\n{about}"}]
    ended = _said("assistant", answer, source)
    holds_all = bool(ended) and ended[0]["role"] != "assistant"
    return _chat(ended if holds_all else [*turns, *ended], None, tokenizer, source)


def _said(role: str, content: Json, source: str) -> list[dict[str, Json]]:
    if isinstance(content, Sequence) and _is_chat(content):
        return _turns(content, source)
    if content is None or content == "":
        return []
    if not isinstance(content, str):
        raise UserError(f"calibration data {source} holds {content!r:.40}, neither text nor turns of a chat")
    return [{"role": role, "content": content}]


def _turns(content: Json, source: str) -> list[dict[str, Json]]:
    """As templates want them, whatever roles and columns were called."""
    turns = content if isinstance(content, Iterable) else ()
    return [_turn(turn, source) for turn in turns if isinstance(turn, Mapping)]


def _turn(turn: Columns, source: str) -> dict[str, Json]:
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or (content is None and "tool_calls" not in turn):
        raise UserError(f"calibration data {source}: a turn has no role or content (it has: {', '.join(turn)})")
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise UserError(f"calibration data {source}: a turn holds {content!r:.40}, and only text can be taken")
        content = "".join(map(str, parts))
    others = {
        name: value
        for name, value in turn.items()
        if name not in ("role", "from", "content", "value") and value is not None
    }
    return {"role": ROLES.get(role, role), "content": content or "", **others}


def _chat(turns: list[dict[str, Json]], tools: Json, tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    """What the tokenizer's template makes of it. Raises UserError where it has none, or that refuses."""
    if not turns:
        return ""
    if not tokenizer.chat_template:
        raise UserError(
            f"calibration data {source} holds chats, and the tokenizer has no chat template: put a chat_template.jinja "
            "beside the model, or give a column of text with --text-column"
        )
    try:
        known = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
        found: str = tokenizer.apply_chat_template(turns, tools=known or None, tokenize=False)
    except Exception as error:  # templates raise what they please
        roles = ", ".join(dict.fromkeys(str(turn["role"]) for turn in turns))
        raise UserError(
            f"calibration data {source}: the tokenizer's chat template refuses a chat of {roles}: {one_line(error)}"
        ) from error
    return found
