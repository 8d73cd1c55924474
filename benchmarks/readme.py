"""Writes the tables of README.md and of the docs from benchmarks/results: `make figures`.

Text between `<!-- NAME:begin -->` and `<!-- NAME:end -->` is replaced; everything else stays.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import coverage_page

from pag_retrofit.tradeoff import NAMES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


_METRICS = {
    "miou": ("mIoU (%)", 100),
    "ods": ("ODS F (%)", 100),
    "abs_rel": ("relative error of depth (%, lower is better)", 100),
    "mean": ("mean angle (degrees, lower is better)", 1),
}
_VARIANTS = {
    "reference": "dense, trained on equally long",
    "default": "default: one budget term, residual branches, collapsed bypass",
    "layer_kl": "a KL term per gate (the paper)",
    "identity": "identity bypass",
    "coarse": "coarse bypass",
    "conv": "scope `conv`, identity bypass (the paper)",
    "conv_collapsed": "scope `conv`, collapsed bypass",
    "conv_coarse": "scope `conv`, coarse bypass",
    "weight_40": "sparsity weight 40 instead of 10",
    "dial": "one network for all budgets (the dial)",
}
_BYPASSES = ("_collapsed", "_coarse")
"""What the results of a recipe that was run with the other bypass, too, end with."""
_OWN_GRADIENT = "_own_gradient"
"""Those of gates that were trained with the sparsity loss's own gradient."""
_GATE_LR = "_gate_lr"
"""Those of gates with `gated.gate_lr=5e-2`."""
_TASKS = ("segmentation", "boundaries", "depth", "normals")
"""In the order of tables; others come after them."""
_NEAR = 0.02
"""Measured compute that is no further from the budget is not told."""
_FAR = 0.05
"""Calibration that had to close more than this is told."""
_UNLIKE = 0.04
"""Networks whose compute differs by more are not compared at the same compute."""
_RIVALS = ("reference", "layer", "random", "grid", "truncation", "resizing")
_KINDS = {"dense": "dense", "reference": "dense, trained on equally long"} | NAMES


