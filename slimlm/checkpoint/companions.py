"""What a checkpoint consists of besides config and weights: tokenizer, chat templates, generation settings, licences.

All of it travels with a result, byte for byte, whatever it is called: what is left behind is what is known to be
something else. Where the result's tokenizer would not be the dense model's (its class may depend on the model's), it
is written anew from the one that is loaded.
"""

import json
import logging
import shutil
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slimlm.checkpoint.config_file import CONFIG_NAME, read_settings
from slimlm.checkpoint.disk import disk_errors, write_whole
from slimlm.checkpoint.skeleton import load_tokenizer
from slimlm.errors import UserError

logger = logging.getLogger(__name__)
TOKENIZER_CONFIG = "tokenizer_config.json"
CODE = "*.py"
LEFT_BEHIND = (
    # weights, in any format, and what belongs to them
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.onnx", "*.onnx_data", "*.msgpack"),
    *("*.h5", "*.ot", "*.npz", "*.npy", "*.tflite", "*.mlmodel", "*.index.json", "params.json"),
    # what training left
    *("trainer_state.json", "training_args.*", "optimizer*", "scheduler*", "rng_state*", "events.out*", "*.log"),
    *("all_results.json", "train_results.json", "eval_results.json", "adapter_config.json"),
    # what this result has of its own
    *(CONFIG_NAME, "README*", "slimlm.json", "slimlm.log.jsonl", "recipe.yaml"),
    # data, pictures and archives
    *("*.parquet", "*.arrow", "*.csv", "*.zip", "*.tar", "*.gz", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp"),
    *("*.svg", "*.pdf", "*.mp4", "*.mp3", "*.wav", "*.ipynb", ".*"),
)
TEMPLATES = "additional_chat_templates"
# Names of classes that transformers 4 does not have, and what it calls the same.
OLDER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
SAMPLES = (
    "The old house stood at the end of the lane, and nobody had lived there since 1987.",
    "  two spaces,\ttab,\n\n\nnewlines \r\n and trailing  ",
    "def f(x):\n    return x+1  # 100%, 3.14e-10, 1234567890",
    "naïve café, Straße, Ελληνικά, русский, עברית, हिन्दी, 中文字符, 日本語, 한국어",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 and é decomposed; ﬁ ligature; \u200bzero width",
    "don't I'll WE'VE They'd; <b>tags</b> <|endoftext|><s></s>[INST]<|im_start|>user\n",
    "https://example.org/a?b=c&d=%20 {\"json\": [1, 2.0, null]} \\frac{1}{2} $x^2$",
)  # fmt: skip


def companions(source: Path) -> list[Path]:
    """The files that travel with a checkpoint's weights. Code is among them where the tokenizer is made of it."""
    files = [file for file in sorted(source.iterdir()) if file.is_file() and _travels(file.name)]
    return [file for file in files if not fnmatch(file.name, CODE) or _has_code(source)]


def _travels(name: str) -> bool:
    return not any(fnmatch(name.lower(), pattern.lower()) for pattern in LEFT_BEHIND)


def _has_code(source: Path) -> bool:
    return "auto_map" in read_settings(source / TOKENIZER_CONFIG)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what travels. Raises RunFailure when the disk is full."""
    with disk_errors(target):
        for file in companions(source):
            shutil.copyfile(file, target / file.name)
        if (source / TEMPLATES).is_dir():
            shutil.copytree(source / TEMPLATES, target / TEMPLATES, dirs_exist_ok=True)


def check_tokenizer(source: Path, tokenizer: Any, model_type: str, trust_remote_code: bool = False) -> None:
    """Raises UserError when a result of this `model_type` would not have the model's tokenizer."""
    with TemporaryDirectory(prefix="slimlm-tokenizer-") as place:
        target = Path(place)
        copy_companions(source, target)
        settings = read_settings(source / CONFIG_NAME) | {"model_type": model_type}
        (target / CONFIG_NAME).write_text(json.dumps(settings), encoding="utf-8")
        keep_tokenizer(tokenizer, target, trust_remote_code)


def keep_tokenizer(tokenizer: Any, target: Path, trust_remote_code: bool = False) -> None:
    """Make the tokenizer of a result, config and companions in place, that of the model; of a class that transformers 4
    has, too.

    Raises UserError when transformers loads another one nevertheless.
    """
    _name_older_class(target)
    if differs(tokenizer, target, trust_remote_code) is None:
        return
    if hasattr(tokenizer, "backend_tokenizer"):
        with disk_errors(target):
            tokenizer.save_pretrained(target)
        settings = read_settings(target / TOKENIZER_CONFIG) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        write_whole(target / TOKENIZER_CONFIG, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        _name_older_class(target)
    if (sample := differs(tokenizer, target, trust_remote_code)) is not None:
        raise UserError(
            f"the result's tokenizer would not be the model's: {type(tokenizer).__name__} splits {sample[:20]!r} in "
            "another way; save the model with a tokenizer.json first"
        )


def _name_older_class(target: Path) -> None:
    """Write what transformers 4 calls the tokenizer's class and its special tokens, which 5 reads as well."""
    settings = read_settings(target / TOKENIZER_CONFIG)
    changed = dict(settings)
    if (name := settings.get("tokenizer_class")) in OLDER_CLASSES:
        changed["tokenizer_class"] = OLDER_CLASSES[name]
    if isinstance(settings.get("extra_special_tokens"), list):
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    if changed != settings:
        write_whole(target / TOKENIZER_CONFIG, json.dumps(changed, indent=2, ensure_ascii=False) + "\n")


def differs(tokenizer: Any, target: Path, trust_remote_code: bool = False) -> str | None:
    """The first text that the tokenizer in a directory does not treat like `tokenizer`; None when there is none."""
    other = load_tokenizer(target, trust_remote_code)
    special = " ".join(map(str, tokenizer.all_special_tokens))
    for text in (*SAMPLES, special):
        ids = tokenizer(text, verbose=False).input_ids
        if other(text, verbose=False).input_ids != ids or other.decode(ids) != tokenizer.decode(ids):
            return text
    if tokenizer.special_tokens_map != other.special_tokens_map:
        return special
    return None if tokenizer.chat_template == other.chat_template else "a chat"
