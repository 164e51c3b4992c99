"""transformers, whichever is there: logits, `generate` with its cache, the tokenizer."""

from typing import Any

import torch
import transformers
from comparison import Case, answer, case_of, compared, tokenized, trusts
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    case = case_of()
    own = trusts(case.model)
    dtype = "dtype" if transformers.__version__ >= "5" else "torch_dtype"
    model, loading = AutoModelForCausalLM.from_pretrained(
        case.model, trust_remote_code=own, output_loading_info=True, **{dtype: torch.float32}
    )
    wrong = {key: sorted(value)[:3] for key, value in loading.items() if value}
    facts = compared(case, logits_of(model.eval(), case), greedy(model, case))
    facts["tokenizer"] = tokenized(case, lambda text: encoded(case, text, own))
    facts["passes"] = facts["passes"] and not wrong and facts["tokenizer"] == "same"
    answer({**facts, "loading": wrong, "version": transformers.__version__})


@torch.no_grad()
def logits_of(model: Any, case: Case) -> list[Any]:
    return [model(torch.tensor([prompt])).logits[0].float().numpy() for prompt in case.prompts]


def greedy(model: Any, case: Case) -> list[int]:
    prompt = torch.tensor(case.prompts[:1])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(case.greedy), do_sample=False, pad_token_id=0
    )
    return list(out[0, prompt.shape[1] :])


def encoded(case: Case, text: str, own: bool) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(case.model, trust_remote_code=own)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


if __name__ == "__main__":
    main()