def replace_block(text: str, name: str, content: str) -> str:
    """Put content between the two markers of a name.

    Raises:
        ValueError: A marker is missing.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{begin} ... {end} is not in the text: put both markers where it belongs")
    return pattern.sub(lambda _: f"{begin}\n{content.strip()}\n{end}", text)


def summary_table(results: dict[str, Any]) -> str:
    """Dense, equally long trained dense and gated networks, one row each."""
    dense, reference = results["dense"], results["reference"]
    lines = [
        f"CamVid ({results['images']} held-out images, {results['input']}), U-Net with an ImageNet "
        f"MobileNetV2 encoder, {results['total_macs'] / 1e9:.2f} GMACs; the gated networks start "
        f"from the dense one. The fair comparison is the dense network that was trained on "
        f"equally long ({results['gated_epochs']} more epochs, same schedule).",
        "",
        "| network | measured compute | mIoU | against dense, equally long |",
        "|---|---:|---:|---:|",
        f"| dense | 1 | {_percent(dense['miou'])} | |",
        f"| dense, trained on equally long | 1 | {_percent(reference['miou'])} | |",
    ]
    for run in results["gated"]:
        change = 100 * (run["miou"] - reference["miou"])
        lines.append(
            f"| gated, budget {run['budget']:g} | {run['fraction']:.3f} | "
            f"{_percent(run['miou'])} | {change:+.2f} |"
        )
    lines += [
        "",
        f"One seed ({results['seed']}), last weights (none picked on the validation images). "
        f"{results['gateable_share']:.1%} of the MACs lie inside sites; the floor is "
        f"{results['floor']:.3f}. `make bench` repeats it; commits and machine stand in "
        "`benchmarks/results/camvid_mobilenetv2.json`; [more](docs/camvid.md).",
    ]
    return "\n".join(lines)


def class_table(results: dict[str, Any]) -> str:
    """Intersection over union by class."""
    columns = [("dense", results["dense"]), ("equally long", results["reference"])]
    columns += [(f"gated {run['budget']:g}", run) for run in results["gated"]]
    lines = ["| class | " + " | ".join(name for name, _ in columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for name in results["dense"]["iou"]:
        cells = " | ".join(_percent(run["iou"][name]) for _, run in columns)
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def latency_table(results: dict[str, Any], source: str, short: bool = False) -> str:
    """Per network: the fastest dense runtime, and the deployed network at each density.

    `source` says where the rest stands, and what repeats it; the short table has each network once.
    """
    facts = results["environment"]
    densities = ("1", "0.7", "0.5", "0.3", "0.1")
    lines = [
        "Milliseconds of the fastest dense runtime (of eager, channels_last, `torch.compile` with "
        "frozen weights, ONNX Runtime, OpenVINO; all float32), and of the deployed network with "
        "made-up masks that leave a share of every gate's pixels open. In brackets the speed-up "
        "and the compute fraction, which holds all that no gate saves.",
        "",
        "| network, input, threads | fastest dense | " + " | ".join(densities) + " |",
        "|---|---:|" + "---:|" * len(densities),
    ]
    seen: set[str] = set()
    for run in results["runs"].values():
        if run["pattern"] != "blobs" or (short and run["model"] in seen):
            continue
        seen.add(run["model"])
        dense = [v for v in run["variants"] if v["dense"]]
        best = min(dense, key=lambda v: v["milliseconds"])
        by_name = {v["name"]: v for v in run["variants"]}
        cells = []
        for density in densities:
            v = by_name[f"deployed blobs {density}"]
            cells.append(f"{_milliseconds(v)} ({v['speed_up']:.2f}x, {v['fraction']:.2f})")
        size = _size(run["input"])
        network = f"{run['model'].partition(':')[2]}, {size}, {run['threads']}"
        lines.append(f"| {network} | {_milliseconds(best)} {best['name']} | {' | '.join(cells)} |")
    packages = ", ".join(
        f"{k} {facts['packages'][k]}" for k in ("torch",) if k in facts["packages"]
    )
    lines += [
        "",
        f"Medians of an interleaved run on {facts.get('cpu') or facts.get('processor', 'one CPU')}"
        f" ({packages}); spread, all runtimes and efficiency stand in {source}",
    ]
    return "\n".join(lines)


def _size(shape: list[int]) -> str:
    """Height and width of an image; of several, all of the shape."""
    return "x".join(map(str, shape[2:] if shape[0] == 1 else shape))


def efficiency_table(results: dict[str, Any]) -> str:
    """Per network: speed-up times compute fraction at each density, and with its own open gates."""
    densities = ("1", "0.7", "0.5", "0.3", "0.1")
    lines = [
        "| network, input, threads, masks | " + " | ".join(densities) + " | own gates, all open |",
        "|---|" + "---:|" * (len(densities) + 1),
    ]
    for run in results["runs"].values():
        by_name = {v["name"]: v for v in run["variants"]}
        names = [f"deployed {run['pattern']} {density}" for density in densities]
        cells = [f"{by_name[name]['efficiency']:.2f}" for name in (*names, "deployed gates")]
        size = _size(run["input"])
        name = f"{run['model'].partition(':')[2]}, {size}, {run['threads']}, {run['pattern']}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def trained_table(results: dict[str, Any]) -> str:
    """Networks of the CamVid recipe with the gates that they were trained to have."""
    lines = [
        "| network | compute on this image | fastest dense (ms) | deployed (ms) | speed-up |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, run in results["trained"].items():
        dense = min((v for v in run["variants"] if v["dense"]), key=lambda v: v["milliseconds"])
        (own,) = (v for v in run["variants"] if v["name"] == "deployed gates")
        lines.append(
            f"| {name} | {own['fraction']:.3f} | {_milliseconds(dense)} {dense['name']} | "
            f"{_milliseconds(own)} | {own['speed_up']:.2f}x |"
        )
    return "\n".join(lines)


def multipool_table(results: dict[str, Any]) -> str:
    """Per recipe: mean and spread over seeds of each stage."""
    names = {
        "dense": "dense, before",
        "reference": "dense, trained on equally long",
        "average": "all dilations everywhere, averaged",
        "gated-1.00": "one dilation per pixel",
    }
    lines = []
    for recipe in dict.fromkeys(run["name"] for run in results["runs"]):
        runs = [run for run in results["runs"] if run["name"] == recipe]
        seeds = ", ".join(str(run["seed"]) for run in runs)
        lines += [
            f"`recipes/{recipe}.yaml`, seeds {seeds}, {runs[0]['epochs']} epochs each after the "
            f"dense network, {runs[0]['stages']['dense']['images']} held-out images:",
            "",
            "| network | measured compute | mIoU of each seed | mean |",
            "|---|---:|---:|---:|",
        ]
        for stage, name in names.items():
            scores = [run["stages"][stage]["miou"] for run in runs]
            fraction = statistics.mean(run["stages"][stage]["fraction"] for run in runs)
            each = ", ".join(map(_percent, scores))
            lines.append(
                f"| {name} | {fraction:.3f} | {each} | {_percent(statistics.mean(scores))} |"
            )
        lines += ["", "Share of pixels that chose each dilation (first seed):", ""]
        shares = runs[0]["branch_shares"]
        factors = list(next(iter(shares.values())))
        lines += [
            "| convolution | " + " | ".join(factors) + " |",
            "|---|" + "---:|" * len(factors),
        ]
        for site, share in shares.items():
            lines.append(f"| {site} | " + " | ".join(f"{share[f]:.2f}" for f in factors) + " |")
        lines.append("")
    return "\n".join(lines)


def tradeoff_table(results: dict[str, Any]) -> str:
    """Per recipe: every network at every budget; what has a note is folded away at the end."""
    own = {name: run for name, run in results.items() if not run.get("note")}
    # Those of gated networks alone stand in the bypass table.
    noted = {
        name: run
        for name, run in results.items()
        if run.get("note") and {p["kind"] for p in run["points"]} - {"dense", "reference", "gated"}
    }
    tasks = list(dict.fromkeys(_TASKS) | dict.fromkeys(run["task"] for run in own.values()))
    lines = []
    for name, run in sorted(own.items(), key=lambda entry: tasks.index(entry[1]["task"])):
        lines += [f"### {name}", "", *_budgets_table(name, run), ""]
    lines += ["<details>", "<summary>With another bypass, or begun with other networks</summary>"]
    for name, run in noted.items():
        lines += ["", *_budgets_table(name, run)]
    return "\n".join([*lines, "", "</details>"])


def _budgets_table(name: str, run: dict[str, Any]) -> list[str]:
    """A row per kind of network, a column per budget, scores of each seed in the cells."""
    if run["task"] == "multitask":
        return _multitask_lines(name, run)
    shown, factor = _METRICS[run["metric"]]
    points = run["points"]
    kinds = sorted({p["kind"] for p in points}, key=list(_KINDS).index)
    budgets = sorted({p["budget"] for p in points} - {None}, reverse=True)
    head = "".join(f" {budget:g} |" for budget in budgets)
    lines = [_recipe_line(name, shown, run)]
    for kind in ("dense", "reference"):
        scores = [factor * p["metric"] for p in points if p["kind"] == kind]
        if scores:
            lines.append(f"{_KINDS[kind].capitalize()}: {_each(scores)}.")
    lines += ["", f"| network |{head}", "|---|" + "---:|" * len(budgets)]
    best = {budget: _best(points, budget, "lower" in shown) for budget in budgets}
    for kind in kinds:
        if kind not in NAMES:
            continue
        cells = [_cell(points, kind, budget, factor, best[budget]) for budget in budgets]
        lines.append(f"| {_KINDS[kind]} | {' | '.join(cells)} |")
    return lines + (_times_lines(points, kinds, budgets) if any(p["times"] for p in points) else [])


def _cell(points: list[dict[str, Any]], kind: str, budget: float, factor: int, best: Any) -> str:
    """Each seed's score, the measured compute if it is not the budget, and where training ended."""
    found = [p for p in points if (p["kind"], p["budget"]) == (kind, budget)]
    if not found:
        return ""
    scores = _each([factor * p["metric"] for p in found])
    fraction = statistics.mean(p["fraction"] for p in found)
    off = f" at {fraction:.2f}" if abs(fraction - budget) > _NEAR else ""
    trained = max((p.get("trained") or p)["fraction"] for p in found)
    left = f" from {trained:.2f}" if trained > fraction + _FAR else ""
    return (f"**{scores}**" if any(p is best for p in found) else scores) + off + left


