"""Calibration data as people have it: some 50 small files and folders, each read right or refused in one clear line.

    python eval/calibration_data.py
    python eval/calibration_data.py --keep DIR        # keeps what it made

Everything is made here, from the same few documents and chats. What is right for a case is that its windows hold the
documents' tokens, or that a UserError says, in one line, what is wrong and where. Exits with 1 if any case is neither.
"""

import argparse
import bz2
import gzip
import json
import lzma
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pyarrow
import pyarrow.parquet
from transformers import AutoTokenizer

from slimlm.calibration import load_windows
from slimlm.checkpoint.resolve import BUNDLED
from slimlm.errors import UserError
from slimlm.recipe import Meant

WORD = "Grüße"  # in every document, once in each
TEXTS = [f"{WORD} number {number}. " + "The quick brown fox jumps over the lazy dog. " * 6 for number in range(12)]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system goes first') }}"
    "{% endif %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)
CHATS = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}] for text in TEXTS]


class Case(NamedTuple):
    """A file or folder to make, and what has to come of it. says: a part of the error; None where it is to be read.

    template: of the tokenizer. column: what --text-column says.
    """

    name: str
    make: Callable[[Path], object]
    says: str | None = None
    template: str | None = TEMPLATE
    column: str | None = None


def lines(*rows: Any) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def of(content: bytes | str) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda path: path.write_bytes(data)


def rows_of(**columns: Callable[[int], Any]) -> list[dict[str, Any]]:
    return [{name: value(number) for name, value in columns.items()} for number in range(len(TEXTS))]


def text(number: int) -> str:
    return TEXTS[number]


def table(rows: list[dict[str, Any]]) -> Any:
    return pyarrow.Table.from_pylist(rows)


def parquet(rows: list[dict[str, Any]]) -> Callable[[Path], object]:
    return lambda path: pyarrow.parquet.write_table(table(rows), path)


def arrow(path: Path) -> None:
    with pyarrow.ipc.new_stream(str(path), table(PLAIN).schema) as writer:
        writer.write_table(table(PLAIN))


def arrow_file(path: Path) -> None:
    with pyarrow.ipc.new_file(str(path), table(PLAIN).schema) as writer:
        writer.write_table(table(PLAIN))


def zstandard(path: Path) -> None:
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(JSONL)


def folder(path: Path) -> None:
    path.mkdir()
    (path / "a.txt").write_bytes("\n<|endoftext|>\n".join(TEXTS[:6]).encode())
    (path / "b.jsonl").write_bytes(lines(*PLAIN[6:]))
    (path / "README.md").write_text("no data")


def saved(path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(PLAIN).save_to_disk(str(path))


def csv(rows: list[dict[str, Any]], separator: str = ",") -> str:
    def cell(value: Any) -> str:
        return '"' + str(value).replace('"', '""') + '"'

    head = separator.join(rows[0])
    return "\r\n".join([head, *(separator.join(cell(value) for value in row.values()) for row in rows)])


PLAIN = rows_of(text=text)
JSONL = lines(*PLAIN)
SHAREGPT = rows_of(conversations=lambda n: [{"from": "human", "value": text(n)}, {"from": "gpt", "value": "Yes."}])
MESSAGES = rows_of(id=lambda n: n, messages=lambda n: CHATS[n])
TOOL = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "weather"}}]},
    {"role": "tool", "content": "rain"},
]
WEATHER = json.dumps([{"type": "function", "function": {"name": "weather"}}])
WITH_TOOLS = rows_of(messages=lambda n: [*CHATS[n], *TOOL], tools=lambda n: WEATHER)
IMAGE = {"messages": [{"role": "user", "content": [{"type": "image"}]}]}
PARTS = rows_of(messages=lambda n: [{"role": "user", "content": [{"type": "text", "text": text(n)}]}])
PREFERENCE = rows_of(prompt=text, chosen=lambda n: "Yes.", rejected=lambda n: f"{WORD} no.")
PREFERENCE_CHATS = rows_of(chosen=lambda n: CHATS[n], rejected=lambda n: [{"role": "user", "content": WORD}])
SYSTEM = rows_of(messages=lambda n: [{"role": "system", "content": "Be brief."}, *CHATS[n]])
TWICE_SYSTEM = rows_of(messages=lambda n: [*CHATS[n], {"role": "system", "content": "Be brief."}])

