"""What to do with a result: commands that work on it as it is."""

import re
from pathlib import Path
from shlex import quote
from typing import Any

from slimlm.calibration import STANDARD_INPUT
from slimlm.checkpoint.card import kind_of
from slimlm.checkpoint.clients import LLAMA_CPP, READ_BY
from slimlm.checkpoint.manifest import Manifest, stages_of, steps_in
from slimlm.checkpoint.resolve import BUNDLED
from slimlm.recipe import OF_HUB, SELF, flag_of

SERVING = "# pip install 'transformers[serving]'"


def next_steps(manifest: Manifest, output: Path) -> list[str]:
    """A line each of a label and a command, at most six: of a rotated model other ones than of a smaller one."""
    place, method = quote(str(output)), steps_in(manifest)[-1]["method"]
    trust = " --trust-remote-code" if _asked(manifest, "trust_remote_code") or manifest["needs_remote_code"] else ""
    loads = f"{str(output)!r}{', trust_remote_code=True' if manifest['needs_remote_code'] else ''}"
    dtype = " --dtype float32" if _asked(manifest, "dtype") != "auto" else ""
    against = f" --against {_dense(manifest)}{trust}"
    found = {
        "load": f"AutoModelForCausalLM.from_pretrained({loads})",
        "evaluate": f"slimlm eval {place}{against}{dtype}",
    }
    if method == "rotate":
        return _lines({**found, "cut": f"slimlm compress --model {place}{trust} --sparsity 0.25 --no-refit"})
    if method != "recover":
        found["recover"] = f"slimlm recover {place}{_data(manifest)}{trust}"
    if _is_smaller(manifest) or "x" in str(_asked(manifest, "pattern")):
        found["speed"] = f"slimlm bench {place}{against}"
    found["serve"] = f"transformers serve {place}{trust}  {SERVING}"
    if _quantises(manifest):
        half, small = quote(f"{output}.gguf"), quote(f"{output}-q4.gguf")
        converted = f"python llama.cpp/convert_hf_to_gguf.py {place} --outfile {half} --outtype f16"
        found["quantise"] = f"{converted} && llama-quantize {half} {small} Q4_K_M"
    return _lines(found)


def _lines(found: dict[str, str]) -> list[str]:
    return [f"{label:<10}{command}" for label, command in found.items()]


def _asked(manifest: Manifest, name: str) -> Any:
    """A setting of the last step, which may stand above all of them."""
    recipe = manifest["recipe"]
    return {**recipe, **recipe["steps"][-1]}.get(name)


def _dense(manifest: Manifest) -> str:
    """What a model was made of, and its revision; of one that was recovered what it was trained towards."""
    name, revision = manifest["model"]["name"], _asked(manifest, "revision")
    if _asked(manifest, "method") == "recover" and "stages" not in manifest:
        name, revision = manifest["method"]["teacher"], None
    name = next((alias for alias, path in BUNDLED.items() if name == str(path)), name)
    return quote(name) + (f" --against-revision {quote(revision)}" if revision else "")


def _data(manifest: Manifest) -> str:
    """The data of the last step; none where it had none, or a mixture that no flag can say."""
    data = given = _asked(manifest, "dataset")
    if isinstance(data, list):
        shares = [part["share"] or part["windows"] for part in data]
        is_one_kind = len({part["share"] is None for part in data}) == 1
        parts = [f"{part['source']}:{share:g}" for part, share in zip(data, shares, strict=True)]
        is_said = is_one_kind and all(re.fullmatch(r"[^,]+:\d*\.?\d+", part) for part in parts)
        data = ",".join(parts) if is_said and len(parts) > 1 else data[0]["source"] if len(data) == 1 else None
    sources = [part["source"] for part in given] if isinstance(given, list) else [given]
    if data in (None, SELF) or STANDARD_INPUT in sources:
        return ""
    named = {flag_of(name): _asked(manifest, name) for name in ("text_column", *OF_HUB)}
    return "".join([f" --dataset {quote(data)}", *(f" {flag} {quote(said)}" for flag, said in named.items() if said)])


def _is_smaller(manifest: Manifest) -> bool:
    return manifest["parameters"]["compressed"] < manifest["parameters"]["dense"]


def _quantises(manifest: Manifest) -> bool:
    """Whether llama.cpp's converter reads it, and its quantised files hold all of its matrices quantised."""
    if not _is_smaller(manifest) or manifest["sparsity"]["zeros_in_pruned_matrices"] is not None:
        return False
    is_even = not any(stage["method"].get("uneven") for stage in stages_of(manifest))
    knows_tokens = _dense(manifest) not in BUNDLED  # whose tokenizer the converter refuses
    return is_even and knows_tokens and LLAMA_CPP in READ_BY.get(kind_of(manifest), ())
