"""Writes the tables of README.md and docs/camvid.md from benchmarks/results: `make figures`.

Text between `<!-- NAME:begin -->` and `<!-- NAME:end -->` is replaced; everything else stays.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import coverage_page

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "camvid_mobilenetv2.json"


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


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def render(root: Path = ROOT) -> dict[Path, str]:
    """Texts of the generated files, by path."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    readme, page = root / "README.md", root / "docs" / "camvid.md"
    text = replace_block(readme.read_text(encoding="utf-8"), "camvid-table", summary_table(results))
    picture = (
        "![Image, label, prediction and compute map of CamVid frames](docs/images/camvid_panel.png)"
    )
    text = replace_block(text, "camvid-picture", picture)
    coverage = json.loads(coverage_page.RESULTS.read_text(encoding="utf-8"))
    text = replace_block(text, "coverage-table", coverage_page.summary(coverage))
    details = page.read_text(encoding="utf-8")
    table = summary_table(results).replace("; [more](docs/camvid.md)", "")
    details = replace_block(details, "camvid-table", table)
    details = replace_block(details, "camvid-classes", class_table(results))
    return {readme: text, page: details}


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
