"""Write a Llama checkpoint of any size with random weights, sharded, a tensor at a time.

    python eval/make_checkpoint.py /tmp/llama-4gb --layers 30

For measuring memory and speed; it says nothing about quality. The tokenizer is that of the bundled model.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig

from slimlm.checkpoint.resolve import BUNDLED
from slimlm.checkpoint.shard import TensorSpec
from slimlm.checkpoint.skeleton import build_skeleton
from slimlm.checkpoint.writer import CheckpointWriter

SHAPE = {"hidden": 2560, "mlp": 6912, "heads": 20, "kv-heads": 5, "vocab": 4096}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, default=30)
    add_shape(parser)
    parser.add_argument("--shard-bytes", type=int, default=10**9)
    arguments = parser.parse_args()
    config = LlamaConfig(
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.mlp,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        head_dim=arguments.hidden // arguments.heads,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
        dtype=torch.bfloat16,
    )
    write(config, arguments.output, arguments.shard_bytes)


def add_shape(parser: argparse.ArgumentParser) -> None:
    for name, size in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=size)


def make(output: Path, sizes: dict[str, int]) -> None:
    """Unless it is there: by this script, in a process of its own."""
    if not output.exists():
        flags = [f"--{name}={size}" for name, size in sizes.items()]
        subprocess.run([sys.executable, __file__, str(output), *flags], check=True, capture_output=True)


def write(config: LlamaConfig, output: Path, shard_bytes: int) -> None:
    """Random weights at a scale that keeps the residual stream finite through any number of blocks."""
    output.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(output)
    for file in BUNDLED["llama"].glob("tokenizer*"):
        shutil.copyfile(file, output / file.name)
    shapes = {name: tuple(tensor.shape) for name, tensor in build_skeleton(config).state_dict().items()}
    specs = {name: TensorSpec(shape, torch.bfloat16) for name, shape in shapes.items()}
    writer = CheckpointWriter(output, specs, shard_bytes)
    generator = torch.Generator().manual_seed(0)
    for name, spec in specs.items():
        tensor = torch.ones(spec.shape)
        if len(spec.shape) == 2:
            scale = 1.0 if "embed" in name else (spec.shape[1] * 2 * config.num_hidden_layers) ** -0.5
            tensor.normal_(std=scale, generator=generator)
        writer.write(name, tensor)
    writer.finish()
    size = sum(spec.nbytes for spec in specs.values())
    print(f"{output}: {size / 1e9:.2f} GB in {len(list(output.glob('*.safetensors')))} shards")


if __name__ == "__main__":
    main()
