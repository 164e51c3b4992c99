"""onnxruntime-genai: its model builder (fp32, CPU), its generator, its tokenizer."""

import os
import subprocess
import sys
from typing import Any

import numpy
import onnxruntime_genai as og
import transformers
from comparison import Case, answer, case_of, compared, tokenized


def main() -> None:
    case = case_of()
    out = case.scratch / "onnx"
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(case.model), "-o", str(out)]
    command += ["-p", "fp32", "-e", "cpu", "-c", str(case.scratch / "cache")]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    model = og.Model(str(out))
    logits = [logits_of(model, prompt) for prompt in case.prompts]
    facts = compared(case, logits, greedy(model, case))
    tokenizer = og.Tokenizer(model)
    facts["tokenizer"] = tokenized(case, tokenizer.encode)
    facts["passes"] = facts["passes"] and facts["tokenizer"] == "same"
    answer({**facts, "version": f"{og.__version__}, transformers {transformers.__version__}"})


def generator_of(model: Any, prompt: list[int]) -> Any:
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(prompt) + 64)
    generator = og.Generator(model, parameters)
    generator.append_tokens(numpy.array([prompt], dtype=numpy.int32))
    return generator


def logits_of(model: Any, prompt: list[int]) -> Any:
    """[time, vocabulary] of all places, or of the last one where the builder keeps no others."""
    return numpy.array(generator_of(model, prompt).get_output("logits"))[0]


def greedy(model: Any, case: Case) -> list[int]:
    generator = generator_of(model, case.prompts[0])
    found: list[int] = []
    while len(found) < len(case.greedy) and not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    return found


if __name__ == "__main__":
    main()
