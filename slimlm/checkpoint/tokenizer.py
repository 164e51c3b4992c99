"""That a result's tokenizer is the model's, in transformers 5 and in 4.

Its files are copied; but which class they make can depend on `model_type`, which a result may have another of, and
classes of transformers 5 are not known to 4.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerBase

from slimlm.checkpoint.code import copy_code
from slimlm.checkpoint.companions import copy_companions
from slimlm.checkpoint.config_file import read_settings
from slimlm.checkpoint.disk import disk_errors, write_whole
from slimlm.checkpoint.kinds import CONFIG_NAME
from slimlm.checkpoint.skeleton import load_tokenizer
from slimlm.errors import UserError

TOKENIZER_CONFIG = "tokenizer_config.json"
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


def check_tokenizer(
    source: Path, tokenizer: PreTrainedTokenizerBase, model_type: str, trust_remote_code: bool = False
) -> None:
    """Raises UserError when a result of this `model_type` would not have the model's tokenizer."""
    with TemporaryDirectory(prefix="slimlm-tokenizer-") as place:
        target = Path(place)
        copy_companions(source, target)
        copy_code(source, target)
        settings = read_settings(source / CONFIG_NAME) | {"model_type": model_type}
        (target / CONFIG_NAME).write_text(json.dumps(settings), encoding="utf-8")
        keep_tokenizer(tokenizer, target, trust_remote_code)


def keep_tokenizer(tokenizer: PreTrainedTokenizerBase, target: Path, trust_remote_code: bool = False) -> None:
    """Make the tokenizer of a result, config and companions in place, that of the model; of a class that transformers 4
    has, too.

    Raises UserError when transformers loads another one nevertheless.
    """
    _name_older_class(tokenizer, target)
    if differs(tokenizer, target, trust_remote_code) is None:
        return
    if hasattr(tokenizer, "backend_tokenizer"):
        with disk_errors(target):
            tokenizer.save_pretrained(target)
        settings = read_settings(target / TOKENIZER_CONFIG) | {"tokenizer_class": "TokenizersBackend"}
        write_whole(target / TOKENIZER_CONFIG, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        _name_older_class(tokenizer, target)
    if (sample := differs(tokenizer, target, trust_remote_code)) is not None:
        raise UserError(
            f"the result's tokenizer would not be the model's: {type(tokenizer).__name__} splits {sample[:20]!r} in "
            "another way; save the model with a tokenizer.json first"
        )


def _name_older_class(tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Write what transformers 4 calls the tokenizer's class and its special tokens, which 5 reads as well.

    A tokenizer of that class gives token types there, too, which no causal model takes, unless it is told what to give.
    """
    settings = read_settings(target / TOKENIZER_CONFIG)
    changed = dict(settings)
    name = settings.get("tokenizer_class") or type(tokenizer).__name__
    if name in OLDER_CLASSES:
        changed |= {"tokenizer_class": OLDER_CLASSES[name], "model_input_names": list(tokenizer.model_input_names)}
    if isinstance(settings.get("extra_special_tokens"), list):
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    if changed != settings:
        write_whole(target / TOKENIZER_CONFIG, json.dumps(changed, indent=2, ensure_ascii=False) + "\n")


def differs(tokenizer: PreTrainedTokenizerBase, target: Path, trust_remote_code: bool) -> str | None:
    """The first text that the tokenizer in a directory does not treat like `tokenizer`; None when there is none."""
    try:
        other = load_tokenizer(target, trust_remote_code)
    except UserError:  # without a file that says more than vocabulary and merges, the class decides
        return SAMPLES[0]
    special = " ".join(map(str, tokenizer.all_special_tokens))
    for text in (*SAMPLES, special):
        ids = tokenizer(text, verbose=False).input_ids
        if other(text, verbose=False).input_ids != ids or other.decode(ids) != tokenizer.decode(ids):
            return text
    if tokenizer.special_tokens_map != other.special_tokens_map:
        return special
    return None if tokenizer.chat_template == other.chat_template else "a chat"
