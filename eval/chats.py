"""Chats to calibrate on, and others to judge by: self-instruct's two files of instructions as one turn and its answer.

https://github.com/yizhongw/self-instruct (Apache-2.0): `human_eval/user_oriented_instructions.jsonl` is to calibrate
on, `data/seed_tasks.jsonl` to judge by, written by people independently of each other.

    python eval/chats.py user_oriented_instructions.jsonl seed_tasks.jsonl --model /tmp/smollm2 --output DIR

writes DIR/chats.jsonl, in `messages`, and DIR/chats_test.txt, in the model's own chat template.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer


def chats(path: Path) -> Iterator[list[dict[str, str]]]:
    """The messages of each instance of a file's tasks."""
    for line in path.read_text(encoding="utf-8").splitlines():
        task = json.loads(line)
        for one in task["instances"]:
            asked = "\n\n".join(filter(None, [task["instruction"], one["input"]]))
            yield [{"role": "user", "content": asked}, {"role": "assistant", "content": one["output"]}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("learn", type=Path)
    parser.add_argument("judge", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    lines = [json.dumps({"messages": chat}) + "\n" for chat in chats(given.learn)]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats(given.judge)]
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "chats.jsonl").write_text("".join(lines), encoding="utf-8")
    (given.output / "chats_test.txt").write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")


if __name__ == "__main__":
    main()