def _each(scores: list[float]) -> str:
    return ", ".join(f"{score:.2f}" for score in scores)


def _best(points: list[dict[str, Any]], budget: float, lower: bool) -> Any:
    """What scores best with the first seed that a budget was run with; None if nothing else was."""
    found = [p for p in points if p["budget"] == budget]
    if len({p["kind"] for p in found}) == 1:
        return None
    seed = min(p["seed"] for p in found)
    choose = min if lower else max
    return choose((p for p in found if p["seed"] == seed), key=lambda point: point["metric"])


def _times_lines(points: list[dict[str, Any]], kinds: list[str], budgets: list[float]) -> list[str]:
    """Milliseconds of the deployed networks, and of the fastest other runtime if one was tried."""
    columns = [None, *budgets]
    lines = [
        "",
        "| milliseconds, deployed / fastest other runtime | no budget |"
        + "".join(f" {budget:g} |" for budget in budgets),
        "|---|" + "---:|" * len(columns),
    ]
    for kind in kinds:
        cells = []
        for budget in columns:
            found = [p["times"] for p in points if (p["kind"], p["budget"]) == (kind, budget)]
            times = dict(next(filter(None, found), {}))
            both = (times.pop("deployed", None), _least(times))
            shown = ["-" if ms is None else f"{ms:.0f}" for ms in both]
            cells.append(" / ".join(shown) if any(both) else "")
        if any(cells):
            lines.append(f"| {_KINDS[kind]} | {' | '.join(cells)} |")
    return lines


