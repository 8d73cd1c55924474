"""The command line: `pag-retrofit finetune`, `evaluate` and `plan`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pag_retrofit.errors import PagError

app = typer.Typer(
    help="Gate a pretrained CNN, fine-tune it to a compute budget, evaluate it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Rich takes 80 columns where there is no terminal: too few for the tables.
_out = Console(width=None if sys.stdout.isatty() else 120)
_err = Console(stderr=True)

RecipeFile = Annotated[Path, typer.Argument(help="YAML recipe", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="values over the recipe, such as gated.budgets=[0.9,0.7]"),
]


def main() -> None:
    """Runs the command line; errors of the package end it with one message and status 1."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("pag_retrofit").setLevel(logging.INFO)
    try:
        app()
    except PagError as error:
        _err.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        _err.print(str(error), markup=False, highlight=False)
        sys.exit(1)


@app.command()
def finetune(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Runs the stages of a recipe; a run that was interrupted goes on where it stood."""
    from pag_retrofit.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    # Only now: reading a wrong recipe should not take the seconds of these imports.
    from pag_retrofit.processes import process_state
    from pag_retrofit.stages import finetune as run

    results = run(loaded)
    if process_state().is_main_process:
        _out.print(_results_table(results))
        _out.print(f"results are in {loaded.output}", highlight=False)
    process_state().destroy_process_group()


@app.command()
def evaluate(
    path: Annotated[
        Path,
        typer.Argument(
            help="safetensors file, or folder of a stage or of save_pretrained", metavar="PATH"
        ),
    ],
    recipe: RecipeFile,
    overrides: Overrides = None,
    budget: Annotated[float | None, typer.Option(help="operating point of a gated network")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Scores a dense or gated network on the validation images of a recipe."""
    from pag_retrofit.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from pag_retrofit.evaluation import evaluate_file

    evaluation = evaluate_file(path, loaded, budget=budget)
    if as_json:
        _out.print_json(data=evaluation.to_dict())
        return
    table = Table("metric", "value")
    for name in ("miou", "pixel_accuracy", "fraction", "images", "seconds"):
        table.add_row(name, f"{evaluation.to_dict()[name]:.4g}")
    for name, value in evaluation.metrics["iou"].items():
        table.add_row(f"IoU {name}", "absent" if value is None else f"{value:.4g}")
    _out.print(table)


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="library:name, such as smp:Unet or timm:resnet50")],
    input_shape: Annotated[str, typer.Option("--input", help="such as 1x3x384x480")],
    argument: Annotated[
        list[str] | None, typer.Option(help="name=value for the constructor; repeatable")
    ] = None,
    config: Annotated[
        list[str] | None, typer.Option(help="name=value of RetrofitConfig; repeatable")
    ] = None,
    budget: Annotated[float, typer.Option(help="target compute fraction")] = 0.9,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Lists what would be gated in a network and what not, and why."""
    from pag_retrofit.config import RetrofitConfig
    from pag_retrofit.io import ModelSpec
    from pag_retrofit.planning import plan as make_plan

    library, colon, name = model.partition(":")
    if not colon:
        raise PagError(f"--model {model!r}: expected library:name, such as smp:Unet")
    network = ModelSpec(
        library=library, name=name, arguments=_named("--argument", argument)
    ).build()
    made = make_plan(
        network,
        budget,
        example_input=_shape(input_shape),
        config=RetrofitConfig.from_dict(_named("--config", config)),
    )
    if as_json:
        _out.print_json(data=made.to_dict())
    else:
        _out.print(made.table())


def _named(option: str, items: list[str] | None) -> dict[str, Any]:
    """`name=value` items as a dict, values read as YAML."""
    from pag_retrofit.recipe import parse_value

    named = {}
    for item in items or ():
        name, equals, value = item.partition("=")
        if not name or not equals:
            raise PagError(f"{option} {item!r}: expected name=value")
        named[name] = parse_value(value)
    return named


def _shape(text: str) -> tuple[int, ...]:
    sides = text.split("x")
    if len(sides) != 4 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise PagError(f"--input {text!r}: expected batch x channels x height x width: 1x3x384x480")
    return tuple(int(side) for side in sides)


def _results_table(results: dict[str, dict[str, Any]]) -> Table:
    table = Table("stage", "mIoU", "compute", "best mIoU", "time")
    for name, metrics in results.items():
        final, best = metrics["final"], metrics["best"]
        table.add_row(
            name,
            f"{final['miou']:.4f}",
            f"{final['fraction']:.3f}",
            f"{best['miou']:.4f}" if best else "-",
            f"{metrics['seconds']:.0f} s",
        )
    return table
