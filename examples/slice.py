"""A smaller model of a stock class: 25% of the parameters gone, from a directory, a hub id or `llama`.

python examples/slice.py [MODEL [TEXT]]
"""

import sys

import slimlm


def main(model: str = "llama", text: str = "self", output: str = "llama-slice-25", **settings: int | bool) -> None:
    recipe = slimlm.one_step(model=model, method="slice", sparsity=0.25, dataset=text, output_dir=output, **settings)
    result = slimlm.compress(recipe, overwrite=True)
    sizes, measured = result.manifest["parameters"], result.manifest["measured"]
    print(f"{sizes['dense']:,} parameters -> {sizes['compressed']:,}, in {result.output_dir}")
    if measured:
        print(f"perplexity {measured['dense']['perplexity']:.2f} -> {measured['compressed']['perplexity']:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
