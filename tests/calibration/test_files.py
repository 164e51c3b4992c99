"""Every kind of file people have is read, or refused in one line that says where it is broken."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slimlm.calibration.files import decoded, is_readable, read_file
from slimlm.errors import UserError

ROOT = Path(__file__).parents[2]


def test_data_as_people_have_it(tmp_path: Path):
    """59 files and folders, made by the script that the documentation's table comes from."""
    done = subprocess.run(
        [sys.executable, "eval/calibration_data.py"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.splitlines()[-1] == "59 of 59"


@pytest.mark.parametrize(
    ("name", "readable"),
    [("a.txt", True), ("a.JSONL", True), ("a.b.csv.gz", True), ("a.gz", False), ("a.npy", False), ("txt", False)],
)
def test_names_tell_what_can_be_read(name: str, readable: bool):
    assert is_readable(Path(name)) == readable


def test_only_the_columns_that_are_wanted_are_read(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["a", "b"], "large": ["x", "y"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows = list(read_file(tmp_path / "a.parquet", lambda names: [name for name in names if name == "text"]))
    assert rows == [{"text": "a"}, {"text": "b"}]


def test_the_first_byte_that_is_not_utf8_is_named():
    with pytest.raises(ValueError, match="byte 9, in line 2"):
        decoded("first\nÜb".encode() + b"\xff")


def test_lines_before_a_broken_one_are_read(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text"')
    rows = read_file(tmp_path / "a.jsonl")
    assert next(rows) == {"text": "a"}
    with pytest.raises(UserError, match="a.jsonl cannot be read: line 3 is not JSON"):
        next(rows)
