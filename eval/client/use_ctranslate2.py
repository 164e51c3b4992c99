"""CTranslate2: its converter in float32, `Generator.forward_batch`, greedy tokens one by one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ctranslate2
import numpy
import transformers
from comparison import answer, case_of, compared

CONVERTER = "from ctranslate2.converters.transformers import main; main()"


def main() -> None:
    case = case_of()
    out = case.scratch / "converted"
    command = [sys.executable, "-c", CONVERTER, "--model", case.model, "--output_dir", out, "--quantization", "float32"]
    subprocess.run([str(part) for part in command], check=True)
    generator = ctranslate2.Generator(str(out), device="cpu", compute_type="float32", intra_threads=1)
    words = vocabulary(out)
    text = list(case.prompts[0])
    for _ in case.greedy:
        text.append(int(logits_of(generator, text, words)[-1].argmax()))
    logits = [logits_of(generator, prompt, words) for prompt in case.prompts]
    facts = compared(case, logits, text[len(case.prompts[0]) :])
    answer({**facts, "version": f"{ctranslate2.__version__}, transformers {transformers.__version__}"})


def vocabulary(out: Path) -> list[str]:
    return json.loads((out / "vocabulary.json").read_text(encoding="utf-8"))


def logits_of(generator: Any, tokens: list[int], words: list[str]) -> Any:
    """[time, vocabulary]"""
    return numpy.array(generator.forward_batch([[words[token] for token in tokens]]))[0]


if __name__ == "__main__":
    main()
