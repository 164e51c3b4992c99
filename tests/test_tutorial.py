"""docs/tutorial.md, followed word for word in an empty directory."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
SERVING = next(place for place, (_, text) in enumerate(BLOCKS) if text.rstrip().endswith("&"))
PORT = "8000"  # on the page


def started(kind: str, text: str, cwd: Path, **streams) -> subprocess.Popen:
    """A block in a process group of its own, whose programs are those beside this interpreter."""
    words = [sys.executable, "-c", text] if kind == "python" else ["bash", "-euo", "pipefail", "-c", text]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    env = {**os.environ, "PATH": path}
    return subprocess.Popen(words, cwd=cwd, env=env, text=True, start_new_session=True, **streams)


def followed(kind: str, text: str, cwd: Path) -> str:
    """What a block prints."""
    process = started(kind, text, cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, errors = process.communicate()
    assert process.returncode == 0, f"{text}\n{out}\n{errors}"
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all was done that stands above the server, but for the installation, which tests/test_wheel.py does."""
    cwd = tmp_path_factory.mktemp("tutorial")
    for kind, text in BLOCKS[:SERVING]:
        if text.startswith("pip install"):
            continue
        said = followed(kind, text, cwd)
        if "--dry-run" in text:
            assert "nothing was written" in said
            assert not (cwd / "smaller").exists()
    return cwd


def test_every_command_works(place: Path):
    assert {path.name for path in place.iterdir()} == {
        "chat-model", "chats.jsonl", "held-out.txt", "smaller", "recovered",
    }  # fmt: skip
    commands = [text.split()[:2] for kind, text in BLOCKS if kind == "bash"]
    for name in ("inspect", "compress", "eval", "recover", "bench"):
        assert ["slimlm", name] in commands


@pytest.fixture
def port(place: Path) -> Iterator[str]:
    """Of the page's server, while it runs."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        number = str(free.getsockname()[1])
    text = BLOCKS[SERVING][1].replace(PORT, number).rstrip().removesuffix("&")
    with (place / "server.log").open("w") as log:
        server = started("bash", text, place, stdout=log, stderr=log)
        yield number
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not here")
def test_it_is_served(place: Path, request: pytest.FixtureRequest):
    for needed in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(needed, exc_type=ImportError)
    number = request.getfixturevalue("port")
    assert len(BLOCKS) > SERVING + 1
    for kind, text in BLOCKS[SERVING + 1 :]:
        assert PORT in text
        said = followed(kind, text.replace(PORT, number), place)
        assert '"role":"assistant"' in said, (place / "server.log").read_text()
