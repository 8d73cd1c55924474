"""Checkpoints: bit-identical there and back, and nothing but data is ever read."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import segmentation_models_pytorch as smp
import timm
import torch
from networks import ONE_EACH, CustomNet, randomize
from torch import nn

import pag_retrofit as pag
from pag_retrofit.gates import named_gates

SHAPE = (1, 3, 64, 64)
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
TIMM = pag.ModelSpec("timm", "test_resnet", {"num_classes": 5, "pretrained": True})
SMP = pag.ModelSpec(
    "smp",
    "Unet",
    {
        "encoder_name": "tu-test_resnet",
        "encoder_weights": "imagenet",
        "decoder_channels": [32, 16, 16, 8],
        "encoder_depth": 4,
        "classes": 4,
    },
)
CONFIG = pag.RetrofitConfig(exclude=("*layer1*",), gate=pag.GateConfig(initial_probability=0.9))


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gate a network and move everything, as training would."""
    gated = pag.retrofit(randomize(model, seed), 0.9, example_input=SHAPE, config=CONFIG)
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, gate in named_gates(gated):
            gate.weight.normal_()
            gate.bias.zero_()
        for name, parameter in gated.named_parameters():
            if name.endswith("bypass_weight"):
                parameter.mul_(1.1)
    return gated.eval()


