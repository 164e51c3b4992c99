"""llama.cpp's quantised files: size, matrices it would not quantise, divergence from f32, perplexity, decoding speed.

Speed is in tokens per second of CPU time on one thread, the model and the dense one in turns, medians. It passes where
every format is made and read; what quantising costs is for the reader to judge.
"""

import ctypes
import gc
import math
import statistics
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy
from comparison import Case, answer, case_of
from gguf_files import FLOAT32, converted, logits_of, opened
from numpy import ndarray

FORMATS = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}  # llama_ftype
TURNS, DECODED = 5, 32


def main() -> None:
    case = case_of()
    notes = converted(case)
    for name, code in FORMATS.items():
        quantise(case.scratch / FLOAT32, case.scratch / f"{name}.gguf", code)
    exact = log_probabilities(case.scratch / FLOAT32, case.windows)
    formats = {"f32": described(case, FLOAT32, exact, exact)}
    for name in FORMATS:
        found = log_probabilities(case.scratch / f"{name}.gguf", case.windows)
        formats[name] = described(case, f"{name}.gguf", found, exact)
    answer(
        {
            "passes": all(math.isfinite(one["perplexity"]) for one in formats.values()),
            "notes": notes,
            "formats": formats,
        }
    )


def quantise(source: Path, out: Path, code: int) -> None:
    """Unless it is there."""
    if out.exists():
        return
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = code, 1
    partial = out.with_suffix(".partial")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(settings)):
        raise RuntimeError(f"llama_model_quantize gives no {out.stem}")
    partial.rename(out)


def log_probabilities(path: Path, windows: ndarray) -> ndarray:
    """[windows, time, vocabulary]"""
    model = opened(path)
    found = []
    for window in windows:
        logits = logits_of(model, window.tolist())
        logits -= logits.max(axis=-1, keepdims=True)
        found.append(logits - numpy.log(numpy.exp(logits).sum(axis=-1, keepdims=True)))
    return numpy.stack(found)


def described(case: Case, file: str, found: ndarray, exact: ndarray) -> dict[str, Any]:
    path = case.scratch / file
    divergence = float((numpy.exp(exact) * (exact - found)).sum(axis=-1).mean())
    losses = -numpy.take_along_axis(found[:, :-1], case.windows[:, 1:, None], axis=-1)
    matrices = [tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1]
    facts = {
        "bytes": path.stat().st_size,
        "matrices": len(matrices),
        "in F16 or F32": sum(kind in {"F16", "F32"} for kind in matrices),
        "divergence": divergence,
        "perplexity": math.exp(losses.mean()),
    }
    dense = case.dense and case.dense / file
    if dense and dense.exists():
        facts["tokens_per_second"], facts["dense_tokens_per_second"] = speeds(path, dense, case.prompts[0])
    return facts


def speeds(path: Path, dense: Path, prompt: list[int]) -> list[float]:
    """Medians of both, which take turns so that neither has the machine's better moments."""
    gc.collect()
    models = [opened(path), opened(dense)]
    taken: list[list[float]] = [[], []]
    for _ in range(TURNS):
        for model, seconds in zip(models, taken, strict=True):
            logits_of(model, prompt)
            start = time.process_time()
            for token in (prompt * DECODED)[:DECODED]:
                model.eval([token])
            seconds.append(time.process_time() - start)
    return [DECODED / statistics.median(seconds) for seconds in taken]


if __name__ == "__main__":
    main()
