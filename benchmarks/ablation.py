"""What each choice of the method is worth: runs variants of a recipe, writes the figures.

    python benchmarks/ablation.py recipes/scenes_tradeoff.yaml runs/ablation

All variants start from the dense network of the first seed and differ from the recipe in one
choice. What is complete is not run again. Adds to benchmarks/results/ablation.json, from which
`make figures` writes the table of docs/ablations.md.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from pag_retrofit.checkpoints import write_json
from pag_retrofit.io import WEIGHTS_NAME
from pag_retrofit.recipe import load_recipe
from pag_retrofit.stages import environment, finetune

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "ablation.json"
VARIANTS: dict[str, tuple[str, ...]] = {
    "reference": ("stages=[reference]",),
    "default": (),
    "layer_kl": ("gated.sparsity.kind=layer",),
    "identity": ("gated.retrofit={bypass: identity}",),
    "coarse": ("gated.retrofit={bypass: coarse}",),
    "conv": ("gated.retrofit={scope: conv}",),
    "conv_collapsed": ("gated.retrofit={scope: conv, bypass: collapsed}",),
    "conv_coarse": ("gated.retrofit={scope: conv, bypass: coarse}",),
    "weight_40": ("gated.sparsity.weight=40",),
    "dial": ("stages=[dial]",),
}
"""Name -> overrides of the recipe."""


def run_variant(path: Path, name: str, seed: int, overrides: list[str]) -> list[dict[str, Any]]:
    """One row per budget; a dense network's is None."""
    rows = []
    recipe = load_recipe(path, overrides)
    for stage, metrics in finetune(recipe).items():
        found = {metrics["budget"]: metrics["final"]}
        if stage == "dial":
            found = {float(key): final for key, final in metrics["operating_points"].items()}
        rows += [
            {
                "variant": name,
                "seed": seed,
                "budget": budget,
                "fraction": final["fraction"],
                "floor": metrics.get("floor", 1.0),
                "metric": final[metrics["metric"]],
            }
            for budget, final in found.items()
        ]
    return rows


def main() -> None:
    """Run, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("output", type=Path, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output = arguments.output.resolve()
    recipe = load_recipe(arguments.recipe, [f"output={output}", "stages=[dense]"])
    metric = finetune(recipe)["dense"]["metric"]
    rows = []
    for seed in arguments.seeds:
        for name in arguments.variants:
            overrides = [
                f"seed={seed}",
                f"gated.budgets={arguments.budgets}",
                f"output={output / f'{name}-{seed}'}",
                f"model.checkpoint={output / 'dense' / WEIGHTS_NAME}",
                "stages=[gated]",
                *VARIANTS[name],
            ]
            rows += run_variant(arguments.recipe, name, seed, overrides)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    before = results.get(recipe.name, {"rows": []})["rows"]
    done = {(row["variant"], row["seed"], row["budget"]) for row in rows}
    rows += [r for r in before if (r["variant"], r["seed"], r["budget"]) not in done]
    rows.sort(key=lambda r: (list(VARIANTS).index(r["variant"]), -(r["budget"] or 2), r["seed"]))
    results[recipe.name] = {"metric": metric, "rows": rows, "environment": environment()}
    write_json(RESULTS, results)


if __name__ == "__main__":
    main()