@torch.no_grad()
def assert_same_network(loaded: nn.Module, saved: nn.Module) -> None:
    assert type(loaded) is type(saved) and not loaded.training
    first, second = loaded.state_dict(), saved.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert loaded.pag_state == replace(saved.pag_state, rho=loaded.pag_state.rho)
    assert torch.equal(loaded(X), saved(X))
    with pag.measure(loaded) as ours, pag.measure(saved) as theirs:
        loaded(X), saved(X)
    assert ours.fraction == theirs.fraction < 0.99


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A gated network and a folder with both forms of its checkpoint; copy them."""
    folder = tmp_path_factory.mktemp("saved")
    gated = trained(TIMM.build())
    pag.save_file(gated, folder / "x.safetensors")
    pag.save_pretrained(gated, folder / "saved")
    return gated, folder


@pytest.fixture
def gated(saved: tuple[nn.Module, Path]) -> nn.Module:
    return copy.deepcopy(saved[0])


@pytest.fixture
def no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a checkpoint was unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)


def through_file(gated: nn.Module, folder: Path, model: nn.Module | None = None) -> nn.Module:
    pag.save_file(gated, folder / "x.safetensors")
    return pag.load_file(folder / "x.safetensors", model=model)


def through_directory(gated: nn.Module, folder: Path, model: nn.Module | None = None) -> nn.Module:
    pag.save_pretrained(gated, folder / "new" / "directory")
    assert {p.name for p in (folder / "new" / "directory").iterdir()} == {
        "model.safetensors",
        "config.json",
    }
    return pag.from_pretrained(str(folder / "new" / "directory"), model=model)


WAYS = pytest.mark.parametrize("way", [through_file, through_directory])


# --- round trips ----------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize(
    "build",
    [
        TIMM.build,
        SMP.build,
        lambda: timm.create_model("test_resnet", num_classes=5),
        lambda: timm.create_model("test_efficientnet", num_classes=5),
        lambda: smp.Unet("resnet18", encoder_weights=None, classes=3, activation="sigmoid"),
        lambda: smp.create_model("FPN", "tu-test_resnet", encoder_weights=None, encoder_depth=4),
    ],
    ids=["timm spec", "smp spec", "timm resnet", "timm efficientnet", "smp Unet", "smp FPN"],
)
@pytest.mark.usefixtures("no_pickle")
def test_round_trip(
    way: Callable[..., nn.Module], build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    gated = trained(build())
    assert_same_network(way(gated, tmp_path), gated)


@WAYS
def test_round_trip_of_a_custom_network(way: Callable[..., nn.Module], tmp_path: Path) -> None:
    gated = trained(CustomNet())
    model = CustomNet()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert_same_network(way(gated, tmp_path, model), gated)
    after = model.state_dict()  # the caller's network is copied
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    with pytest.raises(pag.CheckpointError, match="model="):
        way(gated, tmp_path)


@pytest.mark.parametrize(
    "build",
    [
        lambda: timm.create_model("test_resnet", num_classes=5, global_pool="max"),
        lambda: timm.create_model("test_resnet", num_classes=5, act_layer="gelu"),
        lambda: timm.create_model("test_resnet", num_classes=5, output_stride=8),
        lambda: timm.create_model("test_resnet", num_classes=5, in_chans=3, layers=ONE_EACH[:4]),
        lambda: smp.Unet("resnet18", encoder_weights=None, activation=nn.Sigmoid),
        lambda: timm.create_model("nf_regnet_b0", num_classes=5, alpha=0.7),
    ],
    ids=["pooling", "activation", "dilated", "depth", "head class", "an attribute"],
)
def test_a_network_that_its_name_does_not_tell_is_not_rebuilt_wrongly(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    """Either the right network comes back, or the caller is asked for it."""
    gated = trained(build())
    try:
        loaded = through_file(gated, tmp_path)
    except pag.CheckpointError as error:
        assert "model=" in str(error)
        loaded = through_file(gated, tmp_path, build())
    assert_same_network(loaded, gated)


@pytest.mark.filterwarnings("ignore:`timm-` encoders:DeprecationWarning")
@pytest.mark.parametrize("encoder", ["mit_b0", "timm-regnetx_002"])
def test_encoders_that_look_at_values_or_have_older_names_come_back(
    encoder: str, tmp_path: Path
) -> None:
    gated = trained(smp.Unet(encoder, encoder_weights=None, decoder_channels=(32, 16, 16, 8, 8)))
    before = torch.random.get_rng_state()
    pag.save_file(gated, tmp_path / "gated.safetensors")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert_same_network(pag.load_file(tmp_path / "gated.safetensors"), gated)


def test_saving_tells_that_arguments_are_not_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pag.save_file(trained(timm.create_model("test_resnet", act_layer="gelu")), tmp_path / "a")
    assert "timm test_resnet was built with arguments that it does not tell" in caplog.text
    assert "model=" in caplog.text
    caplog.clear()
    pag.save_file(trained(timm.create_model("test_resnet")), tmp_path / "b")
    assert "arguments" not in caplog.text


@WAYS
def test_settings_that_a_name_does_not_tell_survive(
    way: Callable[..., nn.Module], tmp_path: Path
) -> None:
    gated = trained(timm.create_model("test_resnet", num_classes=5, drop_rate=0.4))
    loaded = way(gated, tmp_path)
    assert loaded.drop_rate == 0.4
    assert_same_network(loaded, gated)


def test_a_file_sets_nothing_but_settings(tmp_path: Path) -> None:
    gated = trained(timm.create_model("test_resnet", num_classes=5, drop_rate=0.4))
    pag.save_pretrained(gated, tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert '"drop_rate": 0.4' in text
    for bad in ('"forward": 0.4', '"_modules": 0.4', '"unknown": 0.4', '"drop_rate": {}'):
        (tmp_path / "config.json").write_text(text.replace('"drop_rate": 0.4', bad))
        with pytest.raises(pag.CheckpointError, match="damaged or belongs to another"):
            pag.from_pretrained(tmp_path)


@WAYS
def test_the_head_may_be_another_one_than_when_gates_came_in(
    way: Callable[..., nn.Module], tmp_path: Path
) -> None:
    gated = trained(timm.create_model("test_resnet", num_classes=5))
    gated.reset_classifier(3)  # type: ignore[operator]
    loaded = way(gated, tmp_path)
    assert torch.equal(loaded(X), gated(X)) and loaded(X).shape == (len(X), 3)
    with pag.measure(loaded) as measured:
        loaded(X)
    assert loaded.pag_state.total_macs * len(X) == measured.total_macs


@WAYS
def test_the_mode_of_the_budget_survives(way: Callable[..., nn.Module], tmp_path: Path) -> None:
    gated = trained(timm.create_model("test_resnet", num_classes=5))
    pag.calibrate(gated, [X], [0.9])
    pag.set_budget(gated, 0.9, mode="per_image")
    assert_same_network(way(gated, tmp_path), gated)


@WAYS
def test_operating_points_survive(
    way: Callable[..., nn.Module], gated: nn.Module, tmp_path: Path
) -> None:
    pag.calibrate(gated, [X], (0.95, 0.9, 0.85))
    loaded = way(gated, tmp_path)
    assert loaded.pag_state.active_budget == 0.85
    assert loaded.pag_state.operating_points == gated.pag_state.operating_points
    for budget in (0.95, 0.9):
        pag.set_budget(gated, budget)
        pag.set_budget(loaded, budget)
        assert_same_network(loaded, gated)


def test_a_loaded_network_saves_as_the_same_files(gated: nn.Module, tmp_path: Path) -> None:
    loaded = through_directory(gated, tmp_path)
    pag.save_pretrained(loaded, tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        first = (tmp_path / "new" / "directory" / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == first


def test_the_retrofit_configuration_survives(gated: nn.Module, tmp_path: Path) -> None:
    loaded = through_file(gated, tmp_path)
    assert loaded.pag_state.config == CONFIG
    assert loaded.pag_state.example_shape == SHAPE
    assert loaded.pag_spec == TIMM


def test_a_release_that_finds_more_sites_gates_those_of_the_file(
    gated: nn.Module, directory: Path
) -> None:
    """As if the sites that were excluded when it was saved had not been known then."""
    edit(directory, lambda d: d["retrofit"].update(exclude=[], min_share=0))
    loaded = pag.from_pretrained(directory)
    assert [name for name, _ in named_gates(loaded)] == [name for name, _ in named_gates(gated)]
    assert loaded.pag_state.config == replace(CONFIG, exclude=(), min_share=0)
    assert torch.equal(loaded(X), gated(X))


@torch.no_grad()
def test_a_branch_too_light_to_gate_stays_out_of_the_way(tmp_path: Path) -> None:
    """A RepGhost module holds a light branch of the module's own name, which is gated whole."""
    model = timm.create_model("repghostnet_050", features_only=True).eval()
    gated = pag.retrofit(model, example_input=(1, 3, 96, 96))
    pag.save_file(gated, tmp_path / "gated.safetensors")
    loaded = pag.load_file(tmp_path / "gated.safetensors", model=model)
    x = torch.rand(1, 3, 96, 96)
    assert all(torch.equal(a, b) for a, b in zip(loaded(x), gated.eval()(x), strict=True))


