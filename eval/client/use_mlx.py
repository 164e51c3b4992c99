"""mlx-lm on a CPU: logits in float32, `generate_step` with its cache, the tokenizer."""

from itertools import islice
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy
from comparison import Case, answer, case_of, compared, tokenized
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model, load_tokenizer


def main() -> None:
    case = case_of()
    mx.set_default_device(mx.cpu)
    model, _ = load_model(case.model, lazy=True)
    model.set_dtype(mx.float32)
    logits = [numpy.array(model(mx.array([prompt])))[0] for prompt in case.prompts]
    facts = compared(case, logits, greedy(model, case))
    facts["tokenizer"] = tokenized(case, lambda text: encoded(case, text))
    facts["passes"] = facts["passes"] and facts["tokenizer"] == "same"
    answer({**facts, "version": mlx_lm.__version__})


def greedy(model: Any, case: Case) -> list[int]:
    steps = generate_step(mx.array(case.prompts[0]), model, max_tokens=len(case.greedy))
    return [int(token) for token, _ in islice(steps, len(case.greedy))]


def encoded(case: Case, text: str) -> list[int]:
    return list(load_tokenizer(case.model).encode(text, add_special_tokens=False))


if __name__ == "__main__":
    main()
