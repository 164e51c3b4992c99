"""llama.cpp: its converter to GGUF, float32 logits, greedy tokens, its own tokenizer."""

import llama_cpp
from comparison import answer, case_of, compared, tokenized
from gguf_files import FLOAT32, converted, greedy, logits_of, opened


def main() -> None:
    case = case_of()
    notes = converted(case)
    model = opened(case.scratch / FLOAT32)
    logits = [logits_of(model, prompt) for prompt in case.prompts]
    facts = compared(case, logits, greedy(model, case.prompts[0], len(case.greedy)))
    facts["tokenizer"] = tokenized(case, lambda text: model.tokenize(text.encode(), add_bos=False, special=True))
    facts["passes"] = facts["passes"] and facts["tokenizer"] == "same"
    answer({**facts, "notes": notes, "version": f"binding {llama_cpp.__version__}"})


if __name__ == "__main__":
    main()
