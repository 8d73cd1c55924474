"""The command line: `pag-retrofit finetune`, `evaluate`, `score`, `plan` and `benchmark`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from pag_retrofit.errors import PagError

if TYPE_CHECKING:
    from pag_retrofit.latency import Comparison

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
    for name, number in evaluation.to_dict().items():
        if isinstance(number, (int, float)):
            table.add_row(name, f"{number:.4g}")
    for metric, by_class in evaluation.metrics.items():
        if isinstance(by_class, dict):  # of one task among several, with its name before it
            title = metric.replace("iou", "IoU").replace("_", " ")
            for name, value in by_class.items():
                table.add_row(f"{title} {name}", "absent" if value is None else f"{value:.4g}")
    _out.print(table)


@app.command()
def tradeoff(
    recipe: RecipeFile,
    overrides: Overrides = None,
    seeds: Annotated[str, typer.Option(help="the first one's folder is the recipe's")] = "0",
    threads: Annotated[int, typer.Option(min=1, help="of the timed networks")] = 1,
    rounds: Annotated[int, typer.Option(min=2, help="how often each network is timed")] = 16,
    timed: Annotated[bool, typer.Option(help="measure times")] = True,
) -> None:
    """Runs a recipe's stages over budgets and seeds; draws quality against compute and time."""
    from pag_retrofit.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    parts = [part.strip() for part in seeds.split(",")]
    if not all(part.isdigit() for part in parts):
        raise PagError(f"--seeds {seeds!r}: expected numbers, such as 0,1")
    from pag_retrofit.tradeoff import run_tradeoff

    numbers = [int(part) for part in parts]
    results = run_tradeoff(loaded, numbers, threads=threads, rounds=rounds, timed=timed)
    table = Table("stage", "seed", results["metric"], "compute", "ms", "runtime")
    for point in results["points"]:
        times = {taken: runtime for runtime, taken in point["times"].items()}
        time, runtime = (f"{min(times):.1f}", times[min(times)]) if times else ("-", "")
        row = (point["stage"], str(point["seed"]), f"{point['metric']:.4f}")
        table.add_row(*row, f"{point['fraction']:.3f}", time, runtime)
    _out.print(table)
    _out.print(f"tradeoff.json and pictures are in {loaded.output}", highlight=False)