CASES = [
    Case("plain.txt", of("\n<|endoftext|>\n".join(TEXTS))),
    Case("bom.txt", of("\ufeff" + "\n<|endoftext|>\n".join(TEXTS))),
    Case("crlf.txt", of("\r\n<|endoftext|>\r\n".join(TEXTS))),
    Case("UPPER.TXT", of("\n<|endoftext|>\n".join(TEXTS))),
    Case("text.jsonl", of(JSONL)),
    Case("bom.jsonl", of(b"\xef\xbb\xbf" + JSONL)),
    Case("crlf.jsonl", of(JSONL.replace(b"\n", b"\r\n") + b"\r\n")),
    Case("strings.jsonl", of(lines(*TEXTS))),
    Case("rows.json", of(json.dumps(PLAIN))),
    Case("nested.json", of(json.dumps({"version": 1, "data": PLAIN}))),
    Case("lines.json", of(JSONL)),
    Case("only-one.jsonl", of(lines(*rows_of(id=lambda n: n, body=text)))),
    Case("text.csv", of(csv(rows_of(id=lambda n: n, text=text)))),
    Case("text.tsv", of(csv(rows_of(id=lambda n: n, text=text), "\t"))),
    Case("text.parquet", parquet(PLAIN)),
    Case("text.arrow", arrow),
    Case("file.arrow", arrow_file),
    Case("text.jsonl.gz", lambda path: path.write_bytes(gzip.compress(JSONL))),
    Case("text.jsonl.bz2", lambda path: path.write_bytes(bz2.compress(JSONL))),
    Case("text.jsonl.xz", lambda path: path.write_bytes(lzma.compress(JSONL))),
    Case("text.jsonl.zst", zstandard),
    Case("folder", folder),
    Case("saved", saved),
    Case("messages.jsonl", of(lines(*MESSAGES))),
    Case("messages.parquet", parquet(MESSAGES)),
    Case("sharegpt.json", of(json.dumps(SHAREGPT))),
    Case("system.jsonl", of(lines(*SYSTEM))),
    Case("tools.jsonl", of(lines(*WITH_TOOLS))),
    Case("parts.jsonl", of(lines(*PARTS))),
    Case("completion.jsonl", of(lines(*rows_of(prompt=text, completion=lambda n: "Yes.")))),
    Case("alpaca.json", of(json.dumps(rows_of(instruction=text, input=lambda n: "", output=lambda n: "Yes.")))),
    Case("dolly.jsonl", of(lines(*rows_of(instruction=lambda n: "Say", context=text, response=lambda n: "Yes.")))),
    Case("questions.csv", of(csv(rows_of(question=text, answer=lambda n: "Yes.")))),
    Case("preference.jsonl", of(lines(*PREFERENCE))),
    Case("preference-chats.jsonl", of(lines(*PREFERENCE_CHATS))),
    Case("chats-by-name.jsonl", of(lines(*rows_of(a=lambda n: CHATS[n], b=text))), column="a"),
    Case("tokens.npy", lambda path: numpy.save(path, numpy.arange(640).reshape(20, 32))),
    Case("no-template.jsonl", of(lines(*MESSAGES)), "has no chat template", template=None),
    Case("refused-system.jsonl", of(lines(*SYSTEM)), "refuses a chat of system, user, assistant", template=NO_SYSTEM),
    Case("late-system.jsonl", of(lines(*TWICE_SYSTEM)), "system goes first"),
    Case("two-columns.csv", of(csv(rows_of(title=text, body=text))), "(it has: title, body): pass --text-column"),
    Case("no-such-column.csv", of(csv(rows_of(title=text))), "did you mean 'title'", column="titel"),
    Case("broken.jsonl", of(JSONL + b'\n{"text": "cut of'), "line 13 is not JSON"),
    Case("broken.json", of('[{"text": "x"},]'), "it is not JSON"),
    Case("latin1.txt", of("Grüße aus Köln\nund Grüße".encode("latin-1")), "not UTF-8 text: byte 2, in line 1"),
    Case("ragged.csv", of('id,text\n1,"a"\n2,"b",c\n'), "line 3 has another number of cells"),
    Case("open-quote.csv", of('text\n"never closed\n'), "behind line 1: unexpected end"),
    Case("numbers.jsonl", of(lines({"text": 5})), "not text, tokens or a chat"),
    Case("image.jsonl", of(lines(IMAGE)), "only text can be"),
    Case("no-role.jsonl", of(lines({"messages": [{"content": "x"}]})), "no role or content"),
    Case("lists.jsonl", of(lines([1, 2])), "line 1 is list"),
    Case("half.jsonl.gz", lambda path: path.write_bytes(gzip.compress(JSONL)[:40]), "cannot be read"),
    Case("cut.parquet", of("PAR1xx"), "cannot be read"),
    Case("empty.jsonl", of(""), "is empty"),
    Case("nothing.json", of("[]"), "is empty"),
    Case("picture.png", of("x"), "is none of"),
    Case("hollow", lambda path: path.mkdir(), "holds no saved dataset"),
    Case("short.txt", of("too short"), "fewer than one window"),
    Case("gone.txt", lambda path: None, "does not exist"),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="an empty directory for what is made")
    arguments = parser.parse_args()
    wrong = 0
    print("| data | as it should | what came of it |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        place = arguments.keep or Path(name)
        for case, right, found in results(place):
            wrong += not right
            print(f"| {case.name} | {'yes' if right else 'NO'} | {found} |")
    print(f"{len(CASES) - wrong} of {len(CASES)}")
    sys.exit(wrong > 0)


def results(place: Path) -> Iterator[tuple[Case, bool, str]]:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED["llama"])
    for case in CASES:
        path = place / case.name
        case.make(path)
        tokenizer.chat_template = case.template
        try:
            windows = load_windows(str(path), tokenizer, 1000, 16, meant=Meant(case.column))
        except UserError as error:
            line = str(error).replace(str(place), "")
            yield case, case.says is not None and case.says in line and "\n" not in line, line
            continue
        count = tokenizer.decode(windows.tokens.flatten()).count(WORD)
        is_whole = path.suffix == ".npy" or len(TEXTS) - 1 <= count <= len(TEXTS)  # the last window is not full
        yield case, case.says is None and is_whole, f"{len(windows.tokens)} windows, {count} documents"


if __name__ == "__main__":
    main()
