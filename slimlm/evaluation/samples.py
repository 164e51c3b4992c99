"""Everything measured, on disk: of every token, question and continuation. All figures can be had from it again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from slimlm.checkpoint.kinds import CONFIG_NAME
from slimlm.checkpoint.reader import file_hash
from slimlm.errors import RunFailure, UserError, one_line
from slimlm.evaluation.account import Samples, accounts
from slimlm.evaluation.generation import Continuation
from slimlm.evaluation.text import TestWindows, TextFigures
from slimlm.plain import Json

INDEX = "evaluation.json"
TOKENS, TASKS, WRITTEN = "tokens.safetensors", "tasks.json", "continuations.jsonl"
PARTS = ("tokens", "documents", "lengths")
MODELS = "models"


class Kept(NamedTuple):
    """Samples that were read. data: with the figures, `facts` of each model, `files` and their hashes, and the
    `conditions` under which all were measured. models: the dense one last, where there are pairs."""

    data: dict[str, Any]
    texts: list[TestWindows]
    models: list[Samples]


def check_samples(place: Path) -> None:
    """Find out before any work whether samples can be kept there. Raises UserError."""
    try:
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise UserError(f"--log-samples {place}: it is there already; give a new directory")
        place.mkdir(parents=True, exist_ok=True)
        (place / INDEX).touch()
        (place / INDEX).unlink()
    except OSError as error:
        raise UserError(f"--log-samples {place} cannot be written: {error.strerror}") from error


def write_samples(
    place: Path,
    data: Mapping[str, Json],
    models: Sequence[Samples],
    texts: Sequence[TestWindows],
    conditions: Mapping[str, Json],
) -> None:
    """A directory `models/N` for each, the dense one last; the texts' tokens; and `data`, last of all: without it the
    others are not whole. Raises RunFailure."""
    try:
        tokens = {f"{text.name}/{part}": getattr(text, part).contiguous() for text in texts for part in PARTS}
        (place / TOKENS).write_bytes(save(tokens))
        for number, samples in enumerate(models):
            _write(place / MODELS / str(number), samples)
        files = {path.relative_to(place).as_posix(): file_hash(path) for path in place.rglob("*") if path.is_file()}
        more = {"facts": [one.facts for one in models], "files": files, "conditions": conditions}
        (place / INDEX).write_text(json.dumps({**data, **more}) + "\n", encoding="utf-8")
    except (OSError, SafetensorError, TypeError, ValueError) as error:  # the last two of documents that are no JSON
        raise RunFailure(f"--log-samples {place} cannot be written: {one_line(error)}") from error


def _write(place: Path, samples: Samples) -> None:
    place.mkdir(parents=True)
    (place / TOKENS).write_bytes(save({name: one.contiguous() for name, one in samples.figures.items()}))
    if samples.found is not None:
        found = {**samples.found, "samples": list(samples.found["samples"])}
        (place / TASKS).write_text(json.dumps(found, default=str), encoding="utf-8")
        for number, rows in enumerate(samples.found["samples"].values()):
            _write_lines(place / f"questions-{number}.jsonl", rows)
    if samples.written is not None:
        _write_lines(place / WRITTEN, list(map(asdict, samples.written)))


def _write_lines(path: Path, rows: Sequence[Mapping[str, Json]]) -> None:
    path.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows), encoding="utf-8")


def are_samples(place: Path) -> bool:
    """Whether it is a directory that `write_samples` wrote, or began to, and no model's."""
    parts = (INDEX, TOKENS, f"{MODELS}/0")
    return not (place / CONFIG_NAME).exists() and any((place / name).exists() for name in parts)


def read_samples(place: Path) -> Kept:
    """What `write_samples` wrote. Raises UserError where that is not whole, or not as it was written."""
    try:
        data = json.loads((place / INDEX).read_text(encoding="utf-8"))
        if changed := [name for name, digest in data["files"].items() if file_hash(place / name) != digest]:
            raise ValueError(f"{changed[0]} is not as it was written")
        texts = _read_texts(place, data["texts"])
        models = [_read(place / MODELS / str(number), facts) for number, facts in enumerate(data["facts"])]
        return Kept({**data, "conditions": data["conditions"]}, texts, models)
    except KeyError as error:
        raise UserError(f"{place} holds no whole samples: {INDEX} has no {error}") from error
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"{place} holds no whole samples: {one_line(error)}") from error


def recomputed(place: Path, fragile: int = 0) -> dict[str, Any]:
    """`models` and `pairs` as `evaluate` gave them, from what `write_samples` wrote. Raises UserError where that is
    not whole."""
    data, texts, models = read_samples(place)
    dense = models.pop() if data["pairs"] else None
    return accounts(models, dense, texts, fragile)


def _read_texts(place: Path, described: Sequence[TextFigures]) -> list[TestWindows]:
    with safe_open(place / TOKENS, "pt") as file:
        return [
            TestWindows(
                source=one["text"],
                bos=one["bos"],
                name=one["name"],
                **{part: file.get_tensor(f"{one['name']}/{part}") for part in PARTS},
            )
            for one in described
        ]


def _read(place: Path, facts: Mapping[str, Json]) -> Samples:
    samples = Samples(dict(facts))
    with safe_open(place / TOKENS, "pt") as file:
        samples.figures = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if (place / TASKS).is_file():
        samples.found = json.loads((place / TASKS).read_text(encoding="utf-8"))
        assert samples.found is not None
        names = samples.found["samples"]
        samples.found["samples"] = {
            name: _read_lines(place / f"questions-{number}.jsonl") for number, name in enumerate(names)
        }
    if (place / WRITTEN).is_file():
        samples.written = [Continuation(**row) for row in _read_lines(place / WRITTEN)]
    return samples


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
