"""2 of every 4 weights set to zero, in a model that is in memory already; the one given stays as it is.

python examples/prune.py [MODEL]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import slimlm
from slimlm.checkpoint.resolve import BUNDLED

TEXTS = ["The old house stood at the end of the lane, and nobody had lived there for years."] * 200


def main(model: str = str(BUNDLED["llama"]), **settings: int | bool) -> None:
    dense, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    small = slimlm.compress(dense, tokenizer, method="slimlm", pattern="2:4", dataset=TEXTS, **settings)
    layer = next(module for module in small.modules() if type(module).__name__.endswith("DecoderLayer"))
    weight = layer.mlp.down_proj.weight
    print(f"{(weight == 0).float().mean():.2f} of {list(weight.shape)} are zero; the model is a {type(small).__name__}")


if __name__ == "__main__":
    main(*sys.argv[1:])
