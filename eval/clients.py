"""What programs that people deploy make of checkpoints: the same logits as transformers 5, and the same tokens, or not.

    python eval/clients.py --model smollm2=/tmp/smollm2 --model smol-25=/tmp/smol-25 --work /tmp/clients
    python eval/clients.py --tiny /tmp/clients/tiny --families llama gpt2 --only mlx-lm --work /tmp/clients

Each client has an environment of its own in the work directory, made with pip. Rows (one of a model and a client) are
kept beside it, and are run again only where the model, the client's program or what it needs has changed, or their file
is gone. The first model is the one with whose decoding speed that of the others is compared; of tiny ones, the dense
one. `--print` just prints the table of the rows that are there.

A client passes if its float32 logits are within 1e-3 of those of transformers 5 in a process that cannot import slimlm,
24 greedy tokens are equal, and its tokenizer gives the same tokens. The environments take 12 GB.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from client.running import PROGRAMS, Client, Model, error_in, judged, stamp_of
from client.table import table
from client.tiny import FAMILIES, name_of

CONVERTERS = ("transformers-4", "transformers-5")
CLIENTS = {
    "transformers 4": Client("use_transformers.py", "transformers-4"),
    "transformers 5": Client("use_transformers.py", "transformers-5"),
    "ctranslate2": Client("use_ctranslate2.py", "ctranslate2"),
    "mlx-lm": Client("use_mlx.py", "mlx"),
    "llama.cpp": Client("use_llama_cpp.py", "llama.cpp", others=CONVERTERS, keeps=True),
    "gguf": Client("use_gguf.py", "llama.cpp", seconds=1800, others=CONVERTERS, keeps=True),
    "peft": Client("use_peft.py", "peft"),
    "torchao": Client("use_torchao.py", "peft"),
    "onnxruntime-genai": Client("use_onnx.py", "onnxruntime-genai", seconds=900),
    "vllm": Client("use_vllm.py", "vllm", seconds=900),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="NAME=DIR", action="append", default=[], help="a checkpoint, or several")
    parser.add_argument(
        "--tiny", type=Path, help="folder of tiny models, dense and sliced, made where they are not there"
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES, help="of tiny models")
    parser.add_argument("--text", type=Path, default=Path("../shared/data/docs_test.txt"), help="to judge quantised by")
    parser.add_argument("--work", type=Path, default=Path("/tmp/slimlm-clients"))
    parser.add_argument("--only", choices=CLIENTS, action="append", help="clients to run; all by default")
    parser.add_argument("--print", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    rows = arguments.work / "rows"
    rows.mkdir(parents=True, exist_ok=True)
    models = [] if arguments.print else models_of(arguments)
    for name in arguments.only or CLIENTS:
        for model in models:
            kept, stamp = rows / f"{model.name}--{name}.json", stamp_of(CLIENTS[name], model)
            if kept.exists() and json.loads(kept.read_text())["stamp"] == stamp:
                continue
            row = {
                "model": model.name,
                "client": name,
                **judged(CLIENTS[name], model, arguments.work, arguments.text),
                "stamp": stamp,
            }
            kept.write_text(json.dumps(row, indent=2) + "\n")
            print(f"{model.name}, {name}: {row.get('error') or row['passes']}, {row['seconds']} s", flush=True)
    print(table([json.loads(path.read_text()) for path in sorted(rows.glob("*.json"))], list(CLIENTS)))


def models_of(arguments: argparse.Namespace) -> list[Model]:
    """Those named, and the tiny ones, which a process of their own makes."""
    named = [model.partition("=") for model in arguments.model]
    first = named[0][0] if named else None
    models = [Model(name, Path(path), None if name == first else first) for name, _, path in named]
    for family in arguments.families if arguments.tiny else []:
        command = [sys.executable, str(PROGRAMS / "tiny.py"), family, str(arguments.tiny), str(arguments.text)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{family}: {error_in(done.stderr)}", flush=True)
        dense, sliced = (name_of(family, part) for part in ("", "-25"))
        for name, other in ((dense, None), (sliced, f"t-{dense}")):
            if (arguments.tiny / name / "config.json").exists():
                models.append(Model(f"t-{name}", arguments.tiny / name, other))
    return models


if __name__ == "__main__":
    main()
