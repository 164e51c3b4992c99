"""vLLM on a CPU in float32: log-probabilities of the likeliest words at every place of the prompts, greedy tokens."""

import os
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}

import numpy
import transformers
import vllm
from comparison import answer, case_of, compared, trusts
from vllm import LLM, SamplingParams

WORDS = 20


def main() -> None:
    case = case_of()
    model = LLM(
        str(case.model), dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=2, max_logprobs=WORDS,
        trust_remote_code=trusts(case.model),
    )  # fmt: skip
    asked = SamplingParams(temperature=0, max_tokens=len(case.greedy), prompt_logprobs=WORDS, ignore_eos=True)
    found = model.generate([{"prompt_token_ids": prompt} for prompt in case.prompts], asked)
    gap = max(gap_of(one.prompt_logprobs, logits) for one, logits in zip(found, case.logits, strict=True))
    facts = compared(case, case.logits, found[0].outputs[0].token_ids)
    facts |= {"difference": gap, "passes": facts["passes"] and gap <= 1e-3}
    answer({**facts, "version": f"{vllm.__version__}, transformers {transformers.__version__}"})


def gap_of(theirs: list[dict[int, Any] | None], ours: Any) -> float:
    """Largest difference of log-probabilities; vLLM's are of the words after the first, [time - 1] dictionaries."""
    shifted = ours.astype(numpy.float64) - ours.max(axis=-1, keepdims=True)
    ours = shifted - numpy.log(numpy.exp(shifted).sum(axis=-1, keepdims=True))
    pairs = [
        (one.logprob, ours[place, word])
        for place, words in enumerate(theirs[1:])
        for word, one in (words or {}).items()
    ]
    return float(max(abs(one - other) for one, other in pairs))


if __name__ == "__main__":
    main()
