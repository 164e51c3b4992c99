import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from slimlm.checkpoint.reader import INDEX_NAME, Checkpoint
from slimlm.checkpoint.shard import DTYPE_NAMES
from slimlm.checkpoint.writer import CheckpointWriter, TensorSpec
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


def test_one_shard_is_byte_for_byte_what_save_file_writes(tmp_path: Path):
    tensors = {"a.weight": torch.randn(4, 3), "b.weight": torch.randn(5)}
    writer = CheckpointWriter(tmp_path, {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()})
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()
    save_file(tensors, tmp_path / "reference.safetensors", {"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "reference.safetensors").read_bytes()


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
