"""Requests of every kind, answered by ranks together and then by each alone, for tests/evaluation/test_dealt.py."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimlm.checkpoint.resolve import BUNDLED
from slimlm.evaluation.dealt import DealtLM, dealt
from slimlm.evaluation.sources import python_reference
from slimlm.meeting import start_ranks

KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


def requests(kind: str) -> list[Instance]:
    """Of many lengths, in no order; some share a context, some end in one token, some go on in other ways."""
    words = " ".join(python_reference()).split()
    texts = [" ".join(words[start : start + 3 + start % 17]) for start in range(0, 400, 23)]
    if kind == "loglikelihood":
        given: list[tuple[Any, ...]] = [
            (text, end) for text in texts[:7] for end in (" the", " is", " a", " not so much")
        ]
    elif kind == "loglikelihood_rolling":
        given = [(text * (1 + index % 5),) for index, text in enumerate(texts)]
    else:
        given = [(text, {"until": ["."], "max_gen_toks": 3 + index % 2}) for index, text in enumerate(texts[:9])]
    return [Instance(kind, {}, arguments, index) for index, arguments in enumerate(given)]


def main(path: Path) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED["llama"]).eval()
    how = {"pretrained": model, "tokenizer": AutoTokenizer.from_pretrained(BUNDLED["llama"]), "batch_size": 3}
    how["max_length"] = 64  # so that rolling takes several windows
    with start_ranks("cpu") as ranks:
        together = DealtLM(**how)
        done, found = {}, {}
        with dealt(together, ranks):
            assert os.environ["LOCAL_RANK"] == "0"
            for kind in KINDS:
                before = ranks.did.get("requests", 0)
                found[kind] = getattr(together, kind)(requests(kind), disable_tqdm=True)
                done[kind] = ranks.gather(ranks.did["requests"] - before)
        assert os.environ["LOCAL_RANK"] == str(ranks.rank)
        alone = HFLM(**how)
        for kind in KINDS:
            assert found[kind] == getattr(alone, kind)(requests(kind), disable_tqdm=True), kind
        if ranks.first:
            path.write_text(json.dumps(done))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
