"""Run llama.cpp's convert_hf_to_gguf.py, which knows a BPE tokenizer only by a hash of what it makes of a text.

    PYTHON eval/client/convert_gguf.py LLAMA_CPP MODEL OUT.gguf

A tokenizer that it does not know is called "smollm", which splits as GPT-2 does and digits one by one.
"""

import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    source, model, out = sys.argv[1:]
    sys.path[0] = source
    sys.path.insert(1, str(Path(source) / "gguf-py"))
    from conversion.base import TextModel

    known = TextModel.get_vocab_base_pre

    def named(self: Any, tokenizer: Any) -> str:
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            print("unknown pre-tokenizer, called smollm")
            return "smollm"

    TextModel.get_vocab_base_pre = named
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", out, "--outtype", "f32"]
    runpy.run_path(str(Path(source) / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main()