def margins_table(results: dict[str, Any]) -> str:
    """How far PAG is ahead of each baseline: a row per recipe, budget and form of PAG."""
    lines = [
        "| recipe, metric | budget | network | "
        + " | ".join(_KINDS[kind] for kind in _RIVALS)
        + " | its seeds differ by |",
        "|---|---:|---|" + "---:|" * (len(_RIVALS) + 1),
    ]
    own = [(name, run) for name, run in results.items() if not run.get("note")]
    for name, run in sorted(own, key=lambda entry: [*_TASKS, "multitask"].index(entry[1]["task"])):
        budgets = {p["budget"] for p in run["points"]} - {None}
        for budget in sorted(budgets, reverse=True):
            for kind in ("gated", "combined"):
                cells = [_margin(run, kind, budget, rival) for rival in _RIVALS]
                if any(cells[1:]):
                    shown = f"`{name}`, {_METRICS[run['metric']][0].split(' (')[0]}"
                    cells = [shown, f"{budget:g}", _KINDS[kind], *cells, _spread(run, kind, budget)]
                    lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _margin(run: dict[str, Any], kind: str, budget: float, rival: str) -> str:
    """Mean over the seeds that both were run with; empty if there is none."""
    if run["metric"] not in _METRICS:
        return ""
    shown, factor = _METRICS[run["metric"]]
    ours = {p["seed"]: p for p in run["points"] if (p["kind"], p["budget"]) == (kind, budget)}
    asked = None if rival == "reference" else budget
    theirs = {p["seed"]: p for p in run["points"] if (p["kind"], p["budget"]) == (rival, asked)}
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return ""
    sign = -factor if "lower" in shown else factor
    mean = statistics.mean(sign * (ours[k]["metric"] - theirs[k]["metric"]) for k in both)
    compute = statistics.mean(theirs[k]["fraction"] - ours[k]["fraction"] for k in both)
    unlike = "*" if asked and abs(compute) > _UNLIKE else ""
    return f"{mean:+.1f}{unlike}" + (f" ({len(both)})" if len(both) > 1 else "")


def _spread(run: dict[str, Any], kind: str, budget: float) -> str:
    """Between the best and the worst seed; empty if each seed has images of its own."""
    found = [p["metric"] for p in run["points"] if (p["kind"], p["budget"]) == (kind, budget)]
    if len(found) < 2 or run["data"] == "scenes":
        return ""
    return f"{_METRICS[run['metric']][1] * (max(found) - min(found)):.1f}"


def half_table(results: dict[str, Any]) -> str:
    """What half of the compute is best spent on: one row per way, for each of two networks."""
    long, wide = results["camvid_long"], results["camvid_fpn"]
    fewer = results["camvid_mobilenetv2"]["epochs"][1]
    lines = [
        f"The same network with {long['epochs'][1]} epochs instead of {fewer}, at half of the "
        "compute:",
        "",
        *_half_lines(long),
        "",
        f"A feature pyramid (FPN) on the same encoder, whose layers are wider, {wide['epochs'][1]} "
        "epochs:",
        "",
        *_half_lines(wide),
        "",
        "Means over seeds where there are several; one thread. [All budgets, other tasks and what "
        "does not hold](docs/tradeoff.md).",
    ]
    return "\n".join(lines)


