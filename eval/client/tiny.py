"""A tiny random model of a family, and the same sliced by 25%, both with the bundled model's tokenizer.

    python eval/client/tiny.py FAMILY FOLDER TEXT

Written to FOLDER/FAMILY and FOLDER/FAMILY-25, each unless it is there. The rotary base is not the one that programs
take where they find none.
"""

import json
import subprocess
import sys
from pathlib import Path

FAMILIES = (
    "llama", "qwen2", "qwen2 tied", "qwen3", "phi3", "gemma2", "mistral", "mixtral", "granite",
    "gpt_neox", "gpt2", "opt",
)  # fmt: skip
ROTARY_BASE = 300_000.0
SIZES = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "moe_intermediate_size": 96,
    "max_position_embeddings": 256,
    "n_embd": 128,
    "n_positions": 256,
    "ffn_dim": 256,
    "word_embed_proj_dim": 128,
    "sliding_window": 64,
}
CALIBRATION = ("--num-calibration-samples=32", "--max-seq-length=64", "--no-measure")


def main() -> None:
    family, folder, text = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    dense, sliced = (folder / name_of(family, part) for part in ("", "-25"))
    if not (dense / "config.json").exists():
        build(family, dense)
    if not (sliced / "config.json").exists():
        command = [sys.executable, "-m", "slimlm", "compress", f"--model={dense}", f"--dataset={text}", *CALIBRATION]
        subprocess.run([*command, "--sparsity=0.25", f"--output-dir={sliced}"], check=True)


def name_of(family: str, part: str) -> str:
    return family.replace(" ", "-") + part


def build(family: str, out: Path) -> None:
    """With the settings that the tests use, but larger, and read by transformers 4 as published models are."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from transformers import CONFIG_MAPPING

    from slimlm.checkpoint.config_file import write_config
    from slimlm.checkpoint.skeleton import load_config, load_tokenizer
    from slimlm.checkpoint.tokenizer import keep_tokenizer
    from tests.conftest import build_tiny
    from tests.families.configs import GROUPED, SETTINGS

    kind, _, tied = family.partition(" ")
    settings = {**SETTINGS.get(kind, GROUPED), **({"tie_word_embeddings": True} if tied else {})}
    settings |= {name: size for name, size in SIZES.items() if name in settings}
    if kind == "gemma2":
        settings["query_pre_attn_scalar"] = SIZES["head_dim"]  # llama.cpp's scale, whatever the file says
    config = CONFIG_MAPPING[kind](**settings)
    if getattr(config, "rope_parameters", None):
        config.rope_parameters["rope_theta"] = ROTARY_BASE
    build_tiny(config, out)
    file = out / "tokenizer_config.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps({**facts, "unk_token": facts["eos_token"]}, indent=2))  # CTranslate2 wants one
    write_config(load_config(out), out, out)
    keep_tokenizer(load_tokenizer(out), out)


if __name__ == "__main__":
    main()
