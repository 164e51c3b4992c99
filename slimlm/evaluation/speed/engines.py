"""Speed in programs that models are deployed to, where they are installed: llama.cpp through llama-cpp-python, vLLM.

Neither is a dependency. Each takes prompts as tokens and says how long they took, as `timing` wants it.
"""

import re
import time
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from slimlm.errors import RunFailure, UserError, one_line
from slimlm.model.decoding import Clock, Taken

TRANSFORMERS, LLAMA_CPP, VLLM = "transformers", "llama.cpp", "vllm"
PACKAGES = {LLAMA_CPP: ("llama_cpp", "llama-cpp-python"), VLLM: ("vllm", "vllm")}
PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")  # of a model that is split, which llama.cpp reads by its first
GPU_SHARE = 0.9  # of a GPU's memory that vLLM's models take together


def require_installed(engine: str) -> None:
    """Raises UserError for an engine that is not there."""
    if engine in PACKAGES and find_spec(PACKAGES[engine][0]) is None:
        raise UserError(f"{engine} is not installed here: pip install {PACKAGES[engine][1]}")


class LlamaCppRunner:
    """A GGUF file in llama.cpp, one sequence at a time. on_gpu: whether all its blocks are to be there, if this build
    of it has GPUs."""

    def __init__(
        self, path: Path, context: int, threads: int, on_gpu: bool = False, clock: Clock = time.perf_counter
    ) -> None:
        self.program = import_module("llama_cpp")
        self.clock = clock
        try:
            self.model: Any = self.program.Llama(
                str(path), n_ctx=context, n_batch=context, n_threads=threads, n_threads_batch=threads,
                n_gpu_layers=-1 if on_gpu else 0, verbose=False,
            )  # fmt: skip
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(f"{path} cannot be loaded by llama.cpp: {one_line(error)}") from error

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows."""
        return int(self.model.n_vocab())

    def run(self, prompts: Tensor, new_tokens: int) -> Taken:
        """prompts: [1, time]. Which tokens follow makes no difference to the time: the prompt's own do."""
        prompt = prompts[0].tolist()
        self.model.reset()
        start = self.clock()
        self._eval(prompt)
        times = [self.clock()]
        for place in range(new_tokens - 1):
            self._eval([prompt[place % len(prompt)]])
            times.append(self.clock())
        return Taken(times[0] - start, tuple(after - before for before, after in pairwise(times)))

    def _eval(self, tokens: list[int]) -> None:
        self.model.eval(tokens)
        self.program.llama_synchronize(self.model.ctx)


class VllmRunner:
    """A directory in vLLM's offline engine. of: how many models share the GPU's memory."""

    def __init__(self, path: Path, dtype: str, context: int, of: int, trust_remote_code: bool) -> None:
        self.program = import_module("vllm")
        self.clock: Clock = time.perf_counter
        try:
            self.model: Any = self.program.LLM(
                str(path), dtype=dtype, max_model_len=context, gpu_memory_utilization=GPU_SHARE / of,
                enable_prefix_caching=False, trust_remote_code=trust_remote_code,
            )  # fmt: skip
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(f"{path} cannot be loaded by vLLM: {one_line(error)}") from error

    def run(self, prompts: Tensor, new_tokens: int) -> Taken:
        """prompts: [batch, time]. A step is a share of the difference between a whole run and one of a single token.
        Raises RunFailure where that is nothing."""
        first = self._seconds(prompts, 1)
        rest = self._seconds(prompts, new_tokens) - first
        if rest <= 0:
            raise RunFailure(f"vLLM: {new_tokens} tokens took no longer than the first: give more --new-tokens")
        return Taken(first, (rest / (new_tokens - 1),))

    def _seconds(self, prompts: Tensor, new_tokens: int) -> float:
        asked = self.program.SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        start = self.clock()
        self.model.generate([{"prompt_token_ids": row} for row in prompts.tolist()], asked, use_tqdm=False)
        return self.clock() - start


def gguf_files(name: str) -> list[Path]:
    """What llama.cpp is to read of a file or directory, the first being what it is given; nothing of what is not its.
    Raises UserError for such a file that is not there, and for a directory with several models."""
    path = Path(name).expanduser()
    if path.is_dir() and not any(path.glob("*.safetensors")):
        found = sorted(path.glob("*.gguf"))
        models = {PART.sub("", one.name) for one in found}
        if len(models) > 1:
            raise UserError(f"{name} holds several GGUF files: give one of them, as in {found[0]}")
        return found
    if not name.endswith(".gguf"):
        return []
    if not path.is_file():
        raise UserError(f"GGUF file {name} does not exist")
    others = path.parent.glob("*.gguf") if PART.search(path.name) else ()
    whole = PART.sub("", path.name)
    return sorted({path, *(other for other in others if PART.sub("", other.name) == whole)})
