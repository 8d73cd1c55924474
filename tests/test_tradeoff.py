"""`pag-retrofit tradeoff`: stages over seeds, times, and curves."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from test_training import RECIPE
from torch import nn

import pag_retrofit as pag
from pag_retrofit import latency
from pag_retrofit.latency import time_networks
from pag_retrofit.recipe import load_recipe
from pag_retrofit.stages import finetune
from pag_retrofit.tradeoff import Point, charts, run_tradeoff


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_stages_over_seeds_are_collected_timed_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compilers of other runtimes take longer than this test may.
    monkeypatch.setattr(latency, "_RUNTIMES", {"eager": latency._RUNTIMES["eager"]})
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(output=tmp_path / "out"))
    settings = ["dense.epochs=1", "gated.epochs=1", "stages=[dense, gated, dial, resizing]"]
    finetune(load_recipe(path, ["dense.epochs=1", "stages=[dense]"]))
    alone = [*settings[:2], "stages=[grid]", "gated.budgets=[0.9]"]
    found = run_tradeoff(load_recipe(path, alone), [0, 3], timed=False)["points"]
    assert [point["seed"] for point in found] == [0, 3]  # both begin with that dense network
    recipe = load_recipe(path, [*settings, "gated.budgets=[0.9, 0.5]"])
    results = run_tradeoff(recipe, [0, 3], rounds=2)
    assert json.loads((tmp_path / "out/tradeoff.json").read_text()) == json.loads(
        json.dumps(results)
    )
    points = [Point(**point) for point in results["points"]]
    stages = ("gated-", "dial@", "resizing-")
    names = [stage + budget for stage in stages for budget in ("0.90", "0.50")]
    assert {p.stage for p in points if p.seed == 3} == set(names)
    assert {p.stage for p in points if p.seed == 0} == {"dense", *names}
    for point in points:
        assert (point.milliseconds is not None) == (point.seed == 0)
        dense = {"eager"} if point.kind in ("dense", "resizing") else set()
        assert point.times.keys() == (set() if point.seed else {"deployed", *dense})
    assert (tmp_path / "out/tradeoff_compute.png").is_file()
    assert (tmp_path / "out/tradeoff_latency.png").is_file()
    assert (tmp_path / "out/seed-3/gated-0.50/model.safetensors").is_file()


def test_dense_networks_alone_are_refused_before_they_are_trained(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(output=tmp_path / "out"))
    recipe = load_recipe(path, ["stages=[dense, reference]"])
    with pytest.raises(pag.RecipeError, match=r"stages=\['dense', 'reference'\].*gated"):
        run_tradeoff(recipe, [0])
    assert not (tmp_path / "out").exists()


def test_curves_are_means_over_seeds() -> None:
    points = [
        Point("dense", "dense", 0, None, 1.0, 0.8, {"eager": 10.0, "deployed": 12.0}),
        Point("gated-0.50", "gated", 0, 0.5, 0.48, 0.70, {"deployed": 6.0}),
        Point("gated-0.50", "gated", 1, 0.5, 0.52, 0.74),
        Point("layer-0.50", "layer", 0, 0.5, 0.5, 0.6, {"deployed": 7.0}),
    ]
    figures = charts(points, "miou", "title")
    compute, latency = (figures[name].axes[0] for name in ("compute", "latency"))
    drawn = [line.get_xydata().tolist() for line in compute.lines]
    assert [[pytest.approx(50.0), pytest.approx(0.72)]] in drawn
    drawn = [line.get_xydata().tolist() for line in latency.lines]
    assert [[pytest.approx(60.0), pytest.approx(0.72)]] in drawn  # one seed was timed
    assert set(charts(points[1:2], "miou", "title")) == {"compute"}


def test_every_runtime_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {name: latency._RUNTIMES[name] for name in ("eager", "channels_last")}
    monkeypatch.setattr(latency, "_RUNTIMES", kept)
    gated = pag.retrofit(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
        1.0,
        example_input=(1, 3, 16, 16),
        config=pag.RetrofitConfig(min_share=0.0),
    ).eval()
    images = [torch.randn(1, 3, 16, 16) for _ in range(2)]
    networks = {"gated": gated, "plain": pag.remove(copy.deepcopy(gated))}
    times = time_networks(networks, images, rounds=3)
    assert times.keys() == networks.keys()
    assert times["gated"].keys() == {"deployed"} and times["plain"].keys() == {"deployed", *kept}
    assert all(milliseconds > 0 for found in times.values() for milliseconds in found.values())