@torch.no_grad()
def test_the_dtype_survives(gated: nn.Module, tmp_path: Path) -> None:
    gated.to(torch.bfloat16)
    loaded = through_file(gated, tmp_path)
    x = X.to(torch.bfloat16)
    assert torch.equal(loaded(x), gated(x))


# --- damage ---------------------------------------------------------------------------------------


@pytest.fixture
def file(saved: tuple[nn.Module, Path], tmp_path: Path) -> Path:
    return Path(shutil.copy(saved[1] / "x.safetensors", tmp_path))


@pytest.fixture
def directory(saved: tuple[nn.Module, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[1] / "saved", tmp_path / "saved"))


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, -1000, -1])
def test_a_truncated_file_is_refused(file: Path, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(pag.CheckpointError, match="x.safetensors"):
        pag.load_file(file)


@pytest.mark.parametrize("place", [0.999, 0.7, 0.4])
def test_a_flipped_bit_is_refused(file: Path, directory: Path, place: float) -> None:
    for path, load in (
        (file, lambda: pag.load_file(file)),
        (directory / "model.safetensors", lambda: pag.from_pretrained(directory)),
    ):
        content = bytearray(path.read_bytes())
        content[int(len(content) * place)] ^= 4
        path.write_bytes(content)
        with pytest.raises(pag.CheckpointError, match="checksum"):
            load()


def smp_unet(encoder: Any) -> dict[str, Any]:
    return {"library": "smp", "name": "Unet", "arguments": {"encoder_name": encoder}}


def edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "config.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda d: d.update(format=99), "format 99"),
        (lambda d: d.pop("format"), "format"),
        (lambda d: d.pop("sha256"), "sha256"),
        (lambda d: d["retrofit"].update(version=99), "version"),
        (lambda d: d["retrofit"].update(hook="os.system"), "hook"),
        (lambda d: d["retrofit"].update(scope="everything"), "scope"),
        (lambda d: d["sites"].pop(), "another network"),
        (lambda d: d["sites"].append("fc"), "sites"),
        (lambda d: d.update(sites=7), "damaged"),
        (lambda d: d.update(gateable_macs=1), "MACs"),
        (lambda d: d.pop("gateable_macs") and d.update(total_macs=1), "MACs"),  # older files
        (lambda d: d.update(settings=[]), "damaged"),
        (lambda d: d.update(settings={"fc": 1}), "damaged"),
        (lambda d: d.update(budget="cheap"), "budget"),
        (lambda d: d.update(budget=0.0001), "floor"),
        (lambda d: d.update(example_shape="large"), "example_input"),
        (lambda d: d.update(example_shape=[1, 3, 10**9, 10**9]), "damaged"),
        (lambda d: d.update(operating_points=[["a", "b"]]), "damaged"),
        (lambda d: d.update(active_budget=0.123), "0.123"),
        (lambda d: d.update(resized_input=[2.0, 32]), "share=2.0"),
        (lambda d: d.update(resized_input=[0.5, 10**9]), "multiple="),
        (lambda d: d.update(resized_input=[0.5, "x"]), "multiple="),
        (lambda d: d.update(resized_input=7), "damaged"),
        (lambda d: d.update(model=None), "model="),
        (lambda d: d.update(model=[]), "damaged"),
        (lambda d: d["model"].update(name="os.system"), "os.system"),
        (lambda d: d["model"].update(name="resnet18"), "another network|sites"),
        (lambda d: d["model"].update(name="hf-hub:someone/something"), "hf-hub"),
        (lambda d: d["model"].update(name="local-dir:/tmp"), "local-dir"),
        (lambda d: d["model"].update(name=7), "7|damaged"),
        (lambda d: d["model"].update(library="os"), "library='os'"),
        (lambda d: d["model"].update(library=["timm"]), "library|damaged"),
        (lambda d: d["model"].update(arguments={"checkpoint_path": "x"}), "checkpoint_path"),
        (lambda d: d["model"].update(arguments={"pretrained_cfg": {}}), "pretrained_cfg"),
        (lambda d: d["model"].update(arguments={"num_classes": -1}), "cannot build|another"),
        (lambda d: d["model"].update(arguments=["num_classes"]), "cannot build|damaged"),
        (lambda d: d.update(model=smp_unet("tu-local-dir:elsewhere")), "no such|expected"),
        (lambda d: d.update(model=smp_unet("tu-hf-hub:some/thing")), "no such|expected"),
        (lambda d: d.update(model=smp_unet(["resnet18"])), "resnet18"),
        (lambda d: d.update(model={"library": "smp", "name": "__class__"}), "damaged"),
    ],
)
def test_an_edited_description_is_refused(
    directory: Path,
    change: Callable[[dict[str, Any]], Any],
    word: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a checkpoint made the library look something up")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    edit(directory, change)
    with pytest.raises(pag.CheckpointError, match=word) as caught:
        pag.from_pretrained(directory)
    assert "looked something up" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"text"', "[" * 100_000, "{}", "\x00"], ids=range(8)
)
def test_a_description_that_is_none_is_refused(directory: Path, text: str) -> None:
    (directory / "config.json").write_text(text)
    with pytest.raises(pag.CheckpointError, match="saved"):
        pag.from_pretrained(directory)


