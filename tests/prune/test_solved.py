import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from slimlm.calibration import load_windows
from slimlm.checkpoint.resolve import BUNDLED
from slimlm.checkpoint.skeleton import load_tokenizer
from slimlm.errors import UserError
from slimlm.evaluation.sources import python_reference
from slimlm.linalg.budget import LossCurve, cheapest_split
from slimlm.model.hidden import Scratch
from slimlm.prune import run as pruning
from slimlm.prune import solved
from slimlm.prune.solved import MOST, POINTS, SCRATCH, TOGETHER
from slimlm.recipe import one_step
from slimlm.stages import compress
from tests.conftest import CONFIGS, SIZES, build_tiny, random_tokens, stream
from tests.helpers import carried_out, run_at


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("The old house stood at the end of the lane, and nobody had lived there. " * 400)
    return tmp_path / "text.txt"


def with_blocks(path: Path, count: int, dead: int | None = None) -> Path:
    """A tiny Llama of so many blocks, one of which writes nothing to the stream."""
    build_tiny(LlamaConfig(**{**SIZES, "num_hidden_layers": count}), path)
    if dead is not None:
        silence(path, dead)
    return path


def silence(path: Path, block: int) -> None:
    """Have a block write nothing to the stream."""
    tensors = load_file(path / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.{block}.{name}.weight"].zero_()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def shares_of(path: Path, text: Path, place: Path, sparsity: float, method: str = "wanda") -> list[float]:
    tokens = load_windows(str(text), load_tokenizer(path), 40, 24).tokens
    run = run_at(stream(path), list(tokens.split(8)), place, method=method, allocation="solved", sparsity=sparsity)
    found = pruning._solved_shares(run, pruning.row_of(run.recipe))
    assert not list((place / "work").glob("scratch-*"))
    return [found[index] for index in range(len(run.model.blocks))]


@pytest.mark.parametrize("dead", [1, 4])
def test_a_block_that_does_nothing_takes_the_most(tmp_path: Path, dead: int):
    """In the trained model, whose other blocks all cost something."""
    path = tmp_path / "model"
    shutil.copytree(BUNDLED["llama"], path)
    silence(path, dead)
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(python_reference()), encoding="utf-8")
    shares = shares_of(path, tmp_path / "text.txt", tmp_path / "work", 0.4)
    assert shares[dead] == pytest.approx(max(POINTS) * 0.4)
    assert all(share < shares[dead] for index, share in enumerate(shares) if index != dead)
    assert sum(shares) / 6 == pytest.approx(0.4, abs=0.005)


def test_the_blocks_measured_together_change_nothing(tmp_path: Path, text: Path, monkeypatch):
    path = with_blocks(tmp_path / "model", 5)
    found = []
    for number, together in enumerate((1, 2, 5)):
        monkeypatch.setattr(solved, "TOGETHER", together)
        found.append(shares_of(path, text, tmp_path / f"work-{number}", 0.5))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("method", ["wanda", "obc"])
def test_what_is_known_of_a_block_serves_every_point(tmp_path: Path, text: Path, method: str, monkeypatch):
    path = with_blocks(tmp_path / "model", 3)
    once = shares_of(path, text, tmp_path / "once", 0.5, method)
    monkeypatch.setattr(solved.Measuring, "_known", lambda *_: None)
    assert once == shares_of(path, text, tmp_path / "each", 0.5, method)


def test_a_block_of_noise_is_not_free():
    """Seven blocks that cost, and one whose curve is noise around zero, at 20%: what it is measured to bounds it."""
    noise = LossCurve([(10, -0.0004), (20, -0.0001), (30, -0.0002), (40, 0.0001)], [0.0003] * 4)
    normal = LossCurve([(10, 0.002), (20, 0.006), (30, 0.013), (40, 0.03)], [0.0003] * 4)
    split = cheapest_split([noise, *[normal] * 7], [1] * 8, 20, round(100 * MOST))
    assert split[0] <= 40
    assert max(split[1:]) <= 20
    assert sum(split) == 160
    assert noise(40) > 0
    assert noise(41) == math.inf


def test_no_block_goes_beyond_what_was_measured_of_it(tmp_path: Path, text: Path):
    path = with_blocks(tmp_path / "model", 4, dead=1)
    shares = shares_of(path, text, tmp_path / "work", 0.2)
    assert max(shares) <= max(POINTS) * 0.2 + 1e-9
    assert max(shares_of(path, text, tmp_path / "other", 0.6)) <= MOST


def test_what_waits_on_disk_is_what_was_said(tmp_path: Path, text: Path, monkeypatch):
    path = with_blocks(tmp_path / "model", 6)
    most = 0
    clear = Scratch.clear

    def counted(self: Scratch, names: str = "*") -> None:
        nonlocal most
        most = max(most, sum(file.stat().st_size for file in self.directory.glob("scratch-*")))
        clear(self, names)

    monkeypatch.setattr(Scratch, "clear", counted)
    monkeypatch.setattr("slimlm.model.hidden.SHARE", 1 << 60)  # no memory for any
    shares_of(path, text, tmp_path / "work", 0.5)
    windows = 2 * 24 * 32 * 4  # bytes of a pair of files for a window of 24 tokens in fp32
    assert most <= SCRATCH * windows
    assert most > TOGETHER * len(POINTS) * 8 * windows / 2  # of the 8 windows that are held out


def test_more_than_can_be_measured_is_refused(tmp_path: Path, text: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    recipe = one_step(
        **{
            "model": str(path), "method": "wanda", "allocation": "solved", "sparsity": 0.97, "dataset": str(text),
            "max_seq_length": 24, "output_dir": str(tmp_path / "out"), "measure": False,
        }
    )  # fmt: skip
    with pytest.raises(UserError, match=r"solved measures blocks up to a sparsity of 0\.95"):
        compress(recipe)


@pytest.mark.parametrize("method", ["mfac", "woodfisher"])
def test_blocks_are_measured_by_their_inputs_where_the_method_looks_at_gradients(
    tiny_llama: Path, tmp_path: Path, method: str
):
    run = run_at(
        stream(tiny_llama),
        list(random_tokens(12, 24).split(4)),
        tmp_path / "run",
        method=method,
        sparsity=0.5,
        allocation="solved",
        max_seq_length=24,
    )
    shares = carried_out(run).notes["allocation"]
    assert sum(shares.values()) / len(shares) == pytest.approx(0.5, abs=0.1)
