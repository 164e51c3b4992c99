"""What some cases gave when it was last recorded: logits, and the hash of every tensor with what decides it."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.golden.cases import STORED, Case
from tests.golden.run import carry_out, conditions, logits_of, tensors_of

LOGITS, HASHES = (Path(__file__).with_name(name) for name in ("logits.safetensors", "hashes.json"))


def found_of(case: Case, place: Path) -> tuple[torch.Tensor, dict[str, str]]:
    """Logits of a case's result, and the first half of the SHA-256 of each of its tensors."""
    output, _ = carry_out(case, place)
    tensors = tensors_of(output)
    hashes = {
        name: hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()[:32]
        for name, tensor in tensors.items()
    }
    return logits_of(output), hashes


def stored() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Logits by case; and the recorded `conditions`, with hashes by case and tensor in `cases`."""
    return load_file(LOGITS), json.loads(HASHES.read_text())


def record() -> None:
    """Renew what is stored."""
    with tempfile.TemporaryDirectory() as place:
        found = {case.name: found_of(case, Path(place)) for case in STORED}
    save_file({name: logits for name, (logits, _) in found.items()}, LOGITS)
    hashes = {name: of_tensors for name, (_, of_tensors) in found.items()}
    HASHES.write_text(json.dumps({"conditions": conditions(), "cases": hashes}, indent=1) + "\n")