@app.command()
def score(
    task: Annotated[str, typer.Argument(help="segmentation, boundaries, depth or normals")],
    predictions: Annotated[Path, typer.Argument(help="folder of png or npy files")],
    ground_truth: Annotated[
        Path, typer.Argument(help="folder of files of the same names; boundaries: of mat files")
    ],
    thresholds: Annotated[int, typer.Option(help="boundaries: number of thresholds")] = 99,
    tolerance: Annotated[
        float, typer.Option(help="boundaries: of matches, as a share of the diagonal")
    ] = 0.0075,
    ignore: Annotated[int, typer.Option(help="segmentation: label that does not count")] = 255,
    depth_scale: Annotated[float, typer.Option(help="depth: png values of a metre")] = 1000.0,
    crop: Annotated[str, typer.Option(help="depth: eigen or garg")] = "",
    workers: Annotated[
        int | None, typer.Option(min=1, help="processes; default one per core")
    ] = None,
) -> None:
    """Scores stored predictions of any method, matched by name; prints JSON."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from pag_retrofit.scoring import ScoreOptions
    from pag_retrofit.scoring import score as run

    options = ScoreOptions(thresholds, tolerance, ignore, depth_scale, crop)
    columns = (f"scoring {task}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_err) as bar:
        row = bar.add_task(task, total=None)
        scores = run(
            task,
            predictions,
            ground_truth,
            options,
            workers=workers,
            progress=lambda done, total: bar.update(row, completed=done, total=total),
        )
    _out.print_json(data=scores)


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


benchmark = typer.Typer(help="Measures on this machine.", no_args_is_help=True)
app.add_typer(benchmark, name="benchmark")


class _SeveralValues(TyperCommand):
    """A command without arguments, some of whose options take several values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, each of those options with all its values as one word."""
        return super().parse_args(ctx, _joined(args, ("--density", "--threads", "--runtimes")))


def _joined(words: Sequence[str], options: Collection[str]) -> list[str]:
    """The words, where values of an option, by spaces or the option itself apart, are by commas."""
    given: dict[str, list[str]] = {}
    rest: list[str] = []
    values = rest
    for word in words:
        name, equals, value = word.partition("=")
        if name in options:
            values = given.setdefault(name, [])
            values += [value] if equals else []
        else:
            values = rest if word.startswith("--") else values
            values.append(word)
    return [*rest, *(f"{name}={','.join(values)}" for name, values in given.items())]


@benchmark.command(cls=_SeveralValues)
def latency(
    model: Annotated[
        str,
        typer.Option(
            help="timm:resnet50, smp:Unet:resnet34 (architecture and encoder; fresh weights), or "
            "the folder or file of a saved gated network"
        ),
    ],
    input_shape: Annotated[str, typer.Option("--input", help="such as 1x3x384x480")],
    density: Annotated[
        str, typer.Option(help="densities of made-up masks, apart by spaces or commas")
    ] = "1.0,0.9,0.7,0.5,0.3,0.1",
    pattern: Annotated[str, typer.Option(help="of made-up masks: blobs, random, rows")] = "blobs",
    threads: Annotated[
        str, typer.Option(help="of every variant; several numbers, such as 1 2, in turn")
    ] = "1",
    rounds: Annotated[int, typer.Option(min=2, help="how often each variant is called")] = 20,
    runtimes: Annotated[
        str, typer.Option(help="dense runtimes to compare with, apart by spaces or commas")
    ] = "eager,channels_last,compile,onnxruntime,openvino",
    backend: Annotated[str, typer.Option(help="of the deployed network")] = "cpu",
    as_json: Annotated[
        bool, typer.Option("--json", help="print JSON; of several numbers of threads a list")
    ] = False,
) -> None:
    """Times a deployed network against dense runtimes of the original one, side by side."""
    import torch

    from pag_retrofit.latency import compare_latency

    shape = _shape(input_shape)
    try:
        densities = [float(part) for part in density.split(",")]
    except ValueError as error:
        raise PagError(f"--density {density!r}: expected numbers, such as 1.0 0.5") from error
    counts = threads.split(",")
    if not all(count.isdecimal() and int(count) for count in counts):
        message = f"{threads!r}: expected whole numbers from 1 on, such as 1 2"
        raise typer.BadParameter(message, param_hint="--threads")
    torch.manual_seed(0)
    with _err.status("building"):
        gated = _gated_network(model, shape)
    image = torch.randn(shape)
    comparisons = []
    for count in counts:
        with _err.status(f"timing, threads: {count}"):
            comparisons.append(
                compare_latency(
                    gated,
                    image,
                    densities=densities,
                    pattern=pattern,
                    runtimes=[name for name in runtimes.split(",") if name],
                    backend=backend,
                    threads=int(count),
                    rounds=rounds,
                )
            )
    if as_json:
        found = [compared.to_dict() for compared in comparisons]
        _out.print_json(data=found if len(found) > 1 else found[0])
        return
    for compared in comparisons:
        _print_comparison(compared)


def _print_comparison(compared: Comparison) -> None:
    columns = ("variant", "ms", "10 % - 90 %", "compute", "speed-up", "efficiency")
    table = Table(*columns, title=f"threads: {compared.threads}")
    for variant in compared.variants:
        table.add_row(
            variant.name,
            f"{variant.milliseconds:.1f}",
            f"{variant.low:.1f} - {variant.high:.1f}",
            f"{variant.fraction:.3f}",
            f"{compared.speed_up(variant):.2f}",
            "" if variant.dense else f"{compared.efficiency(variant):.2f}",
        )
    _out.print(table)
    for name, reason in compared.left_out.items():
        _out.print(f"left out: {name}, {reason}", markup=False, highlight=False)


def _gated_network(name: str, shape: tuple[int, ...]) -> Any:
    """A saved gated network, or a fresh network that is gated where it can be."""
    from pag_retrofit.io import ModelSpec, from_pretrained, load_file
    from pag_retrofit.surgery import retrofit

    path = Path(name)
    if path.exists():
        return from_pretrained(path) if path.is_dir() else load_file(path)
    library, colon, rest = name.partition(":")
    architecture, _, encoder = rest.partition(":")
    if not colon or not rest:
        raise PagError(
            f"--model {name!r}: expected timm:NAME, smp:ARCHITECTURE:ENCODER, or an existing path"
        )
    arguments = {"encoder_name": encoder} if encoder else {}
    network = ModelSpec(library=library, name=architecture, arguments=arguments).build()
    return retrofit(network, 1.0, example_input=shape, inplace=True).eval()


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
    metric = next(iter(results.values()))["metric"]
    shown = {"miou": "mIoU", "mean": "mean angle"}.get(metric, metric)
    table = Table("stage", shown, "compute", f"best {shown}", "time")
    for name, metrics in results.items():
        final, best = metrics["final"], metrics["best"]
        table.add_row(
            name,
            f"{final[metric]:.4f}",
            f"{final['fraction']:.3f}",
            f"{best[metric]:.4f}" if best else "-",
            f"{metrics['seconds']:.0f} s",
        )
    return table
