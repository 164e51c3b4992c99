"""The model card, `README.md`, filled from the manifest: nothing in it was not measured."""

import logging
from pathlib import Path
from typing import Any

import yaml

from slimlm.checkpoint.clients import programs_line
from slimlm.checkpoint.disk import write_whole
from slimlm.checkpoint.manifest import Manifest, Measured, Sizes, stages_of, took

logger = logging.getLogger(__name__)
CARD_NAME = "README.md"
Node = str | list["Node"] | dict[str, "Node"]  # of YAML of which all is text
INHERITED = ("license", "license_name", "license_link", "language", "base_model")


def inherited(source: Path) -> dict[str, str | list[str]]:
    """What of the header of a model's own card holds for what is made of it, too; nothing where there is no header."""
    try:
        text = (source / CARD_NAME).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    opening, _, rest = text.partition("---\n")
    header, closing, _ = rest.partition("\n---")
    if opening.strip("\ufeff \n") or not closing:
        return {}
    try:
        fields = yaml.load(header, Loader=yaml.BaseLoader)  # all of it text: `no` is Norwegian
    except yaml.YAMLError as error:
        logger.warning("%s: its header is no YAML, so neither licence nor languages are taken over: %s", source, error)
        return {}
    found = {name: fields.get(name) for name in INHERITED} if isinstance(fields, dict) else {}
    return {name: value for name, value in found.items() if value and _is_text(value)}


def _is_text(value: Node) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(entry, str) for entry in value))


def write_card(directory: Path, manifest: Manifest) -> None:
    """Raises RunFailure on a full disk."""
    write_whole(directory / CARD_NAME, render_card(manifest).encode("utf-8", "backslashreplace"))


def render_card(manifest: Manifest) -> str:
    """Markdown with the hub's YAML header."""
    parts = [
        _header(manifest),
        f"# {manifest['model']['name']}, compressed by slimlm\n",
        _summary(manifest),
        _sizes(manifest),
        _loss(manifest),
        _use(manifest),
        _reproduce(manifest),
    ]
    return "\n".join(part for part in parts if part)


