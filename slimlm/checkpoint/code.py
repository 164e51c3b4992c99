"""Python code that comes with a checkpoint: whether it runs, and which files it is. Decided here and nowhere else.

transformers takes a class from a checkpoint's own files where `auto_map` in its config names one and it was told to
trust it; without that it takes its own class of the same `model_type`, where it has one, and asks on the terminal
where it has none.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.dynamic_module_utils import get_relative_import_files

import slimlm.modeling  # noqa: F401  # its classes are known to transformers from here on
from slimlm.checkpoint.kinds import CONFIG_NAME
from slimlm.errors import UserError
from slimlm.modeling import OWN_CLASSES
from slimlm.plain import Json

MODEL_CLASSES = ("AutoConfig", "AutoModelForCausalLM")
NAMING = (CONFIG_NAME, "tokenizer_config.json", "processor_config.json")  # files with an `auto_map`


def runs_own_code(path: Path, values: Mapping[str, Json], trust_remote_code: bool) -> bool:
    """Whether the model's classes are to be taken from the checkpoint itself. values: config.json as it is written.

    Raises UserError naming the flag when there are no others and it was not given, so that transformers never asks.
    """
    named = values.get("auto_map")
    if not isinstance(named, dict) or not any(name in named for name in MODEL_CLASSES):
        return False
    if not trust_remote_code and values.get("model_type") not in CONFIG_MAPPING:
        raise UserError(
            f"{path} is {values.get('model_type')!r}, a model defined by Python code of its own "
            f"({', '.join(file.name for file in code_files(path)) or 'in another repository'}): read that, "
            "then add --trust-remote-code to run it"
        )
    return trust_remote_code


def forget_own_code(config: PretrainedConfig) -> None:
    """Have a config that was read without its checkpoint's code not name that either: what is made of it is stock."""
    named = getattr(config, "auto_map", None)
    if not isinstance(named, dict) or type(config) in OWN_CLASSES:
        return
    left = {name: at for name, at in named.items() if name != "AutoConfig" and not name.startswith("AutoModel")}
    if left:
        config.auto_map = left
    else:
        del config.auto_map


def is_own_class(config: PretrainedConfig) -> bool:
    """Whether a config or its model comes from a checkpoint's own code, which is trusted then."""
    named = getattr(config, "auto_map", None)
    return isinstance(named, dict) and type(config) not in OWN_CLASSES and any(name in named for name in MODEL_CLASSES)


def copy_code(source: Path, result: Path) -> None:
    """Copy what of a checkpoint's code its result's config and tokenizer still name."""
    for file in code_files(source, result):
        if not (result / file.name).exists():  # a modelling file of ours, or one that saving the config put there
            shutil.copyfile(file, result / file.name)


def code_files(path: Path, naming: Path | None = None) -> list[Path]:
    """The code in a checkpoint directory that config and tokenizer there name in their `auto_map`, and what it imports
    from beside itself. Code in other repositories stays there.

    naming: another directory, whose config and tokenizer do the naming.
    """
    found: list[Path] = []
    for name in NAMING:
        for module in _modules((naming or path) / name):
            file = path / f"{module}.py"
            if file.is_file():
                found += [file, *(Path(beside) for beside in get_relative_import_files(file))]
    return sorted({file for file in found if file.is_file() and file.parent == path})


def _modules(file: Path) -> list[str]:
    """Modules beside a JSON file that its `auto_map` names: `module.Class`, for tokenizers two of them or none."""
    try:
        named = json.loads(file.read_text(encoding="utf-8"))["auto_map"].values()
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return []
    listed = [at for entry in named for at in (entry if isinstance(entry, list) else [entry])]
    modules = [at.partition(".")[0] for at in listed if isinstance(at, str) and "--" not in at]
    return [module for module in modules if module.isidentifier()]
