"""torchao in transformers: int8 weights, and int4 in groups of 32; where the likeliest word stays the same, and what
it costs.

It passes where both load and compute; a share of equal words is for the reader to judge beside that of the dense model.
"""

from typing import Any

import torch
import torchao
import transformers
from comparison import Case, answer, case_of, trusts
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, TorchAoConfig

CONFIGS = {
    "int8": Int8WeightOnlyConfig(),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),  # the one that CPUs compute
}


def main() -> None:
    case = case_of()
    facts: dict[str, Any] = {}
    losses: dict[str, dict[str, float]] = {}
    for name, config in CONFIGS.items():
        try:
            facts[name], losses[name] = compared(case, config)
        except Exception as error:  # one's failure is a result, and the other is still to try
            facts[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    passes = all(isinstance(value, float) for value in facts.values())
    version = f"{torchao.__version__}, transformers {transformers.__version__}"
    answer({"passes": passes, **facts, "quantised": losses, "version": version})


@torch.no_grad()
def compared(case: Case, config: Any) -> tuple[float, dict[str, float]]:
    """Share of the places in the text's windows where both models think the same word likeliest; divergence from the
    model in float32, and perplexity."""
    tokens = torch.from_numpy(case.windows)
    plain, found = (log_probabilities(case, tokens, settings) for settings in (None, TorchAoConfig(config)))
    same = float((plain.argmax(-1) == found.argmax(-1)).float().mean())
    divergence = float((plain.exp() * (plain - found)).sum(-1).mean())
    loss = -found[:, :-1].gather(-1, tokens[:, 1:, None]).mean()
    return same, {"divergence": divergence, "perplexity": float(loss.exp())}


def log_probabilities(case: Case, tokens: torch.Tensor, settings: Any) -> torch.Tensor:
    """[windows, time, vocabulary]"""
    model = AutoModelForCausalLM.from_pretrained(
        case.model, dtype=torch.float32, quantization_config=settings, trust_remote_code=trusts(case.model)
    )
    logits = model.eval()(input_ids=tokens, use_cache=False).logits
    if not bool(logits.isfinite().all()):
        raise ValueError("logits are not finite")
    return logits.float().log_softmax(-1)


if __name__ == "__main__":
    main()
