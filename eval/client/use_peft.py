"""peft: LoRA on every linear, two steps of training, save, reload, merge, save, reload."""

from typing import Any

import peft
import torch
import transformers
from comparison import Case, answer, case_of, difference, trusts
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

STEPS = 2


def main() -> None:
    case = case_of()
    torch.manual_seed(0)
    base = loaded(case, case.model)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    losses = trained(adapted, torch.tensor(case.prompts[:1]))
    taught = logits_of(adapted, case)
    adapted.save_pretrained(case.scratch / "adapter")
    again = PeftModel.from_pretrained(loaded(case, case.model), case.scratch / "adapter")
    facts = {"reloaded": difference(logits_of(again, case).numpy(), taught.numpy())}
    merged = again.merge_and_unload()
    facts["merged"] = difference(logits_of(merged, case).numpy(), taught.numpy())
    merged.save_pretrained(case.scratch / "merged")
    whole = loaded(case, case.scratch / "merged")
    facts["merged, reloaded"] = difference(logits_of(whole, case).numpy(), taught.numpy())
    moved = difference(taught.numpy(), case.logits[0])
    passes = moved > 0 and losses[-1] < losses[0] and max(facts.values()) <= 1e-3
    version = f"{peft.__version__}, transformers {transformers.__version__}"
    answer({"passes": passes, "difference": max(facts.values()), **facts, "losses": losses, "version": version})


def loaded(case: Case, directory: Any) -> Any:
    own = trusts(case.model)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=own).eval()


def trained(model: Any, tokens: Tensor) -> list[float]:
    """The losses before every step and after the last."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        return [*losses, model(input_ids=tokens, labels=tokens).loss.item()]


@torch.no_grad()
def logits_of(model: Any, case: Case) -> Tensor:
    """[time, vocabulary] of the first prompt."""
    return model(input_ids=torch.tensor(case.prompts[:1]), use_cache=False).logits[0]


if __name__ == "__main__":
    main()
