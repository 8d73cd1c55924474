"""The latency benchmark compares like with like; its figures are not tested, its arithmetic is."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
import torch
from networks import CustomNet, randomize
from torch import nn
from typer.testing import CliRunner

import pag_retrofit as pag
from pag_retrofit import latency
from pag_retrofit.cli import app
from pag_retrofit.latency import Comparison, Latency, compare_latency


@pytest.fixture
def gated() -> nn.Module:
    config = pag.RetrofitConfig(min_share=0)
    model = randomize(CustomNet()).eval()
    return pag.retrofit(model, 1.0, example_input=(1, 3, 32, 32), config=config).eval()


def test_every_variant_is_timed_as_often_and_computes_the_same(gated: nn.Module) -> None:
    threads = torch.get_num_threads()
    compared = compare_latency(
        gated.train(),
        torch.randn(1, 3, 32, 32),
        densities=(1.0, 0.2),
        pattern="random",
        runtimes=("eager", "channels_last"),
        backend="auto",
        rounds=4,
    )
    names = [variant.name for variant in compared.variants]
    assert names == [
        *("eager", "channels_last", "masked gates", "reference gates"),
        *("deployed gates", "deployed random 1", "deployed random 0.2"),
    ]
    assert compared.rounds == 4
    for variant in compared.variants:
        assert 0 < variant.low <= variant.milliseconds <= variant.high
        assert variant.error < 1e-4
        assert variant.dense == (variant.name in ("eager", "channels_last"))
    own, full, sparse = (variant.fraction for variant in compared.variants[4:])
    assert sparse < full == own
    assert torch.get_num_threads() == threads and gated.training
    assert json.loads(json.dumps(compared.to_dict()))["input"] == [1, 3, 32, 32]


def test_speed_up_is_over_the_fastest_dense_runtime() -> None:
    def variant(name: str, dense: bool, milliseconds: float, fraction: float) -> Latency:
        return Latency(name, dense, milliseconds, milliseconds, milliseconds, fraction, 0.0)

    slow, fast = variant("eager", True, 50, 1), variant("openvino", True, 40, 1)
    deployed = variant("deployed", False, 25, 0.5)
    compared = Comparison((slow, fast, deployed), {}, 1, 3, (1, 3, 8, 8))
    assert compared.best_dense is fast
    assert compared.speed_up(deployed) == 40 / 25
    assert compared.efficiency(deployed) == 0.5 * 40 / 25


def test_what_is_not_installed_is_left_out_and_said(
    gated: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "openvino" else found(name)
    )
    x = torch.randn(1, 3, 32, 32)
    runtimes = ("eager", "openvino")
    compared = compare_latency(gated, x, densities=(), runtimes=runtimes, backend="auto", rounds=3)
    assert "openvino is not installed" in compared.left_out["openvino"]
    with pytest.raises(pag.PagError, match="tensorrt"):
        compare_latency(gated, x, runtimes=("tensorrt",))
    with pytest.raises(pag.PagError, match=r"runtimes=\['openvino'\].*not installed"):
        compare_latency(gated, x, runtimes=("openvino",), backend="auto")
    with pytest.raises(pag.PagError, match="rounds=1"):
        compare_latency(gated, x, rounds=1)


def test_only_the_timed_network_is_compiled_with_frozen_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor import config

    frozen = []

    def compiled(model: nn.Module) -> Any:
        return lambda x: frozen.append(config.freezing)

    monkeypatch.setattr(torch, "compile", compiled)
    latency._compiled(nn.Identity(), torch.randn(1, 3, 4, 4), 1)
    assert frozen == [True]
    assert not config.freezing


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["benchmark", "latency", *arguments])


def test_the_command_prints_json_or_a_table(gated: nn.Module, tmp_path: Any) -> None:
    few = ("--runtimes", "eager", "--rounds", "3", "--density", "0.5", "--backend", "auto")
    done = run("--model", "timm:test_resnet", "--input", "1x3x32x32", "--json", *few)
    assert done.exit_code == 0, done.output
    names = [variant["name"] for variant in json.loads(done.stdout)["variants"]]
    assert names == [
        *("eager", "masked gates", "reference gates", "deployed gates", "deployed blobs 0.5")
    ]
    small = pag.ModelSpec("timm", "test_resnet").build().eval()
    saved = pag.retrofit(small, 1.0, example_input=(1, 3, 32, 32))
    pag.save_file(saved, tmp_path / "gated.safetensors")
    done = run("--model", str(tmp_path / "gated.safetensors"), "--input", "1x3x32x32", *few)
    assert "efficiency" in done.output and "deployed gates" in done.output


@pytest.mark.parametrize(
    ("several", "densities", "threads"),
    [
        (("--density", "1.0", "0.5", "--threads", "1", "2"), ["1", "0.5"], [1, 2]),
        (("--density", "1.0,0.5", "--threads=1,2"), ["1", "0.5"], [1, 2]),
        (("--density", "1", "--threads", "2", "--density=0.5", "0.3"), ["1", "0.5", "0.3"], [2]),
    ],
)
def test_options_take_several_values(
    several: tuple[str, ...], densities: list[str], threads: list[int]
) -> None:
    few = ("--runtimes", "eager", "channels_last", "--rounds", "2", "--backend", "auto", "--json")
    done = run("--model", "timm:test_resnet", "--input", "1x3x32x32", *several, *few)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    found = found if len(threads) > 1 else [found]
    assert [comparison["threads"] for comparison in found] == threads
    for comparison in found:
        names = [variant["name"] for variant in comparison["variants"]]
        assert names[:2] == ["eager", "channels_last"]
        assert names[5:] == [f"deployed blobs {density}" for density in densities]


@pytest.mark.parametrize("threads", [("1", "0"), ("1.5",), ("-1",), ("two",), ("\u00b2",), ()])
def test_threads_are_whole_numbers(threads: tuple[str, ...]) -> None:
    done = run("--model", "timm:test_resnet", "--input", "1x3x32x32", "--threads", *threads)
    assert done.exit_code == 2 and "--threads" in done.output
    assert ",".join(threads) in done.output


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--model", "resnet18"), "timm:NAME"),
        (("--model", "timm:resnet18", "--density", "half"), "half"),
        (("--model", "timm:resnet18", "--density"), "--density ''"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[str, ...], word: str) -> None:
    done = run(*arguments, "--input", "1x3x32x32")
    assert isinstance(done.exception, pag.PagError)
    assert word in str(done.exception)