def test_a_description_in_another_encoding_is_refused(directory: Path) -> None:
    (directory / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(pag.CheckpointError, match="config.json"):
        pag.from_pretrained(directory)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(pag.CheckpointError, match=name):
        pag.from_pretrained(directory)


def test_missing_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(pag.CheckpointError, match="nowhere"):
        pag.load_file(tmp_path / "nowhere.safetensors")
    with pytest.raises(pag.CheckpointError, match="nowhere"):
        pag.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(pag.CheckpointError):
        pag.load_file(tmp_path)


def test_a_plain_safetensors_file_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.zeros(3)}, tmp_path / "plain.safetensors")
    with pytest.raises(pag.CheckpointError, match="save_file"):
        pag.load_file(tmp_path / "plain.safetensors")


def test_a_pickle_is_refused(tmp_path: Path, no_pickle: None) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(pag.CheckpointError, match="x.safetensors"):
        pag.load_file(tmp_path / "x.safetensors")


def test_a_checkpoint_of_another_network_is_refused(file: Path, directory: Path) -> None:
    for other in (CustomNet(), timm.create_model("test_resnet", num_classes=7)):
        for load in (
            lambda m: pag.load_file(file, model=m),
            lambda m: pag.from_pretrained(directory, model=m),
        ):
            with pytest.raises(pag.CheckpointError, match=r"sites|another network"):
                load(other)


