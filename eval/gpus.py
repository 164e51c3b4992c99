"""How many GPUs a model needs before and after slicing, told from its config alone.

    python eval/gpus.py
    python eval/gpus.py --config DIR --sparsities 0.2 0.25 0.3 --tokens 4096 --batch 1

Without --config, of Llama-2-70B. Nothing is loaded: weights are shapes, in bf16. What has to fit is all weights, and
keys and values of --batch sequences of --tokens tokens; of a GPU's memory nine tenths count. Of all splits that slicing
may choose for a sparsity, and that keep all blocks and key/value groups, the table gives the range. Work is
floating-point operations per token: two for every weight that is multiplied with, the embedding not among them, and
attention over --tokens.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from slimlm.checkpoint.kinds import INDEX_NAME
from slimlm.checkpoint.reader import Checkpoint
from slimlm.checkpoint.shard import TensorSpec
from slimlm.checkpoint.skeleton import build_skeleton
from slimlm.model.streamed import StreamedModel
from slimlm.recipe import SliceStep
from slimlm.slice.candidates import candidates
from slimlm.slice.shapes import Shapes
from slimlm.slice.widths import Layout, Widths

GPUS = (24, 40, 80)  # GB
USABLE = 0.9
BYTES = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="directory with a config.json")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.2, 0.25, 0.3])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    config = AutoConfig.from_pretrained(arguments.config) if arguments.config else llama_2_70b()
    with tempfile.TemporaryDirectory() as place:
        shapes = Shapes(Layout(opened(config, Path(place))))
        heads = " | ".join(f"GPUs of {size} GB" for size in GPUS)
        print(f"| sparsity | splits | weights, GB | with keys and values, GB | {heads} | work |")
        print("| ---: | ---: | ---: | ---: " + "| ---: " * (len(GPUS) + 1) + "|")
        print(row("dense", shapes, [shapes.dense], arguments))
        for sparsity in arguments.sparsities:
            step = SliceStep(model=place, sparsity=sparsity)
            print(row(f"{sparsity:g}", shapes, inside(shapes.dense, candidates(shapes, step)), arguments))


def inside(dense: Widths, splits: Sequence[Widths]) -> list[Widths]:
    """Those that keep all blocks and key/value groups: other ones hold no more, and there are many thousands."""
    return [split for split in splits if (split.blocks, split.groups) == (dense.blocks, dense.groups)]


def llama_2_70b() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=4096, rms_norm_eps=1e-5, dtype=torch.bfloat16,
    )  # fmt: skip


def opened(config: PretrainedConfig, place: Path) -> StreamedModel:
    """A model without weights: its files have their size, and hold nothing."""
    config.save_pretrained(place)
    skeleton = build_skeleton(config)
    specs = {name: TensorSpec(tuple(tensor.shape), torch.bfloat16) for name, tensor in skeleton.state_dict().items()}
    hollow(place, specs)
    return StreamedModel(Checkpoint(place), config, torch.device("cpu"), torch.bfloat16)


def hollow(place: Path, specs: dict[str, TensorSpec]) -> None:
    """A shard for each tensor, with its header and nothing behind it on the disk."""
    files = {name: f"{number}.safetensors" for number, name in enumerate(specs)}
    for name, file in files.items():
        header = {name: {"dtype": "BF16", "shape": specs[name].shape, "data_offsets": [0, specs[name].nbytes]}}
        text = json.dumps(header).encode()
        with (place / file).open("wb") as shard:
            shard.write(len(text).to_bytes(8, "little") + text)
            shard.truncate(8 + len(text) + specs[name].nbytes)
    (place / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def row(label: str, shapes: Shapes, splits: Sequence[Widths], arguments: argparse.Namespace) -> str:
    weights = [BYTES * shapes.parameters(split) / 1e9 for split in splits]
    whole = [size + cached(shapes, split, arguments) for size, split in zip(weights, splits, strict=True)]
    work = [
        operations(shapes, split, arguments.tokens) / operations(shapes, shapes.dense, arguments.tokens)
        for split in splits
    ]
    gpus = [span([math.ceil(size / (USABLE * memory)) for size in whole], "{:.0f}") for memory in GPUS]
    cells = [label, str(len(splits)), span(weights, "{:.1f}"), span(whole, "{:.1f}"), *gpus, span(work, "{:.0%}")]
    return f"| {' | '.join(cells)} |"


def span(values: Sequence[float], form: str) -> str:
    ends = dict.fromkeys(form.format(end) for end in (min(values), max(values)))
    return " to ".join(ends)


def cached(shapes: Shapes, split: Widths, arguments: argparse.Namespace) -> float:
    """GB of keys and values."""
    config = shapes.model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = config.num_key_value_heads * split.groups // max(1, shapes.dense.groups)
    return 2 * BYTES * len(split.blocks) * groups * width * arguments.tokens * arguments.batch / 1e9


def operations(shapes: Shapes, split: Widths, tokens: int) -> float:
    """Of a token that is the last of so many."""
    config, sizes = shapes.model.config, shapes.of(split)
    embedding = shapes.model.family.embeddings[0]
    products = sum(math.prod(size) for name, size in sizes.items() if len(size) > 1 and not name.startswith(embedding))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads * split.groups // max(1, shapes.dense.groups)
    return 2 * products + 4 * len(split.blocks) * heads * width * tokens


if __name__ == "__main__":
    main()
