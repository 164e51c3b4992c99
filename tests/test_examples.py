"""The programs in examples/, run on a tiny model, and the notebook; and that a method is added in twenty lines."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import CONFIGS, build_tiny
from tests.helpers import is_linear

EXAMPLES = Path(__file__).parents[1] / "examples"
FEW = {"num_calibration_samples": 10, "max_seq_length": 16, "measure": False}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The old house stood at the end of the lane. " * 200)
    return str(build_tiny(CONFIGS["llama"], tmp_path / "model"))


def main_of(name: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_slice(model: str, capsys: pytest.CaptureFixture):
    main_of("slice")(model, "text.txt", "out", **FEW)
    assert "parameters -> " in capsys.readouterr().out
    assert Path("out/model.safetensors").is_file()


def test_prune(model: str, capsys: pytest.CaptureFixture):
    main_of("prune")(model, **FEW)
    assert capsys.readouterr().out.startswith("0.50 of [32, 48] are zero; the model is a LlamaForCausalLM")


def test_a_method_of_ones_own_prunes_by_its_own_scores(model: str):
    main_of("new_method")(model, "out", dataset="text.txt", **FEW)
    before, after = (load_file(Path(path) / "model.safetensors") for path in (model, "out"))
    linears = [name for name in before if name.endswith(".weight") and is_linear(name)]
    for name in linears:
        gone, weight = after[name] == 0, before[name]
        assert int(gone.sum()) == weight.numel() // 2
        assert torch.equal(after[name][~gone], weight[~gone])
    # Neither by size alone nor, as Wanda, row by row.
    assert any((after[name] == 0).sum(1).unique().numel() > 1 for name in linears)
    assert any(
        before[name][after[name] == 0].abs().max() > before[name][after[name] != 0].abs().min() for name in linears
    )


def test_it_takes_twenty_lines():
    text = (EXAMPLES / "new_method.py").read_text()
    own = text[text.index("def ria") : text.index("def main")]
    assert len([line for line in own.splitlines() if line.strip()]) <= 20


NOTEBOOK = EXAMPLES / "compress.ipynb"


def test_the_notebook_holds_no_outputs():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 3
    assert all((cell["outputs"], cell["execution_count"]) == ([], None) for cell in cells)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    work = tmp_path / "work"
    work.mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=800, kernel_name="python3", resources={"metadata": {"path": str(work)}}).execute()
    assert [path.name for path in work.iterdir()] == ["llama-slice-20"]
    *_, last = (cell for cell in notebook.cells if cell.cell_type == "code")
    (written,) = (output.text for output in last.outputs if output.get("name") == "stdout")
    assert written.startswith("The old house stood")
    assert len(written) > 40
