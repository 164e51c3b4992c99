"""The wheel in an environment that holds what the wheel says it needs and nothing else, far from the clone."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.test_end_to_end import QUICK

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT), cwd=folder)
    (path,) = folder.glob("slimlm-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `slimlm` of an environment with the wheel and, as links to this one's, the packages it depends on."""
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", str(home), cwd=home)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel), cwd=home)
    here = Path(sysconfig.get_path("purelib"))
    (there,) = home.glob("lib/python*/site-packages")
    for name in needed("slimlm"):
        for top in {file.parts[0] for file in distribution(name).files or [] if file.parts[0] != ".."}:
            if not (there / top).exists():
                (there / top).symlink_to(here / top)
    return home / "bin" / "slimlm"


def needed(name: str) -> set[str]:
    """The names of all that a distribution requires, and what that requires, extras included."""
    found, open_ends = set(), [Requirement(name)]
    while open_ends:
        requirement = open_ends.pop()
        for text in distribution(requirement.name).requires or []:
            other = Requirement(text)
            asked = ["", *requirement.extras]
            wanted = other.marker is None or any(other.marker.evaluate({"extra": extra}) for extra in asked)
            if wanted and str(other) not in found:
                found.add(str(other))
                open_ends.append(other)
    return {Requirement(text).name for text in found}


def run(*command: str, cwd: Path) -> str:
    """What a command prints, in an environment that knows nothing of the clone."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_and_the_recipes_and_nothing_else(wheel: Path):
    kept = [path for path in (ROOT / "slimlm").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    expected = {str(path.relative_to(ROOT)) for path in kept}
    expected |= {f"slimlm/recipes/{path.name}" for path in (ROOT / "recipes").iterdir()}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected
    for name in ("py.typed", "bundled/llama-6m/model.safetensors", "modeling/modeling_narrow.py"):
        assert f"slimlm/{name}" in names


def test_what_readme_promises_works_from_the_wheel(installed: Path, tmp_path: Path):
    run(str(installed), "compress", "--model", "llama", "--sparsity", "0.25", *QUICK, cwd=tmp_path)
    said = run(
        str(installed), "eval", "llama-slice-25", "--against", "llama", "--num-windows", "4", "--limit", "8",
        cwd=tmp_path,
    )  # fmt: skip
    assert "6,524,160" in said
    assert "python_reference_continuation" in said


def test_recipes_are_found_in_the_wheel(installed: Path, tmp_path: Path):
    recipes = json.loads(run(str(installed), "recipes", "--json", "-", cwd=tmp_path))["recipes"]
    listed = {recipe["name"]: recipe["path"] for recipe in recipes}
    assert listed.keys() == {path.stem for path in (ROOT / "recipes").iterdir()}
    assert all(Path(path).is_relative_to(installed.parents[1]) for path in listed.values())
    said = run(str(installed), "compress", "--recipe", "llama-slice-25", "--dry-run", *QUICK, cwd=tmp_path)
    assert "nothing was written" in said
    assert list(tmp_path.iterdir()) == []
