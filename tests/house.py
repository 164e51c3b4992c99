"""How slimlm is built, in numbers read off its source: loops, sizes, types, docstrings.

    python -m tests.house [TREE] [COUNTER]

prints them for the package `slimlm` in any tree, or every place that one of them counts. Nothing is imported: the tree
need not run.
"""

import ast
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

from tests.house_functions import Function, FunctionNode, functions_of, mentioned, named
from tests.house_loops import Loop, block_loops

LONG_FILE, LONG_FUNCTION, MANY_PARAMETERS = 300, 40, 6
TURNED = {"Conv1D", "is_turned"}
NO_SYNTAX = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
NO_SYNTAX |= {tokenize.ENCODING, tokenize.ENDMARKER}


class House:
    """The package in a tree. Counters are methods that give every place they count."""

    def __init__(self, tree: Path) -> None:
        self.root = tree / "slimlm"
        paths = sorted(self.root.rglob("*.py"))
        self.texts = {path.relative_to(self.root): path.read_text() for path in paths}
        self.trees = {path: ast.parse(text) for path, text in self.texts.items()}
        self.functions = [found for path, tree in self.trees.items() for found in functions_of(path, tree)]
        self.public = [function for function in self.functions if function.is_public]

    @cached_property
    def loops(self) -> list[Loop]:
        return block_loops(self.trees)

    def lines_of_rooms(self) -> Counter[str]:
        """Lines of each folder right below slimlm/, its own folders counted."""
        lines: Counter[str] = Counter()
        for path, text in self.texts.items():
            if len(path.parts) > 1:
                lines[path.parts[0]] += len(text.splitlines())
        return lines

    def biggest_room(self) -> tuple[str, float]:
        """Its name, and its percentage of all lines."""
        (name, lines), *_ = self.lines_of_rooms().most_common(1)
        return name, 100 * lines / sum(len(text.splitlines()) for text in self.texts.values())

    def long_files(self) -> list[str]:
        sizes = {path: len(text.splitlines()) for path, text in self.texts.items()}
        return [f"{path}: {size}" for path, size in sizes.items() if size > LONG_FILE]

    def long_functions(self) -> list[str]:
        return [f"{found.place}: {found.lines}" for found in self.functions if found.lines > LONG_FUNCTION]

    def crowded_functions(self) -> list[str]:
        counts = [(found.place, len(found.arguments)) for found in self.functions]
        return [f"{place}: {count}" for place, count in counts if count > MANY_PARAMETERS]

    def arguments_of(self, name: str) -> list[str]:
        """Arguments in whose annotation a name stands."""
        return [
            f"{found.place}({argument.arg})"
            for found in self.functions
            for argument in found.arguments
            if argument.annotation is not None and name in mentioned(argument.annotation)
        ]

    def casts(self) -> list[str]:
        return [
            f"{path}:{node.lineno}"
            for path, node in self._nodes()
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "cast"
        ]

    def ignores(self) -> list[str]:
        return [
            f"{path}:{token.start[0]}"
            for path, text in self.texts.items()
            for token in _tokens(text)
            if token.type == tokenize.COMMENT and "type: ignore" in token.string
        ]

    def without_shapes(self) -> list[str]:
        return [found.place for found in self.with_tensors() if not found.gives_shapes]

    def with_tensors(self) -> list[Function]:
        return [found for found in self.public if found.has_tensors]

    def without_errors(self) -> list[str]:
        return [found.place for found in self.raising() if not found.says_what_it_raises]

    def raising(self) -> list[Function]:
        return [found for found in self.public if found.raised]

    def without_docstring(self) -> list[str]:
        return [found.place for found in self.public if not found.doc]

    def syntax(self) -> list[str]:
        """Every token but comments, docstrings and layout."""
        found = []
        for path, tree in self.trees.items():
            docs = _docstring_starts(tree)
            tokens = [token for token in _tokens(self.texts[path]) if token.type not in NO_SYNTAX]
            found += [f"{path}:{token.start[0]}" for token in tokens if token.start not in docs]
        return found

    def files_that_turn(self) -> list[str]:
        """Those that know that GPT-2's Conv1D keeps its weight transposed."""
        return sorted({str(path) for path, node in self._nodes() if named(node) & TURNED})

    def rooms_that_turn(self) -> list[str]:
        return sorted({Path(path).parts[0] for path in self.files_that_turn()})

    def passed_by(self, name: str) -> list[str]:
        """Functions in which a name stands, as variable, argument, attribute or keyword."""
        return [found.place for found in self.functions if any(name in named(node) for node in found.own)]

    def files_passed_by(self, name: str) -> list[str]:
        return sorted({str(path) for path, node in self._nodes() if name in named(node)})

    def _nodes(self) -> Iterator[tuple[Path, ast.AST]]:
        return ((path, node) for path, tree in self.trees.items() for node in ast.walk(tree))


COUNTERS: dict[str, Callable[[House], list[str]]] = {
    "loops over blocks": lambda house: [loop.place for loop in house.loops],
    "of them statements": lambda house: [loop.place for loop in house.loops if loop.is_statement],
    "of them loading weights": lambda house: [loop.place for loop in house.loops if loop.loads],
    "long files": House.long_files,
    "long functions": House.long_functions,
    "crowded functions": House.crowded_functions,
    "Any arguments": lambda house: house.arguments_of("Any"),
    "object arguments": lambda house: house.arguments_of("object"),
    "casts": House.casts,
    "type: ignore": House.ignores,
    "without shapes": House.without_shapes,
    "without errors": House.without_errors,
    "without docstring": House.without_docstring,
    "files that know Conv1D": House.files_that_turn,
    "rooms that know Conv1D": House.rooms_that_turn,
    "functions sparsity passes": lambda house: house.passed_by("sparsity"),
    "files sparsity passes": lambda house: house.files_passed_by("sparsity"),
    "syntax tokens": House.syntax,
}


def _tokens(text: str) -> Iterator[tokenize.TokenInfo]:
    return tokenize.generate_tokens(io.StringIO(text).readline)


def _docstring_starts(tree: ast.Module) -> set[tuple[int, int]]:
    owners = [node for node in ast.walk(tree) if isinstance(node, FunctionNode | ast.ClassDef | ast.Module)]
    firsts = [owner.body[0] for owner in owners if owner.body and ast.get_docstring(owner) is not None]
    return {(first.lineno, first.col_offset) for first in firsts}


def table(house: House) -> str:
    """Every number, with what it is a part of."""
    totals = {"without shapes": len(house.with_tensors()), "without errors": len(house.raising())}
    totals |= {"without docstring": len(house.public), "long functions": len(house.functions)}
    totals |= {"long files": len(house.texts)}
    room, share = house.biggest_room()
    rows = [f"{f'biggest room: {room}/':28}{share:7.1f} %"]
    for name, counter in COUNTERS.items():
        of = f" of {totals[name]}" if name in totals else ""
        rows.append(f"{name:28}{len(counter(house)):7}{of}")
    return "\n".join(rows)


def main() -> None:
    words = sys.argv[1:]
    name = words.pop() if words and words[-1] in COUNTERS else None
    house = House(Path(words[0]) if words else Path(__file__).parents[1])
    print(table(house) if name is None else "\n".join(COUNTERS[name](house)))


if __name__ == "__main__":
    main()
