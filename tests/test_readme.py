"""The README's code runs as printed, and its figures are those of benchmarks/results."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import coverage_page  # noqa: E402
import readme  # noqa: E402


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    images = torch.rand(1, 3, 64, 64)
    names = {"batches": [images], "images": images}
    exec(compile(code, "README.md", "exec"), names)
    assert torch.equal(names["again"](images), names["gated"](images))


def test_the_figures_are_those_of_the_results():
    for path, text in readme.render().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run make figures"
    paths = (coverage_page.RESULTS, coverage_page.DEPLOYED)
    results = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    assert coverage_page.PAGE.read_text(encoding="utf-8") == coverage_page.page(*results)


def test_margins_are_over_common_seeds_and_point_upwards():
    def point(kind, seed, budget, fraction, metric):
        return {
            "kind": kind,
            "seed": seed,
            "budget": budget,
            "fraction": fraction,
            "metric": metric,
        }

    points = [
        point("reference", 0, None, 1.0, 0.30),
        *(point("gated", seed, 0.5, 0.50, 0.33 - 0.01 * seed) for seed in range(3)),
        *(point("layer", seed, 0.5, 0.52, 0.35) for seed in (0, 1, 7)),
        point("truncation", 2, 0.5, 0.44, 0.30),
    ]
    run = {"task": "depth", "data": "rgbd", "metric": "abs_rel", "points": points}
    table = readme.margins_table({"walk": run, "other": {**run, "note": "begun anew"}})
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    shown = "`walk`, relative error of depth"
    assert rows == [[shown, "0.5", "PAG", "-3.0", "+2.5 (2)", "", "", "-1.0*", "", "2.0"]]


def test_a_missing_marker_is_named():
    with pytest.raises(ValueError, match="camvid-table:begin"):
        readme.replace_block("no markers here", "camvid-table", "x")


def test_pictures_of_the_pages_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).is_file(), f"{page.name} shows {link}, which is not there"
