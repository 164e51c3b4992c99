"""Compress mutated checkpoints: each must give one clear error or a correct run.

    python eval/fuzz.py --cases 500 --seed 0

Correct means that stock transformers loads the mutated checkpoint too, and agrees with us on its perplexity. Prints a
count per mutation and outcome, and every violation: an exception not slimlm's own, a case that hangs, a disagreement.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging as transformers_logging

from slimlm.checkpoint.resolve import BUNDLED
from slimlm.checkpoint.skeleton import load_tokenizer
from slimlm.errors import SlimlmError
from slimlm.evaluation.perplexity import counted
from slimlm.evaluation.text import load_test_windows
from slimlm.evaluation.tokens import measure_tokens
from slimlm.recipe import one_step
from slimlm.stages import compress

SECONDS = 60
SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
Mutation = Callable[[Path, random.Random], None]


def truncate(path: Path, chance: random.Random) -> None:
    file = path / SHARD
    content = file.read_bytes()
    file.write_bytes(content[: chance.randrange(len(content))])


def flip_header_bit(path: Path, chance: random.Random) -> None:
    file = path / SHARD
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    content[chance.randrange(8 + length)] ^= 1 << chance.randrange(8)
    file.write_bytes(bytes(content))


def flip_data_bit(path: Path, chance: random.Random) -> None:
    file = path / SHARD
    content = bytearray(file.read_bytes())
    content[-chance.randrange(1, 10_000)] ^= 1 << chance.randrange(8)
    file.write_bytes(bytes(content))


def with_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / SHARD)
    change(tensors)
    save_file(tensors, path / SHARD, {"format": "pt"})


def wrong_shape(path: Path, chance: random.Random) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = chance.choice(sorted(tensors))
        shape = list(tensors[name].shape)
        shape[chance.randrange(len(shape))] += chance.choice([-1, 1, 7])
        tensors[name] = torch.zeros([max(size, 0) for size in shape], dtype=torch.bfloat16)

    with_tensors(path, change)


def transposed(path: Path, chance: random.Random) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = chance.choice(sorted(name for name in tensors if tensors[name].ndim == 2))
        tensors[name] = tensors[name].T.contiguous()

    with_tensors(path, change)


def missing_tensor(path: Path, chance: random.Random) -> None:
    name = chance.choice(sorted(load_file(path / SHARD)))
    with_tensors(path, lambda tensors: tensors.pop(name))
    if chance.random() < 0.5:
        edit(path / INDEX, lambda index: index["weight_map"].pop(name))


def extra_tensor(path: Path, chance: random.Random) -> None:
    name = chance.choice(["model.layers.9.mlp.up_proj.weight", "extra", "model.rotary_emb.inv_freq", "lm_head.bias"])
    with_tensors(path, lambda tensors: tensors.update({name: torch.ones(3)}))
    edit(path / INDEX, lambda index: index["weight_map"].update({name: SHARD}))


def not_finite(path: Path, chance: random.Random) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        flat = tensors[chance.choice(sorted(tensors))].reshape(-1)
        flat[chance.randrange(flat.numel())] = chance.choice([math.nan, math.inf, -math.inf])

    with_tensors(path, change)


def huge_values(path: Path, chance: random.Random) -> None:
    with_tensors(path, lambda tensors: tensors[chance.choice(sorted(tensors))].mul_(10.0 ** chance.randrange(5, 38)))


def other_dtype(path: Path, chance: random.Random) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = chance.choice(sorted(tensors))
        dtypes = [torch.float32, torch.float16, torch.float64, torch.int8, torch.int64, torch.bool, torch.float8_e5m2]
        tensors[name] = tensors[name].to(chance.choice(dtypes))

    with_tensors(path, change)


def edit(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def hostile_index(path: Path, chance: random.Random) -> None:
    target = chance.choice(
        ["/etc/passwd", "../../../etc/passwd", "a/../b", "..", ".", "", "\0", "x" * 5000, "/dev/zero", None, 7, ["a"]]
    )
    edit(path / INDEX, lambda index: index["weight_map"].update({chance.choice(sorted(index["weight_map"])): target}))


def garbage_json(path: Path, chance: random.Random) -> None:
    text = chance.choice(["", "{", "[]", "null", "{}", "7", '"x"', "\x00\xff", "{" * 10_000, '{"weight_map": []}'])
    (path / chance.choice([INDEX, "config.json"])).write_text(text)


def absurd_config(path: Path, chance: random.Random) -> None:
    fields = [
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "vocab_size", "rms_norm_eps", "max_position_embeddings", "model_type", "rope_parameters",
        "hidden_act", "dtype", "tie_word_embeddings", "bos_token_id", "attention_bias", "initializer_range",
    ]  # fmt: skip
    values = [-1, 0, 1, 3, 10**6, 10**12, 2**63, 1.5, "x", "", None, True, [], {}, math.nan, 1e400, "float64"]
    edit(path / "config.json", lambda config: config.update({chance.choice(fields): chance.choice(values)}))


def strange_file(path: Path, chance: random.Random) -> None:
    file = path / chance.choice([SHARD, INDEX, "config.json", "tokenizer.json"])
    file.unlink()
    kind = chance.randrange(4)
    if kind == 0:
        file.mkdir()
    elif kind == 1:
        file.symlink_to(file)
    elif kind == 2:
        file.write_bytes(b"")


def wrong_header_length(path: Path, chance: random.Random) -> None:
    content = bytearray((path / SHARD).read_bytes())
    content[:8] = chance.choice([0, 1, 7, 2**32, 2**63, 2**64 - 1, len(content)]).to_bytes(8, "little")
    (path / SHARD).write_bytes(bytes(content))


MUTATIONS: list[Mutation] = [
    truncate, flip_header_bit, flip_data_bit, wrong_shape, transposed, missing_tensor, extra_tensor, not_finite,
    huge_values, other_dtype, hostile_index, garbage_json, absurd_config, strange_file, wrong_header_length,
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("hangs")))
    outcomes: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        build(place / "original")
        for case in range(arguments.cases):
            mutation = MUTATIONS[case % len(MUTATIONS)]
            outcome = one(place, mutation, random.Random(f"{arguments.seed}/{case}"))
            outcomes[mutation.__name__, outcome.partition(":")[0]] += 1
            if outcome.startswith("VIOLATION"):
                print(f"case {case} {mutation.__name__}: {outcome}", flush=True)
    print("| mutation | outcome | cases |\n| --- | --- | --- |")
    for (mutation_name, outcome), count in sorted(outcomes.items()):
        print(f"| {mutation_name} | {outcome} | {count} |")
    sys.exit(any(outcome == "VIOLATION" for _, outcome in outcomes))


def build(path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(path, max_shard_size="400KB")
    for file in BUNDLED["llama"].glob("tokenizer*"):
        shutil.copyfile(file, path / file.name)
    (path / "text.txt").write_text("The old house stood at the end of the lane, and nobody had lived there. " * 40)


def one(place: Path, mutation: Mutation, chance: random.Random) -> str:
    """What came of one mutated checkpoint."""
    path, output = place / "mutated", place / "out"
    for directory in (path, output, place / "out.partial"):
        shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(place / "original", path)
    mutation(path, chance)
    text = place / "original" / "text.txt"
    recipe = one_step(
        model=str(path), sparsity=0.25, dataset=str(text), num_calibration_samples=6, max_seq_length=32, eval_windows=4,
        eval_text=str(text), output_dir=str(output),
    )  # fmt: skip
    signal.alarm(SECONDS)
    try:
        measured = compress(recipe).manifest["measured"]
    except SlimlmError as error:
        clear = "\n" not in str(error) and not output.exists()
        return f"error {error.exit_code}" if clear else f"VIOLATION: unclear error {error}"
    except BaseException as error:
        return f"VIOLATION: {type(error).__name__} {error}"
    finally:
        signal.alarm(0)
    return agrees(path, text, measured["dense"]["perplexity"])


def agrees(path: Path, text: Path, perplexity: float) -> str:
    """Whether stock transformers loads the checkpoint whole and gives the same perplexity."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True)
    except Exception as error:
        return f"VIOLATION: transformers refuses what we took: {type(error).__name__} {error}"
    if report["missing_keys"] or report["mismatched_keys"]:
        return f"VIOLATION: transformers misses {report['missing_keys']}, {report['mismatched_keys']}"
    windows = load_test_windows(str(text), load_tokenizer(path), 4, 32).tokens
    theirs = counted(measure_tokens(model.eval(), None, windows, 8)[:, 0], model.dtype).perplexity
    return "correct run" if math.isclose(theirs, perplexity, rel_tol=1e-6) else f"VIOLATION: {perplexity} for {theirs}"


if __name__ == "__main__":
    main()