def test_swapped_weights_are_refused(directory: Path, tmp_path: Path) -> None:
    pag.save_pretrained(trained(TIMM.build(), seed=1), tmp_path / "other")
    weights = (tmp_path / "other" / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(weights)
    with pytest.raises(pag.CheckpointError, match="checksum"):
        pag.from_pretrained(directory)


# --- writing --------------------------------------------------------------------------------------


class DiskFullError(OSError):
    pass


def fail_halfway(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Make a function write something and then fail."""

    def broken(*arguments: Any, **_: Any) -> None:
        for argument in arguments:
            if isinstance(argument, Path):
                argument.write_bytes(b"half")
        raise DiskFullError("no space left")

    monkeypatch.setattr(owner, name, broken)


def test_a_failed_save_leaves_the_old_file(
    gated: nn.Module, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_bytes()
    files = set(file.parent.iterdir())
    fail_halfway(monkeypatch, safetensors.torch, "save_file")
    with pytest.raises(DiskFullError):
        pag.save_file(trained(TIMM.build(), seed=1), file)
    assert file.read_bytes() == before
    assert set(file.parent.iterdir()) == files


@pytest.mark.parametrize("step", ["weights", "description"])
def test_a_failed_save_leaves_the_old_directory(
    gated: nn.Module, directory: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = trained(TIMM.build(), seed=1)
    with monkeypatch.context() as patch:
        if step == "weights":
            fail_halfway(patch, safetensors.torch, "save_file")
        else:
            fail_halfway(patch, Path, "write_text")
        with pytest.raises(DiskFullError):
            pag.save_pretrained(other, directory)
    assert {path.name for path in directory.iterdir()} == {"config.json", "model.safetensors"}
    assert_same_network(pag.from_pretrained(directory), gated)


def test_saving_asks_for_a_gated_network(tmp_path: Path) -> None:
    with pytest.raises(pag.PagError, match="not a gated network"):
        pag.save_file(CustomNet(), tmp_path / "x.safetensors")
    with pytest.raises(pag.PagError, match="not a gated network"):
        pag.save_pretrained(CustomNet(), tmp_path / "new")
    gated = trained(timm.create_model("test_resnet", num_classes=5))
    with pytest.raises(pag.PagError, match="there is no folder .*nowhere"):
        pag.save_file(gated, tmp_path / "nowhere" / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_metadata_tells_what_is_inside(file: Path) -> None:
    with safetensors.safe_open(file, framework="pt") as content:
        description = json.loads(content.metadata()["pag_retrofit"])
    assert description["model"] == {
        "library": "timm",
        "name": "test_resnet",
        "arguments": {"num_classes": 5},
    }
    assert set(description["versions"]) == {"torch", "timm", "pag-retrofit"}
    assert description["budget"] == 0.9


# --- specifications -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("evil", "x"), "library='evil'"),
        (("timm", "resnet18", {"checkpoint_path": "x"}), "checkpoint_path"),
        (("timm", "resnet18", {"act_layer": nn.ReLU}), "JSON"),
    ],
)
def test_a_wrong_specification_is_named(arguments: tuple[Any, ...], word: str) -> None:
    with pytest.raises(pag.CheckpointError, match=word):
        pag.ModelSpec(*arguments)


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        (pag.ModelSpec("timm", "resnet1800"), "resnet1800"),
        (pag.ModelSpec("timm", "hf-hub:timm/resnet18.a1_in1k"), "no such model"),
        (pag.ModelSpec("smp", "Unett"), "Unett"),
        (pag.ModelSpec("smp", "Unet", {"encoder_name": "resnet1800"}), "resnet1800"),
        (pag.ModelSpec("timm", "test_resnet", {"num_clases": 3}), "num_clases"),
    ],
)
def test_an_unknown_name_is_named(spec: pag.ModelSpec, word: str) -> None:
    with pytest.raises(pag.CheckpointError, match=word):
        spec.build()


def test_a_specification_never_asks_for_pretrained_weights() -> None:
    assert TIMM.arguments == {"num_classes": 5}
    assert "encoder_weights" not in SMP.arguments
    assert TIMM.build().pag_spec == TIMM


class Versioned(CustomNet):
    """Refuses weights of a version that it does not know."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, known: Any, *others: Any) -> None:
        assert known.get("version") == 2
        super()._load_from_state_dict(state, prefix, known, *others)


def test_modules_are_told_their_version(tmp_path: Path) -> None:
    saved = trained(Versioned())
    pag.save_file(saved, tmp_path / "gated.safetensors")
    assert_same_network(pag.load_file(tmp_path / "gated.safetensors", model=Versioned()), saved)
