"""What a run has finished, on disk before the run goes on, so that another process can take over.

`journal.jsonl` holds one line per finished step. A line is written only when everything it speaks of is safely on disk,
and names it by SHA-256; whoever resumes believes nothing that does not match. A line torn by a power loss is dropped.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from slimlm.checkpoint.disk import disk_errors, sync, write_whole
from slimlm.checkpoint.reader import file_hash
from slimlm.errors import UserError
from slimlm.plain import Json
from slimlm.ranks import ALONE, Ranks

JOURNAL_NAME = "journal.jsonl"
COMPLETE = "complete"  # the last step of a run
START, ANYWAY = "start", "resumed anyway"
NO_STEPS = (START, ANYWAY)
Record = dict[str, Any]
ROUNDING = ("machine ", "version ")  # keys of a fingerprint that speak of how sums round, not of what is computed


class Journal:
    """The steps finished in `directory` by runs with this fingerprint.

    A fresh journal starts with the fingerprint. An existing one is continued only if its fingerprint is the same, or
    differs in nothing but the machine and is to be continued `anyway`; else UserError names what differs.

    ranks: all of which have the first one's records. Those that write the result write them down.
    """

    def __init__(
        self, directory: Path, fingerprint: Mapping[str, Json], anyway: bool = False, ranks: Ranks = ALONE
    ) -> None:
        self.directory = directory
        self.fingerprint = dict(fingerprint)
        self.ranks = ranks
        self.path = directory / JOURNAL_NAME
        self.records: list[Record] = ranks.decided(lambda: _read(self.path))
        if ranks.writes and not ranks.first:
            self.path.unlink(missing_ok=True)
            for record in self.records:
                self._write(record)
        if not self.records:
            self.commit(START, fingerprint=self.fingerprint)
            if ranks.writes:
                sync(directory)
            return
        before = next(record["fingerprint"] for record in reversed(self.records) if "fingerprint" in record)
        differences = ranks.decided(lambda: compare_fingerprints(before, fingerprint, anyway))
        if differences:
            self.commit(ANYWAY, fingerprint=self.fingerprint, differences=differences)

    @property
    def steps(self) -> int:
        """How many steps are finished."""
        return sum(record["step"] not in NO_STEPS for record in self.records)

    @property
    def differences(self) -> list[dict[str, list[Any]]]:
        """What differed, [before, after], each time that the run was resumed all the same."""
        return [record["differences"] for record in self.records if record["step"] == ANYWAY]

    def commit(self, step: str, **facts: Json) -> None:
        """Record that a step is finished. Raises RunFailure on a full disk."""
        record = {"step": step, **facts}
        if self.ranks.writes:
            self._write(record)
        self.records.append(record)

    def _write(self, record: Record) -> None:
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def last(self, step: str) -> Record | None:
        """The newest record of a step."""
        return next((record for record in reversed(self.records) if record["step"] == step), None)

    def keep(self, step: str, tensors: Mapping[str, Tensor], **facts: Json) -> None:
        """Record that a step is finished, and the tensors it gave, of any shape. Raises RunFailure on a full disk."""
        saved = save_tensors(self.directory, step.replace(" ", "-"), tensors) if self.ranks.first else {}
        self.commit(step, tensors=saved, **facts)

    def holds(self, step: str) -> bool:
        """Whether the newest record `keep` made of a step has its tensors still."""
        record = self.last(step)
        if record is None:
            return False
        return bool(self.ranks.decided(lambda: is_intact(self.directory, record["tensors"])))

    def recall(self, step: str) -> tuple[Record, dict[str, Tensor]] | None:
        """The newest record `keep` made of a step and its tensors, of any shape; None without one, or where they are
        damaged. All ranks ask for it."""
        record = self.last(step)
        if record is None:
            return None
        tensors = load_tensors(self.directory, record["tensors"]) if self.ranks.first else None
        names = self.ranks.agreed(tensors and list(tensors))
        found = {name: self.ranks.once(tensors[name] if tensors else None) for name in names or ()}
        return (record, found) if found else None


def save_tensors(directory: Path, name: str, tensors: Mapping[str, Tensor]) -> Record:
    """Put tensors of any shape on disk under a name of their own; what is returned goes into a record.

    Raises RunFailure on a full disk.
    """
    path = directory / f"{name}.safetensors"
    data = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
    write_whole(path, data)
    return {"file": path.name, "sha256": hashlib.sha256(data).hexdigest()}


def is_intact(directory: Path, saved: Record) -> bool:
    """Whether what `save_tensors` put there is what it was."""
    path: Path = directory / saved["file"]
    return path.is_file() and file_hash(path) == str(saved["sha256"])


def load_tensors(directory: Path, saved: Record) -> dict[str, Tensor] | None:
    """What `save_tensors` put there, of any shape, or None when it is not what it was."""
    return dict(load_file(directory / saved["file"])) if is_intact(directory, saved) else None


def _read(path: Path) -> list[Record]:
    """Every whole record; whatever follows the first that is not whole is cut off."""
    records, kept = _whole_records(path)
    if path.is_file() and kept < path.stat().st_size:
        with disk_errors(path), path.open("r+b") as file:
            file.truncate(kept)
    return records


def _whole_records(path: Path) -> tuple[list[Record], int]:
    """The records of a journal up to the first that is not whole, and the bytes they take; none without a start."""
    if not path.is_file():
        return [], 0
    records: list[Record] = []
    kept = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(record, dict) or "step" not in record:
            break
        records.append(record)
        kept += len(line)
    return (records, kept) if records and records[0]["step"] == START else ([], kept)


def compare_fingerprints(before: Mapping[str, Json], now: Mapping[str, Json], anyway: bool) -> dict[str, list[Any]]:
    """What differs between the run that was and the one that is, [before, now] by key.

    Raises UserError naming it, unless nothing but the machine and versions differ and that is accepted (`anyway`):
    they round otherwise, but compute the same thing.
    """
    now = json.loads(json.dumps(dict(now)))  # as it would come back from the journal
    keys = sorted(before.keys() | now.keys(), key=lambda key: (key.startswith("calibration"), key))  # causes first
    differing = {key: [before.get(key), now.get(key)] for key in keys if before.get(key) != now.get(key)}
    other = [key for key in differing if not key.startswith(ROUNDING)]
    if differing and (other or not anyway):
        key, *rest = [*other, *(key for key in differing if key not in other)]
        more = f" (and {len(rest)} more: {', '.join(rest[:3])})" if rest else ""
        ways = "start over without --resume"
        if not other:
            ways += ", or go on with --resume-anyway to a result that is neither machine's to the bit"
        raise UserError(
            f"cannot resume: {key} was {differing[key][0]!r}, is now {differing[key][1]!r}{more}; "
            f"repeat what was run, {'or ' if other else ''}{ways}"
        )
    return differing


def last_record(directory: Path, step: str) -> Record | None:
    """The newest record of a step in the journal in `directory`, without going on from it."""
    records, _ = _whole_records(directory / JOURNAL_NAME)
    return next((record for record in reversed(records) if record["step"] == step), None)


def is_complete(directory: Path) -> bool:
    """Whether the run whose journal is in `directory` came to its end, but perhaps for giving its result the name."""
    return any(record["step"] == COMPLETE for record in _whole_records(directory / JOURNAL_NAME)[0])


def finished_steps(directory: Path) -> int:
    """How many steps a run had finished whose journal is in `directory`."""
    return sum(record["step"] not in NO_STEPS for record in _whole_records(directory / JOURNAL_NAME)[0])
