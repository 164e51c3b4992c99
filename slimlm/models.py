"""Models by their names: found, and opened to be streamed; what a model was made of."""

from pathlib import Path
from typing import Literal

import torch

from slimlm.checkpoint.hub import Access
from slimlm.checkpoint.manifest import MANIFEST_NAME, read_manifest
from slimlm.checkpoint.reader import Checkpoint, read_config
from slimlm.checkpoint.resolve import ResolvedModel, resolve_model
from slimlm.checkpoint.skeleton import auto_dtype, load_config, load_tokenizer
from slimlm.checkpoint.task import refuse_other_task
from slimlm.errors import UserError
from slimlm.families import FAMILIES, family_of
from slimlm.model.streamed import StreamedModel
from slimlm.recipe import RecoverStep


def resolve_known(model: str, revision: str | None, trust_remote_code: bool, access: Access) -> ResolvedModel:
    """A model's directory, nothing large fetched for a family that is not known. Raises UserError."""

    def accept(path: Path) -> None:
        values = read_config(path)
        refuse_other_task(path, values)
        if values.get("auto_map") and values["model_type"] not in FAMILIES:
            raise UserError(
                f"{path} is {values['model_type']!r}, which comes with Python code of its own: slimlm knows no such "
                "architecture, with --trust-remote-code or without (`slimlm models` lists those it knows)"
            )
        family_of(load_config(path, trust_remote_code))

    return resolve_model(model, revision, accept, trust_remote_code, access)


def open_model(
    path: Path, device: torch.device, precision: Literal["fast", "stock"], trust_remote_code: bool = False
) -> StreamedModel:
    """A checkpoint directory, ready to stream.

    precision: what it computes in. "stock" is what `from_pretrained(dtype="auto")` would take; "fast" is that too on a
    GPU, but float32 for float16, in which small gradients are zero; and float32 on a CPU, where it costs nothing.
    """
    checkpoint = Checkpoint(path)
    config = load_config(path, trust_remote_code)
    dtype = auto_dtype(config, checkpoint)
    if precision == "fast" and (device.type == "cpu" or dtype == torch.float16):
        dtype = torch.float32
    return StreamedModel(checkpoint, config, device, dtype, trust_remote_code)


def teacher_of(step: RecoverStep, model: StreamedModel, access: Access) -> StreamedModel:
    """What a model is to be like. Raises UserError for one that it cannot be trained towards."""
    source = _made_of(step, model.checkpoint.path, access)
    teacher = open_model(source.path, model.device, "fast", step.trust_remote_code)
    vocabularies = [
        (one.config.vocab_size, load_tokenizer(one.checkpoint.path, step.trust_remote_code).get_vocab())
        for one in (teacher, model)
    ]
    if vocabularies[0] != vocabularies[1]:
        raise UserError(f"the teacher {source} has other tokens than {step.model}: give --teacher, its dense model")
    if step.teacher_top_k >= teacher.config.vocab_size:
        raise UserError(f"--teacher-top-k {step.teacher_top_k}: {source} has {teacher.config.vocab_size} tokens in all")
    return teacher


def is_made_of(step: RecoverStep, model: StreamedModel, teacher: StreamedModel, access: Access) -> bool:
    """Whether a teacher is what a model's manifest, and those of what it was made of, lead to."""
    if not step.teacher:
        return True
    try:
        first = _made_of(step.model_copy(update={"teacher": None}), model.checkpoint.path, access)
    except UserError:  # nothing says so, or it is gone
        return False
    return first.path == teacher.checkpoint.path


def _made_of(step: RecoverStep, path: Path, access: Access) -> ResolvedModel:
    """The teacher that a step names, or the model that the one in a directory was made of, and that one, to the first.

    Raises UserError where nothing says so."""
    trusted, seen = step.trust_remote_code, [path]
    if step.teacher:
        return resolve_known(step.teacher, None, trusted, access)
    found: ResolvedModel | None = None
    while manifest := read_manifest(path):
        origin = manifest["model"]
        name = str(origin["path"]) if origin["origin"] == "directory" else origin["name"]
        try:
            found = resolve_known(name, origin["revision"], trusted, access)
        except UserError as error:
            raise UserError(f"{path / MANIFEST_NAME} names what it was made of: {error}; give --teacher") from error
        path = found.path
        if path in seen:
            raise UserError(f"{path} was made of itself, says its slimlm.json: give --teacher, the dense model")
        seen.append(path)
    if found is None:
        raise UserError(f"no slimlm.json says what {step.model} was made of: give --teacher, the dense model")
    return found
