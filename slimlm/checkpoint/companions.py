"""What belongs to a model besides its config and weights: tokenizer, chat templates, generation settings, licences.

All of it is fetched with a model and travels with what is made of it, byte for byte, whatever it is called: what is
left behind is what is known to be something else. Code is another matter (`checkpoint/code.py`).
"""

import shutil
from fnmatch import fnmatch
from pathlib import Path

from slimlm.checkpoint.disk import disk_errors
from slimlm.checkpoint.kinds import CONFIG_NAME

CODE = "*.py"
FOREIGN = (
    # weights, in any format, and what belongs to them
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.onnx", "*.onnx_data", "*.msgpack"),
    *("*.h5", "*.ot", "*.npz", "*.npy", "*.tflite", "*.mlmodel", "params.json"),
    *("*.pte", "*.distcp", "*.bak", "*.orig", "*.tmp", "*.lock"),
    # what training, and whoever works here, left
    *("trainer_state.json", "training_args.*", "optimizer*", "scheduler*", "rng_state*", "events.out*", "*.log"),
    *("all_results.json", "train_results.json", "eval_results.json", "*.out", "*.env", "core.*", "*.pkl", "*.pickle"),
    *("*.sh", "*.db", "*.sqlite*", "wandb*", "*.lnk", "*~"),
    # data, pictures and archives
    *("*.jsonl", "*.parquet", "*.arrow", "*.csv", "*.tsv", "*.xml", "*.html", "*.zip", "*.tar", "*.gz", "*.ipynb"),
    *("*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.svg", "*.pdf", "*.mp4", "*.mp3", "*.wav"),
    *("requirements*.txt", ".*"),
)
# Read of a model, and a result has its own.
OWN = (CONFIG_NAME, "*.index.json", "README*", "slimlm.json", "slimlm.log.jsonl", "recipe.yaml", "adapter_config.json")
LICENCES = ("license*", "licence*", "notice*", "use_policy*", "copying*")
LARGEST = 1 << 28  # bytes: the largest tokenizers have some tens of MB
TEMPLATES = "additional_chat_templates"


def companions(source: Path) -> list[Path]:
    """The files that travel with a checkpoint's weights: licences whatever their form, and nothing too large to be what
    is meant."""
    files = [file for file in sorted(source.iterdir()) if file.is_file() and _travels(file.name)]
    return [file for file in files if file.stat().st_size <= LARGEST]


def _travels(name: str) -> bool:
    if any(fnmatch(name.lower(), pattern) for pattern in LICENCES):
        return True
    return not any(fnmatch(name.lower(), pattern.lower()) for pattern in (*FOREIGN, *OWN, CODE))


def copy_companions(source: Path, target: Path) -> None:
    """Copy what travels. Raises RunFailure when the disk is full."""
    with disk_errors(target):
        for file in companions(source):
            shutil.copyfile(file, target / file.name)
        if (source / TEMPLATES).is_dir():
            shutil.copytree(source / TEMPLATES, target / TEMPLATES, dirs_exist_ok=True)
