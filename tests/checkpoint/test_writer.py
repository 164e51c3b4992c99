import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from slimlm.checkpoint.kinds import INDEX_NAME
from slimlm.checkpoint.reader import Checkpoint
from slimlm.checkpoint.shard import DTYPE_NAMES, TensorSpec
from slimlm.checkpoint.writer import CheckpointWriter
from slimlm.errors import RunFailure

names = st.lists(st.text("abcdef.0123", min_size=1, max_size=12), min_size=1, max_size=6, unique=True)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), names=names, limit=st.integers(1, 400))
def test_what_is_written_is_what_safetensors_reads(tmp_path_factory, data, names, limit):
    directory = tmp_path_factory.mktemp("out")
    dtypes = [dtype for dtype in DTYPE_NAMES if dtype != torch.bool]
    specs = {name: TensorSpec(data.draw(shapes), data.draw(st.sampled_from(dtypes))) for name in names}
    tensors = {name: (torch.randn(spec.shape) * 50).to(spec.dtype) for name, spec in specs.items()}
    writer = CheckpointWriter(directory, specs, max_shard_bytes=limit)
    for name in data.draw(st.permutations(names)):
        writer.write(name, tensors[name])
    writer.finish()
    found = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert set(Checkpoint(directory).tensors) == set(names)


def written(directory: Path, tensors: dict[str, torch.Tensor]) -> tuple[dict, bytes]:
    """Header and data of the one shard."""
    writer = CheckpointWriter(directory, {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()})
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()
    return parts(directory / "model.safetensors")


def parts(file: Path) -> tuple[dict, bytes]:
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def test_one_shard_is_what_save_file_writes_but_for_padding(tmp_path: Path):
    tensors = {"a.weight": torch.randn(4, 3), "b.weight": torch.randn(5)}
    save_file(tensors, tmp_path / "reference.safetensors", {"format": "pt"})
    assert written(tmp_path, tensors) == parts(tmp_path / "reference.safetensors")


def test_weights_begin_at_cache_lines(tmp_path: Path):
    """Mapped into memory as they are, they are as fast as copies of them; those of odd sizes are in nobody's way."""
    tensors = {
        "odd": torch.randn(3, dtype=torch.bfloat16),
        "whole": torch.randn(8, 32, dtype=torch.bfloat16),
        "odd too": torch.randn(5),
        "whole too": torch.randn(16),
    }
    header, _ = written(tmp_path, tensors)
    start = (tmp_path / "model.safetensors").stat().st_size - max(
        entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
    )
    assert start % 64 == 0
    assert [header[name]["data_offsets"][0] for name in ("whole", "whole too", "odd too", "odd")] == [0, 512, 576, 596]
    read = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("limit", [1, 7, 24, 1000])
def test_a_tensor_in_runs_of_rows_is_the_tensor(tmp_path: Path, limit: int):
    tensor = torch.arange(35, dtype=torch.float16).view(7, 5)
    save_file({"x": tensor}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    stored = Checkpoint(tmp_path).tensors["x"]
    chunks = list(stored.chunks(limit))
    assert torch.equal(torch.cat(chunks), tensor)
    assert all(chunk.nbytes <= max(limit, 10) for chunk in chunks)
    assert torch.equal(stored.read_rows([6, 0, 3]), tensor[[6, 0, 3]])
    with pytest.raises(IndexError):
        stored.read_rows([7])
    (tmp_path / "copy").mkdir()
    writer = CheckpointWriter(tmp_path / "copy", {"x": TensorSpec((7, 5), torch.float16)})
    digest = writer.write("x", iter(chunks))
    assert writer.holds({"x": digest})
    assert digest == writer.write("x", tensor)
    assert parts(tmp_path / "copy" / "model.safetensors") == parts(tmp_path / "model.safetensors")


@pytest.mark.parametrize("rows", [[2], [2, 3, 4], []])
def test_too_few_or_too_many_rows_are_an_error(tmp_path: Path, rows: list[int]):
    writer = CheckpointWriter(tmp_path, {"x": TensorSpec((7, 2), torch.float32)})
    with pytest.raises(ValueError, match="planned"):
        writer.write("x", (torch.zeros(count, 2) for count in rows))


def test_shards_have_an_index_with_the_total_size(tmp_path: Path):
    specs = {f"t{number}": TensorSpec((8,), torch.float32) for number in range(5)}
    writer = CheckpointWriter(tmp_path, specs, max_shard_bytes=64)
    for name in specs:
        writer.write(name, torch.zeros(8))
    writer.finish()
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == 5 * 32
    assert sorted(set(index["weight_map"].values())) == [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]


def test_a_tensor_of_another_shape_or_never_written_is_an_error(tmp_path: Path):
    writer = CheckpointWriter(tmp_path, {"a": TensorSpec((2, 2), torch.float32)})
    with pytest.raises(ValueError, match=r"\[2, 3\], planned \[2, 2\]"):
        writer.write("a", torch.zeros(2, 3))
    with pytest.raises(ValueError, match="never written: a"):
        writer.finish()


def test_a_value_that_the_dtype_cannot_hold_is_named(tmp_path: Path):
    writer = CheckpointWriter(tmp_path, {"layer.weight": TensorSpec((2,), torch.float16)})
    with pytest.raises(RunFailure, match=r"layer\.weight is not finite in torch\.float16"):
        writer.write("layer.weight", torch.tensor([1.0, 2e5]))


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(tmp_path: Path):
    import resource
    import signal

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(RunFailure, match=r"cannot write .*model\.safetensors: File too large"):
            CheckpointWriter(tmp_path, {"a": TensorSpec((100_000,), torch.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
