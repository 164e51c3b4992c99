"""PIQA and BLiMP of compressed models beside the dense one, question by question, through `slimlm.evaluate`.

    python eval/zero_shot.py slice-20 slice-25 --against /tmp/smollm2 --data ../shared/data
    python eval/zero_shot.py slice-25 --against /tmp/smollm2 --data ../shared/data --limit 200 --json figures.json

--data holds piqa.jsonl and blimp/*.jsonl; lm-eval's tasks of these names are made of them, word for word, but for where
the questions come from. A row a model: accuracy, what is left of the dense model's, the share of its advantage over
chance that is lost, with the standard error of the paired difference, and questions that flipped.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import yaml

import slimlm

CHANCE = 0.5
ASKED = {
    "piqa": {
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_choice": "{{[sol1, sol2]}}",
        "doc_to_target": "label",
    },
    "blimp": {
        "doc_to_text": "",
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "doc_to_target": 0,
        "num_fewshot": 0,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="directories")
    parser.add_argument("--against", required=True, help="the dense model")
    parser.add_argument("--data", type=Path, required=True, help="directory of piqa.jsonl and blimp/")
    parser.add_argument("--limit", type=int, help="questions of each, instead of all")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, help="keep everything measured")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        tasks = [task_file(name, arguments.data, Path(place)) for name in ASKED]
        found = slimlm.evaluate(
            arguments.models,
            arguments.against,
            tasks=tasks,
            text=(),
            generate=0,
            limit=arguments.limit,
            dtype=arguments.dtype,
            batch_size=32,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(found.data, indent=1))
    print("\n".join(table(found.data)))


def task_file(name: str, data: Path, place: Path) -> str:
    """A YAML file of a task whose questions are local."""
    files = sorted((data / "blimp").glob("*.jsonl")) if name == "blimp" else [data / "piqa.jsonl"]
    task = {
        "task": f"local_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": [str(file.resolve()) for file in files]}},
        "output_type": "multiple_choice",
        "test_split": "test",
        **ASKED[name],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task))
    return str(path)


def table(data: dict[str, Any]) -> list[str]:
    """In Markdown."""
    names = list(ASKED)
    heads = [f"{name} acc | % of dense | over chance, lost | lost, won" for name in names]
    lines = [f"| model | parameters | {' | '.join(heads)} |", "| --- " + "| ---: " * (1 + 4 * len(names)) + "|"]
    *models, dense = data["models"]
    cells = [f"{accuracy(dense, name)['value']:.4f} ± {accuracy(dense, name)['stderr']:.4f} | | |" for name in names]
    lines.append(f"| dense | {dense['parameters']:,} | {' | '.join(cells)} |")
    for entry, pair in zip(models, data["pairs"], strict=True):
        cells = []
        for name in names:
            change, advantage = pair["tasks"][f"local_{name}"]["acc"], accuracy(dense, name)["value"] - CHANCE
            lost, error = -change["change"] / advantage, change["stderr"] / abs(advantage)
            cells.append(
                f"{accuracy(entry, name)['value']:.4f} | {change['percent_of_dense']:.1f}% | "
                f"{lost:.0%} ± {error:.0%} | {change['lost']:.1%}, {change['won']:.1%}"
            )
        lines.append(f"| {Path(entry['name']).name} | {entry['parameters']:,} | {' | '.join(cells)} |")
    return lines


def accuracy(entry: dict[str, Any], name: str) -> dict[str, float]:
    found: dict[str, float] = entry["tasks"][f"local_{name}"]["acc"]
    return found


if __name__ == "__main__":
    main()