def _use(manifest: Manifest) -> str:
    own = manifest["needs_remote_code"]
    trust = ", trust_remote_code=True" if own else ""
    code = (
        "Its modelling code, one file, is in the checkpoint: no stock class can express it."
        if own
        else "No extra code is needed: the architecture is a stock one with other sizes."
    )
    return (
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("path/to/this/directory"{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")\n```\n\n{code}\n{_programs(manifest)}'
    )


def _programs(manifest: Manifest) -> str:
    """Where such a result was tried, and with what this one was made."""
    line, made = tried_in(manifest), manifest.get("versions", {}).get("transformers")
    with_what = f"Made with transformers {made}." if made else ""
    return "\n" + " ".join(filter(None, (line, with_what))) + "\n" if line or with_what else ""


def kind_of(manifest: Manifest) -> str:
    """The architecture of a result, as `clients.READ_BY` has it."""
    dense = str(manifest["model"].get("model_type"))
    written = str(manifest["changes"].get("model_type", [None, dense])[1])
    return dense if (dense, written) == ("qwen2", "llama") else written  # with biases, which Llamas have not


def tried_in(manifest: Manifest) -> str:
    """Where such a result was tried, in a sentence; nothing where it was in no program."""
    return programs_line(kind_of(manifest), bool({"hidden_size", "num_key_value_heads"} & manifest["changes"].keys()))


def _header(manifest: Manifest) -> str:
    model = manifest["model"]
    fields: dict[str, Any] = dict(model.get("card", {}))
    if model["origin"] == "hub":
        fields["base_model"] = model["name"]  # the hub refuses what is no id of its
    fields |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    fields |= {"tags": ["slimlm", "compression", *_methods(manifest)]}
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n"


def _methods(manifest: Manifest) -> list[str]:
    """Of all steps, each once."""
    return list(dict.fromkeys(step["method"] for step in manifest["recipe"]["steps"]))


def _summary(manifest: Manifest) -> str:
    sparsity, methods = manifest["sparsity"], ", then ".join(f"`{method}`" for method in _methods(manifest))
    changes = "".join(f" `{name}` {before} -> {after}." for name, (before, after) in manifest["changes"].items())
    zeros = sparsity["zeros_in_pruned_matrices"]
    honest = "" if zeros is None else " Zeros take as much room as other numbers, and stock kernels as much time."
    uneven = "".join(f" `{name}` {width}" for name, width in manifest.get("method", {}).get("uneven", {}).items())
    dear = (
        f" No multiple of 32:{uneven}; quantised files (GGUF, int4) hold such matrices unquantised." if uneven else ""
    )
    return (
        f"Method {methods}, {manifest['paper']}. Requested sparsity {sparsity['requested']:g} "
        f"(share of {sparsity['of']}), achieved {sparsity['achieved']:.4f}; of all parameters, "
        f"{sparsity['parameters_removed']:.4f} are gone.{changes}{dear}{honest}\n"
    )


def _sizes(manifest: Manifest) -> str:
    return (
        "| | dense | compressed | change |\n| --- | ---: | ---: | ---: |\n"
        + _row("parameters", _pair(manifest["parameters"]), "{:,}")
        + _row("bytes of weights", _pair(manifest["bytes"]), "{:,}")
    )


def _pair(sizes: Sizes) -> tuple[int, int]:
    return sizes["dense"], sizes["compressed"]


def _row(label: str, pair: tuple[float, float], form: str) -> str:
    dense, compressed = pair
    change = f"{100 * (compressed / dense - 1):+.1f}%"
    return f"| {label} | {form.format(dense)} | {form.format(compressed)} | {change} |\n"


def _loss(manifest: Manifest) -> str:
    measured = manifest["measured"]
    trained = "".join(f"\n{line}\n" for line in recovered(manifest))
    if measured is None:
        return f"## What was lost\n\nNot measured: run `slimlm eval` on this directory.\n{trained}"
    dense, compressed = measured["dense"], measured["compressed"]
    error = ""
    if manifest["blocks"]:
        last = manifest["blocks"][-1]["relative_error"]
        error = f" Mean relative error of the residual stream after the last block: {last:.3f}."
    return (
        "## What was lost\n\n| | dense | compressed | change |\n| --- | ---: | ---: | ---: |\n"
        + _row("perplexity", (dense["perplexity"], compressed["perplexity"]), "{:.2f}")
        + f"\nOn {measured['text']}: {measured['windows']} windows of {measured['window']} tokens, stride "
        f"{measured['stride']}, BOS {measured['bos']}, computed in {dtypes_of(measured)}.{error}\n" + trained
    )


def recovered(manifest: Manifest) -> list[str]:
    """What training brought, in a sentence, where there was any."""
    history = manifest.get("method", {}).get("history")
    if not history:
        return []
    first, last = history[0], next(one for one in history if one["step"] == manifest["method"]["best_step"])
    kept = "" if last["step"] else "; nothing was better, so the weights are those that came in"
    texts = [name for name in first if name.startswith("held out ")]
    changes = ", ".join(f"{name.removeprefix('held out ')} {first[name]:.4f} -> {last[name]:.4f}" for name in texts)
    return [
        f"Trained on {manifest['method']['trained_tokens']:,} tokens; divergence from the dense model on held-out "
        f"text, in nats a token: {changes}{kept}."
    ]


def dtypes_of(measured: Measured) -> str:
    """What both sides were computed in; named for each where they differ."""
    dense, compressed = measured["dense"]["dtype"], measured["compressed"]["dtype"]
    return str(dense) if dense == compressed else f"{dense} (dense) and {compressed} (compressed)"


def _reproduce(manifest: Manifest) -> str:
    calibration, run, (seconds, peaks) = manifest["calibration"], manifest["run"], took(manifest)
    resumed = any(stage["run"]["resumed"] for stage in stages_of(manifest))
    elsewhere = any(stage["run"]["resumed_anyway"] for stage in stages_of(manifest))
    data = "No calibration data"
    if calibration is not None:
        data = (
            f"Calibrated on {calibration['windows']} windows of {calibration['window']} tokens from "
            f"`{calibration['source']}` (seed {calibration['seed']}, SHA-256 `{calibration['sha256'][:16]}`)"
        )
    return (
        f"## How it was made\n\n{data}; {'resumed, what was left took ' if resumed else ''}"
        f"{seconds:.0f} s on {run['machine']}, peak memory {peaks['host'] / 1e9:.2f} GB. "
        f"{'It was resumed on another kind of machine or with other versions. ' if elsewhere else ''}"
        "`slimlm.json` beside this file holds the whole recipe, hashes and versions; "
        "`slimlm compress --recipe recipe.yaml --output-dir again` with the recipe beside it repeats it.\n"
    )
