"""What llama.cpp's two clients have in common: a model's GGUF in float32, and reading one."""

import subprocess
from pathlib import Path
from typing import Any

import llama_cpp
import numpy
from comparison import Case
from numpy import ndarray

FLOAT32 = "f32.gguf"
CONTEXT = 256


def converted(case: Case) -> str:
    """Write the GGUF unless it is there: with the transformers that the converter asks for, or else with a newer one.

    What there is to say of that. Raises CalledProcessError where none of the environments can.
    """
    out, notes = case.scratch / FLOAT32, case.scratch / "notes.txt"
    if out.exists():
        return notes.read_text()
    said = []
    for python in case.pythons:
        partial = case.scratch / "partial.gguf"
        program = Path(__file__).with_name("convert_gguf.py")
        command = [str(part) for part in (python, program, case.tools / "vendor" / "llama.cpp", case.model, partial)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            said += [line for line in done.stdout.splitlines() if line.startswith("unknown")]
            partial.rename(out)
            notes.write_text("; ".join(said))
            return notes.read_text()
        lines = (done.stderr.strip() or done.stdout.strip() or f"exit {done.returncode}").splitlines()
        said.append(f"with {python.parent.parent.name}: {lines[-1]}")
    raise RuntimeError("; ".join(said))


def opened(path: Path) -> Any:
    """On one thread, keys and values in float32."""
    float32 = llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(
        str(path), n_ctx=CONTEXT, n_batch=CONTEXT, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False,
        type_k=float32, type_v=float32,
    )  # fmt: skip


def logits_of(model: Any, tokens: list[int]) -> ndarray:
    """[time, vocabulary] of a text that begins here."""
    model.reset()
    model.eval(tokens)
    return numpy.array(model.scores[: len(tokens)])


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """With the cache, one by one."""
    token = int(logits_of(model, prompt)[-1].argmax())
    found = [token]
    while len(found) < count:
        model.eval([token])
        token = int(model.scores[model.n_tokens - 1].argmax())
        found.append(token)
    return found
