"""Does slicing keep massive activations? A copy of a model that has them is sliced beside one that has not.

    python eval/massive.py --model ../shared/models/llama-6m --calibration ../shared/data/calibration.txt \
        --texts ../shared/data/books_test.txt ../shared/data/docs_test.txt

Both copies of a Llama have more directions in their residual stream. In the planted one the first token, which is the
same in all windows, lies in two of these, with `--factor` times its norm, so that after every norm hardly anything else
is left of it (Sun et al., arXiv 2402.17762). Readers have what the token had said before as their weight on these
directions: the function is the same in fp32, and the attention sink now rests on the planted directions alone.
"""

import argparse
from pathlib import Path

import numpy
import torch
from slicing import CLOSED, log_perplexities, mean, measured, measured_dense, parser_of, perplexities
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from slimlm.calibration import load_windows

MORE = 4  # directions, so that the number of heads still divides hidden_size


def main() -> None:
    parser = parser_of(__doc__, Path("/tmp/slimlm-massive"), [0])
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--factor", type=float, default=1000.0)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    source, tokenizer = arguments.model, AutoTokenizer.from_pretrained(arguments.model)
    windows = load_windows(arguments.calibration, tokenizer, arguments.windows, arguments.window, 0).tokens
    numpy.save(arguments.work / "calibration.npy", starting_alike(windows).numpy())
    arguments.calibration, arguments.windows = str(arguments.work / "calibration.npy"), len(starting_alike(windows))
    for name, factor in (("plain", 0.0), ("planted", arguments.factor)):
        planted(source, factor).save_pretrained(arguments.work / name)
        AutoTokenizer.from_pretrained(source).save_pretrained(arguments.work / name)
    print(
        "| model | dense | sliced | rise of log-perplexity | massive directions kept |\n| --- | --- | --- | --- | --- |"
    )
    for name in ("plain", "planted"):
        report(arguments, name)


def starting_alike(windows: Tensor) -> Tensor:
    """Windows without token 0 [windows, time], each begun with it."""
    windows = windows[(windows != 0).all(1)].clone()
    windows[:, 0] = 0
    return windows


def report(arguments: argparse.Namespace, name: str) -> None:
    arguments.model = str(arguments.work / name)
    texts = [starting_alike(text) for text in measured_dense(arguments)[0]]
    dense = log_perplexities(Path(arguments.model), texts)
    settings = {"sparsity": arguments.sparsity, "dtype": "float32", **CLOSED}
    found = [measured(arguments, arguments.work / "out", settings, seed, texts, dense) for seed in arguments.seeds]
    values = [mean([row["perplexities"][text] for _, row in found]) for text in range(len(texts))]
    kept = found[0][0]["method"]["massive_activations"]["directions"]
    before = " / ".join(f"{value:.2f}" for value in perplexities(dense))
    after = " / ".join(f"{value:.2f}" for value in values)
    print(f"| {name} | {before} | {after} | {mean([row['loss'] for _, row in found]):.4f} | {kept} |", flush=True)


@torch.no_grad()
def planted(source: str, factor: float) -> LlamaForCausalLM:
    """The model in fp32 with MORE directions, and where factor > 0 with the first token lying in two of them."""
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    config = dense.config
    hidden = config.hidden_size
    config.head_dim = config.head_dim or hidden // config.num_attention_heads
    config.hidden_size, config.tie_word_embeddings = hidden + MORE, False
    config.rms_norm_eps *= hidden / (hidden + MORE)
    model = LlamaForCausalLM(config).eval()
    scale = (hidden / (hidden + MORE)) ** 0.5  # the norms' mean runs over more components
    state = dense.state_dict()
    for name, parameter in model.named_parameters():
        old, new = state[name], torch.zeros_like(parameter)
        new[tuple(slice(0, size) for size in old.shape)] = old * scale if "norm" in name else old
        if "norm" in name:
            new[hidden:] = 1
        parameter.copy_(new)
    if factor:
        plant(model, hidden, factor)
    return model


def plant(model: LlamaForCausalLM, hidden: int, factor: float) -> None:
    """Put the first token where nothing else is, and make the readers answer it as before."""
    token = torch.tensor([[model.config.bos_token_id]])
    spots = [hidden, hidden + 1]
    norms = {}
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        norms[f"{index}a"] = layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)
        norms[f"{index}m"] = layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)
    norms["head"] = model.model.norm, (model.lm_head,)
    seen: dict[str, Tensor] = {}
    handles = [
        norm.register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, (args[0], out)))
        for name, (norm, _) in norms.items()
    ]
    model(token)
    for handle in handles:
        handle.remove()
    length = factor * float(seen["0a"][0].norm())
    model.model.embed_tokens.weight[token[0, 0], spots] = length / 2**0.5
    for name, (norm, readers) in norms.items():
        stream, before = (tensor[0, 0] for tensor in seen[name])
        stream = stream.clone()
        stream[spots] = length / 2**0.5
        after = norm(stream)
        for reader in readers:
            lacking = reader.weight @ (before - after)
            reader.weight[:, spots] += (lacking / after[spots].sum())[:, None]


if __name__ == "__main__":
    main()