def _half_lines(run: dict[str, Any]) -> list[str]:
    """The networks of a recipe that have no budget, or half of the compute."""
    budgets = (None, 0.5)
    lines = [
        "| network | measured compute | mIoU | deployed (ms) | fastest other runtime (ms) |",
        "|---|---:|---:|---:|---:|",
    ]
    chosen = {p["kind"] for p in run["points"] if p["budget"] in budgets} - {"timed"}
    for kind in sorted(chosen, key=list(_KINDS).index):
        found = [p for p in run["points"] if p["kind"] == kind and p["budget"] in budgets]
        scores = [100 * p["metric"] for p in found]
        times = dict(next((p["times"] for p in found if p["times"]), {}))
        cells = [
            _KINDS[kind],
            f"{statistics.mean(p['fraction'] for p in found):.3f}",
            f"{statistics.mean(scores):.2f}" + (f" (of {len(scores)})" if len(scores) > 1 else ""),
            *(
                "" if ms is None else f"{ms:.0f}"
                for ms in (times.pop("deployed", None), _least(times))
            ),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _recipe_line(name: str, shown: str, run: dict[str, Any]) -> str:
    note = f", {run['note']}" if run.get("note") else ""
    recipe = run.get("recipe", name)
    return (
        f"`recipes/{recipe}.yaml`{note}: {shown}, {run['images']} held-out images; "
        f"{run['epochs'][0]} epochs for the dense network, {run['epochs'][1]} more for every other "
        "one."
    )


def _multitask_lines(name: str, run: dict[str, Any]) -> list[str]:
    """One row per network, with a score of each task; one seed."""
    points = sorted(run["points"], key=lambda point: _in_order((point["kind"], point["budget"])))
    columns = [key for key in points[0]["scores"] if _task_metric(key) in _METRICS]
    shown = [f"{key.partition('_')[0]}: {_METRICS[_task_metric(key)][0]}" for key in columns]
    lines = [
        _recipe_line(name, "four tasks by one network", run),
        "",
        "| network | budget | measured compute | " + " | ".join(shown) + " |",
        "|---|---:|---:|" + "---:|" * len(columns),
    ]
    for point in points:
        scores = [_METRICS[_task_metric(key)][1] * point["scores"][key] for key in columns]
        budget = "" if point["budget"] is None else f"{point['budget']:g}"
        cells = [_KINDS[point["kind"]], budget, f"{point['fraction']:.3f}"]
        cells += [f"{score:.2f}" for score in scores]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _task_metric(key: str) -> str:
    return key.partition("_")[2]


def _least(times: dict[str, float]) -> float | None:
    return min(times.values(), default=None)


def bypass_table(results: dict[str, Any]) -> str:
    """Gated networks with either bypass of convolutions, one row per recipe, budget and seed."""
    lines = [
        "| recipe, metric | seed | dense, trained on equally long | budget | collapsed bypass | "
        "coarse bypass |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, run in results.items():
        twins = [results.get(f"{name}{kind}", run) for kind in _BYPASSES]
        if all(twin is run for twin in twins):
            continue
        shown, factor = _METRICS[run["metric"]]
        references = {seed: score for (seed, _), score in _scores(run, "reference").items()}
        before = results.get(f"{name}{_OWN_GRADIENT}", run)  # both bypasses with one loss
        collapsed, coarse = (
            _scores(twin, "gated") | (_scores(before, "gated") if twin is run else {})
            for twin in twins
        )
        for seed, budget in sorted(collapsed.keys() & coarse.keys(), key=lambda k: (k[0], -k[1])):
            dense = f"{factor * references[seed]:.2f}" if seed in references else ""
            gated = (f"{factor * twin[seed, budget]:.2f}" for twin in (collapsed, coarse))
            lines.append(
                f"| `{name}`, {shown} | {seed} | {dense} | {budget:g} | {' | '.join(gated)} |"
            )
    return "\n".join(lines)


def gated_twins_table(results: dict[str, Any], kind: str, other: str, usual: str) -> str:
    """Gated networks trained otherwise, and as usual, one row per recipe, seed and budget.

    Args:
        results: By name.
        kind: What the names of those trained otherwise end with.
        other: Heading of theirs.
        usual: Heading of those of the name without that.
    """
    lines = [
        f"| recipe, metric | seed | budget | {other} | {usual} |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, run in results.items():
        if not name.endswith(kind):
            continue
        shown, factor = _METRICS[run["metric"]]
        after = _scores(results[name.removesuffix(kind)], "gated")
        for (seed, budget), score in sorted(
            _scores(run, "gated").items(), key=lambda item: (item[0][0], -item[0][1])
        ):
            lines.append(
                f"| `{run['recipe']}`, {shown} | {seed} | {budget:g} | {factor * score:.2f} | "
                f"{factor * after[seed, budget]:.2f} |"
            )
    return "\n".join(lines)


def _scores(run: dict[str, Any], kind: str) -> dict[tuple[int, Any], float]:
    """Seed, budget -> metric of one kind of network."""
    points = [point for point in run["points"] if point["kind"] == kind]
    return {(point["seed"], point["budget"]): point["metric"] for point in points}


def ablation_table(results: dict[str, Any]) -> str:
    """Per recipe: every variant at every budget, each seed and their mean."""
    lines = []
    for name, run in results.items():
        shown, factor = _METRICS[run["metric"]]
        seeds = sorted({row["seed"] for row in run["rows"]})
        lines += [
            f"`recipes/{name}.yaml`, {shown}, seeds {', '.join(map(str, seeds))}; all variants "
            "start from one dense network:",
            "",
            f"| variant | budget | measured compute | {shown}, each seed | mean |",
            "|---|---:|---:|---:|---:|",
        ]
        groups = dict.fromkeys((row["variant"], row["budget"]) for row in run["rows"])
        for variant, budget in groups:
            rows = [r for r in run["rows"] if (r["variant"], r["budget"]) == (variant, budget)]
            scores = [factor * row["metric"] for row in rows]
            lines.append(
                f"| {_VARIANTS[variant]} | {'' if budget is None else f'{budget:g}'} | "
                f"{statistics.mean(row['fraction'] for row in rows):.3f} | "
                f"{', '.join(f'{score:.2f}' for score in scores)} | {statistics.mean(scores):.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


def _in_order(stage: tuple[str, float | None]) -> tuple[float, int]:
    kind, budget = stage
    return (-2.0 if budget is None else -budget, list(_KINDS).index(kind))


def time_budget_table(results: dict[str, Any]) -> str:
    """Per network: what `time_fraction` tells, and what the clock says."""
    densities = sorted({r["density"] for r in results["rows"] if r["density"]}, reverse=True)
    names = dict.fromkeys(row["network"] for row in results["rows"])
    lines = [
        "| network | " + " | ".join(f"{d:g} open" for d in densities) + " | its own gates |",
        "|---|" + "---:|" * (len(densities) + 1),
    ]
    for name in names:
        cells = []
        for density in (*densities, None):
            found = [
                row
                for row in results["rows"]
                if (row["network"], row["density"]) == (name, density)
            ]
            cells.append(f"{found[0]['told']:.2f} / {found[0]['clocked']:.2f}" if found else "")
        lines.append(f"| {name.removeprefix('smp:').removeprefix('timm:')} | {' | '.join(cells)} |")
    lines += [
        "",
        "Time told from the masks / measured, both as fractions of the deployed network without "
        f"gates; blobs of open pixels, one thread of {results['environment']['cpu']} "
        "(`python benchmarks/time_budget.py --trained runs/camvid_long`).",
    ]
    return "\n".join(lines)


def memory_table(results: dict[str, Any]) -> str:
    """Per network: the most memory that a pass holds, dense and deployed."""
    lines = [
        "| network, input | dense (MB) | deployed, all open | deployed, half open |",
        "|---|---:|---:|---:|",
    ]
    cases = dict.fromkeys((run["model"], tuple(run["input"])) for run in results["runs"])
    for model, shape in cases:
        peaks = [
            run["peak"]
            for run in results["runs"]
            if (run["model"], tuple(run["input"])) == (model, shape)
        ]
        size = "x".join(map(str, shape[2:]))
        cells = [f"{peak:.0f} ({peak / peaks[0]:.2f}x)" for peak in peaks[1:]]
        lines.append(
            f"| {model.partition(':')[2]}, {size} | {peaks[0]:.0f} | {' | '.join(cells)} |"
        )
    held = max(run["before"] for run in results["runs"])
    lines += [
        "",
        f"What libraries hold, and is not counted, is up to {held:.0f} MB in each process.",
    ]
    return "\n".join(lines)


def roofline_table(results: dict[str, Any], timed: dict[str, Any], options: str = "") -> str:
    """Per network and density: time by kind of call, the least, and the efficiency of that."""
    limits = results["limits"]
    lines = [
        "| network, open pixels | convolutions (ms) | at the least | of that by compute alone | "
        "by memory alone | lists, halos, masks (ms) | the rest (ms) | efficiency | at the least |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in results["runs"]:
        kinds = {name: 1e3 * seconds for name, seconds in run["kinds"].items()}
        masks = sum(kinds.get(name, 0) for name in ("list", "halo", "combine", "gate"))
        rest = sum(kinds.values()) - masks - kinds["convolution"]
        least = [1e3 * run[key] for key in ("least", "least_by_compute", "least_by_memory")]
        size = _size(run["input"])
        variants = _variants(timed, run["model"], run["input"])
        dense = min(v["milliseconds"] for v in variants.values() if v["dense"])
        own = variants[f"deployed blobs {run['density']:g}"]
        most = dense * own["fraction"] / (least[0] + masks + rest)
        lines.append(
            f"| {run['model'].partition(':')[2]}, {size}, {run['density']:g} | "
            f"{kinds['convolution']:.1f} | {' | '.join(f'{x:.1f}' for x in least)} | "
            f"{masks:.1f} | {rest:.1f} | {own['efficiency']:.2f} | {most:.2f} |"
        )
    lines += [
        "",
        f"The best convolution does {limits['macs_per_second'] / 1e9:.0f} GMAC/s, memory is read "
        f"at {limits['bytes_per_second'] / 1e9:.0f} GB/s, by two threads together at "
        f"{limits['bytes_per_second_of_two'] / 1e9:.0f}, on {results['environment']['cpu']} "
        f"(`python benchmarks/roofline.py{options}`). The last column is the efficiency if all "
        "convolutions took their least and the other columns stayed as they are.",
    ]
    return "\n".join(lines)


def _variants(timed: dict[str, Any], model: str, shape: list[int]) -> dict[str, Any]:
    """What was timed of a network with one thread and patches of open pixels, by name."""
    size = "x".join(map(str, shape))
    run = timed["runs"][f"{model} {size} threads=1 blobs"]
    return {variant["name"]: variant for variant in run["variants"]}


def kernels_table(results: dict[str, Any]) -> str:
    """Per layer shape: dense time, and the efficiency of the kernels."""
    columns = ("all", *(f"blobs {d}" for d in (0.7, 0.5, 0.3, 0.1)), "random 0.5")
    heads = [name.replace("blobs ", "") for name in columns]
    lines = [
        f"| layer | dense (ms) | {' | '.join(heads)} |",
        "|---|---:|" + "---:|" * len(columns),
    ]
    for layer in results["layers"]:
        times = layer["times"]
        dense = min(times[key]["ms"] for key in ("dense contiguous", "dense channels_last"))
        cells = " | ".join(f"{times[key]['efficiency']:.2f}" for key in columns)
        lines.append(f"| {layer['shape']['name']} | {dense:.2f} | {cells} |")
    lines += ["", f"{results['machine']['processor']}, torch {results['machine']['torch']}."]
    return "\n".join(lines)


def compression_table(results: dict[str, Any]) -> str:
    """Per network and instruction set: time with whole numbers, and errors both ways."""
    networks = next(iter(results["runs"].values()))
    densities = list(networks[0]["densities"])
    lines = [
        f"| network | instructions | {' | '.join(densities)} | error | in float32 |",
        "|---|---|" + "---:|" * (len(densities) + 2),
    ]
    for name, runs in results["runs"].items():
        for run in runs:
            rows = run["densities"].values()
            cells = [f"{row['compressed']:.1f} ({_change(row)})" for row in rows]
            errors = [max(row[f"{way}_error"] for row in rows) for way in ("compressed", "float32")]
            cells += [f"{error:.1e}" for error in errors]
            network = f"{run['model'].partition(':')[2]}, {_size(run['input'])}"
            lines.append(f"| {network} | {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "Milliseconds with weights as whole numbers at each share of open pixels, and how that "
        "differs from all weights in float32, side by side; the largest error, relative to the "
        f"largest output, against float64. {results['environment']['cpu']}, one thread "
        "(`python benchmarks/compression.py`).",
    ]
    return "\n".join(lines)


def _change(row: dict[str, float]) -> str:
    return f"{100 * (row['compressed'] / row['float32'] - 1):+.0f} %"


def _milliseconds(variant: dict[str, Any]) -> str:
    time = variant["milliseconds"]
    return f"{time:.0f}" if time >= 20 else f"{time:.1f}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def matching_table(results: dict[str, Any]) -> str:
    """Scores of boundaries and their time by how pixels are matched."""
    ways = {
        "flow": "as many as can be, by a maximum flow (the package)",
        "alike": "as many as can be, by an assignment",
        "cheapest": "the cheapest assignment of distances (the original)",
    }
    lines = [
        "| pixels matched | ODS | OIS | AP | CPU seconds an image |",
        "|---|---:|---:|---:|---:|",
    ]
    for way, label in ways.items():
        scores = results[way]
        cells = " | ".join(f"{scores[name]:.4f}" for name in ("ods", "ois", "ap"))
        lines.append(f"| {label} | {cells} | {scores['seconds']:.1f} |")
    lines += [
        "",
        f"Gradient magnitudes of {results['images']} images of BSDS500 at {results['thresholds']} "
        f"thresholds, {results['environment']['cpu']}, one core (`python benchmarks/matching.py`).",
    ]
    return "\n".join(lines)


def _blocks() -> dict[str, dict[str, str]]:
    """Page -> block -> its content."""
    camvid, timed = _read("camvid_mobilenetv2"), _read("latency")
    on_xeon, on_zen4 = _read("latency_xeon"), _read("latency_zen4")
    summary = summary_table(camvid)
    source = "`benchmarks/results/latency.json`. `make latency` repeats it"
    picture = (
        "![Image, label, prediction and compute map of CamVid frames](docs/images/camvid_panel.png)"
    )
    return {
        "README.md": {
            "camvid-table": summary,
            "camvid-picture": picture,
            "half-table": half_table(_read("tradeoff")),
            "coverage-table": coverage_page.summary(_read("coverage"), _read("coverage_deployed")),
            "latency-table": latency_table(
                timed, f"{source}; [more](docs/deployment.md).", short=True
            ),
            "xeon-latency-table": latency_table(
                on_xeon, "`benchmarks/results/latency_xeon.json`.", short=True
            ),
        },
        "docs/camvid.md": {
            "camvid-table": summary.replace("; [more](docs/camvid.md)", ""),
            "camvid-classes": class_table(camvid),
        },
        "docs/deployment.md": {
            "latency-table": latency_table(timed, f"{source}."),
            "efficiency-table": efficiency_table(timed),
            "xeon-latency-table": latency_table(on_xeon, "`benchmarks/results/latency_xeon.json`."),
            "xeon-efficiency-table": efficiency_table(on_xeon),
            "zen4-latency-table": latency_table(on_zen4, "`benchmarks/results/latency_zen4.json`."),
            "zen4-efficiency-table": efficiency_table(on_zen4),
            "trained-table": trained_table(timed),
            "memory-table": memory_table(_read("memory")),
            "roofline-table": roofline_table(_read("roofline"), timed),
            "xeon-roofline-table": roofline_table(
                _read("roofline_xeon"), on_xeon, " --results benchmarks/results/roofline_xeon.json"
            ),
            "zen4-roofline-table": roofline_table(
                _read("roofline_zen4"), on_zen4, " --results benchmarks/results/roofline_zen4.json"
            ),
        },
        "docs/multipool.md": {"multipool-table": multipool_table(_read("multipool"))},
        "docs/kernels.md": {
            "kernels-table": kernels_table(_read("kernels")),
            "xeon-kernels-table": kernels_table(_read("kernels_xeon")),
            "zen4-kernels-table": kernels_table(_read("kernels_zen4")),
            "compression-table": compression_table(_read("compression")),
        },
        "docs/tradeoff.md": {
            "margins-table": margins_table(_read("tradeoff")),
            "tradeoff-table": tradeoff_table(_read("tradeoff")),
        },
        "docs/ablations.md": {
            "ablation-table": ablation_table(_read("ablation")),
            "bypass-table": bypass_table(_read("tradeoff")),
            "gradient-table": gated_twins_table(
                _read("tradeoff"), _OWN_GRADIENT, "its own gradient", "that of temperature one"
            ),
            "gate-lr-table": gated_twins_table(_read("tradeoff"), _GATE_LR, "5e-2", "2e-2"),
        },
        "docs/method.md": {"time-budget-table": time_budget_table(_read("time_budget"))},
        "docs/tasks.md": {"matching-table": matching_table(_read("matching"))},
    }


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def render(root: Path = ROOT) -> dict[Path, str]:
    """Texts of the generated files, by path."""
    pages = {}
    for name, blocks in _blocks().items():
        text = (root / name).read_text(encoding="utf-8")
        for block, content in blocks.items():
            text = replace_block(text, block, content)
        pages[root / name] = text
    return pages


def main() -> None:
    """Write the files; with `--check`, only tell whether they are up to date."""
    changed = []
    for path, text in render().items():
        if path.read_text(encoding="utf-8") != text:
            changed.append(path)
            if "--check" not in sys.argv:
                path.write_text(text, encoding="utf-8")
    if changed and "--check" in sys.argv:
        sys.exit(f"not up to date: {[path.name for path in changed]}; run make figures")


if __name__ == "__main__":
    main()
