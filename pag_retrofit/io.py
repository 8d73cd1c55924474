"""Saving gated networks as safetensors and JSON, and loading them without running what they say.

A checkpoint names the network by its timm or SMP name and arguments; names are looked up in the
libraries' own registries, nothing else is ever imported or unpickled.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pag_retrofit.calibration import budget_mode, set_budget
from pag_retrofit.config import RetrofitConfig
from pag_retrofit.errors import CheckpointError, PagError
from pag_retrofit.gates import NetworkTimes, named_gates, state_of, use_times
from pag_retrofit.resizing import ResizedInput, resize_input, restore_input
from pag_retrofit.surgery import remove, retrofit

logger = logging.getLogger(__name__)

FORMAT = 1
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
METADATA_KEY = "pag_retrofit"

# Arguments that make the libraries fetch or unpickle files.
_FORBIDDEN = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
_NO_WEIGHTS = {"timm": "pretrained", "smp": "encoder_weights"}


@dataclass(frozen=True)
class ModelSpec:
    """How to build a network anew, without weights.

    Args:
        library: `"timm"` or `"smp"`.
        name: Of a timm model, or of an SMP architecture such as `"Unet"`.
        arguments: Keyword arguments, as JSON knows them. Those that would fetch pretrained
            weights are dropped.

    Raises:
        CheckpointError: The library or an argument is not allowed.
    """

    library: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the fields; names are checked by `build`, which imports the library."""
        if self.library not in _NO_WEIGHTS:
            raise CheckpointError(f"library={self.library!r}: expected one of {list(_NO_WEIGHTS)}")
        forbidden = sorted(_FORBIDDEN & set(self.arguments))
        if forbidden:
            raise CheckpointError(
                f"arguments {forbidden} of {self.name} would load other files: leave them out and "
                "load the weights yourself"
            )
        try:
            plain = json.loads(json.dumps(self.arguments))
        except TypeError as error:
            raise CheckpointError(
                f"arguments of {self.name}: expected values that JSON knows ({error})"
            ) from error
        plain.pop(_NO_WEIGHTS[self.library], None)
        object.__setattr__(self, "arguments", plain)

    def build(self) -> nn.Module:
        """Build the network with fresh weights and note this specification on it.

        Raises:
            CheckpointError: The library does not know the name, or refuses the arguments.
        """
        build = _timm_builder if self.library == "timm" else _smp_builder
        try:
            model = build(self.name)(**self.arguments)
        except PagError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{self.library} cannot build {self.name!r} with {self.arguments}: {error}"
            ) from error
        return self.attach(model)

    def attach(self, model: nn.Module) -> nn.Module:
        """Note this specification on a network, so that its checkpoints can name it."""
        model.pag_spec = self  # type: ignore[assignment]
        return model

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"library": self.library, "name": self.name, "arguments": self.arguments}


def _timm_builder(name: str) -> Callable[..., nn.Module]:
    import timm

    if not timm.is_model(name):
        raise CheckpointError(f"name={name!r}: timm {timm.__version__} has no such model")
    return lambda **arguments: timm.create_model(name, pretrained=False, **arguments)


def _smp_builder(name: str) -> Callable[..., nn.Module]:
    import segmentation_models_pytorch as smp

    known = {key.lower(): value for key, value in smp.MODEL_ARCHITECTURES_MAPPING.items()}
    if name.lower() not in known:
        names = sorted(architecture.__name__ for architecture in known.values())
        raise CheckpointError(f"name={name!r}: expected an SMP architecture, one of {names}")
    architecture: Callable[..., nn.Module] = known[name.lower()]

    def build(**arguments: Any) -> nn.Module:
        _check_encoder(arguments.get("encoder_name"))
        return architecture(encoder_weights=None, **arguments)

    return build


def _check_encoder(name: Any) -> None:
    """Allow only encoders that the libraries list: timm would fetch `hf-hub:` names."""
    import segmentation_models_pytorch as smp
    import timm

    known = name is None or name in smp.encoders.get_encoder_names()
    # Older names of networks that are timm's: `timm-regnetx_002` and the like.
    known = known or smp.encoders.is_equivalent_to_timm_universal(str(name))
    if not known and not (str(name).startswith("tu-") and timm.is_model(str(name)[3:])):
        raise CheckpointError(
            f"encoder_name={name!r}: expected one of SMP's encoders, or tu- and a timm model"
        )


Settings = dict[str, dict[str, Any]]
"""Module -> attribute -> value."""


def _spec_and_settings(model: nn.Module) -> tuple[ModelSpec | None, Settings]:
    """The specification of a network, and attributes in which it differs from what that builds.

    Such as a drop rate: neither the representation of a module nor its tensors tell them all.
    """
    original = copy.deepcopy(model)
    if hasattr(original, "pag_state"):
        remove(original)
    noted = getattr(restore_input(original), "pag_spec", None)
    candidate = noted if isinstance(noted, ModelSpec) else _guess_spec(original)
    if candidate is None:
        return None, {}
    rebuilt = _rebuilt(candidate)
    if rebuilt is not None and _looks_like(rebuilt, original):
        return candidate, _different_settings(original, rebuilt)
    if candidate is noted:
        return candidate, {}
    logger.warning(
        "%s %s was built with arguments that it does not tell: what is saved can be loaded with "
        "model=, which takes the ungated network; ModelSpec(...).attach(network) notes them",
        candidate.library,
        candidate.name,
    )
    return None, {}


def _rebuilt(spec: ModelSpec) -> nn.Module | None:
    """The network of a specification, without memory if it can be built so; None if not at all."""
    try:
        with torch.device("meta"):
            return spec.build()
    except CheckpointError:  # some look at values
        pass
    try:
        with torch.random.fork_rng(devices=[]):
            return spec.build()
    except CheckpointError:
        return None


def _looks_like(one: nn.Module, other: nn.Module) -> bool:
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (one, other)]
    return type(one) is type(other) and repr(one) == repr(other) and shapes[0] == shapes[1]


def _different_settings(original: nn.Module, rebuilt: nn.Module) -> Settings:
    """Attributes of numbers, words and the like that both networks have with other values."""
    found: Settings = {}
    for (path, mine), theirs in zip(original.named_modules(), rebuilt.modules(), strict=True):
        for name, value in vars(theirs).items():
            own = vars(mine).get(name, value)
            if _is_setting(name, value) and _is_setting(name, own) and own != value:
                found.setdefault(path, {})[name] = own
    return found


def _is_setting(name: str, value: Any) -> bool:
    """Whether an attribute is one that a file may set: no tensor, no function, nothing private."""
    if name.startswith("_") or name == "training":
        return False
    if isinstance(value, tuple):
        return all(_is_setting(name, item) for item in value)
    return value is None or type(value) in (bool, int, float, str)


def _apply_settings(network: nn.Module, settings: Settings) -> None:
    """Set what `_different_settings` found."""
    for path, attributes in settings.items():
        module = network.get_submodule(path)
        for name, value in attributes.items():
            value = tuple(value) if isinstance(value, list) else value
            if not (_is_setting(name, value) and _is_setting(name, vars(module)[name])):
                raise ValueError(f"{path}.{name}={value!r}: not a setting of the network")
            setattr(module, name, value)


def _guess_spec(model: nn.Module) -> ModelSpec | None:
    arguments = getattr(model, "_hub_mixin_config", None)
    try:
        if arguments is not None and type(model).__module__.startswith("segmentation_models"):
            return ModelSpec("smp", type(model).__name__, dict(arguments))
        timm_config = getattr(model, "pretrained_cfg", None)
        if isinstance(timm_config, dict) and timm_config.get("architecture"):
            classes = getattr(model, "num_classes", None)
            known = {} if classes is None else {"num_classes": classes}
            return ModelSpec("timm", timm_config["architecture"], known)
    except CheckpointError:
        return None
    return None


def save_pretrained(gated: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write `model.safetensors` and `config.json` into a directory, which is made if missing.

    Raises:
        PagError: The network is not gated, or it is deployed.
    """
    description = _describe(gated)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(gated)
    description["sha256"] = _digest(tensors)
    text = json.dumps(description, indent=2, sort_keys=True) + "\n"
    _replace(
        {
            folder / WEIGHTS_NAME: _tensor_writer(tensors, {"format": "pt"}),
            folder / CONFIG_NAME: lambda path: path.write_text(text, encoding="utf-8"),
        }
    )


def save_file(gated: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write one safetensors file whose metadata holds everything that `load_file` needs.

    Raises:
        PagError: The network is not gated, or it is deployed.
    """
    description = _describe(gated)
    tensors = _tensors(gated)
    description["sha256"] = _digest(tensors)
    text = json.dumps(description, sort_keys=True)
    _replace({Path(path): _tensor_writer(tensors, {"format": "pt", METADATA_KEY: text})})


def from_pretrained(
    directory: str | os.PathLike[str], *, model: nn.Module | None = None
) -> nn.Module:
    """Load what `save_pretrained` wrote; outputs are bit-identical to the saved network's.

    Args:
        directory: With `model.safetensors` and `config.json`.
        model: The ungated network, for one that neither timm nor SMP can rebuild; it is copied.

    Returns:
        The gated network in evaluation mode, on the CPU or on the device of `model`.

    Raises:
        CheckpointError: A file is missing, damaged or tampered with, or belongs to another network.
    """
    folder = Path(directory)
    try:
        text = (folder / CONFIG_NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: cannot be read ({error}); expected a directory written by "
            "save_pretrained()"
        ) from error
    tensors, _ = _read(folder / WEIGHTS_NAME)
    return _restore(text, tensors, model, str(folder))


def load_file(path: str | os.PathLike[str], *, model: nn.Module | None = None) -> nn.Module:
    """Load what `save_file` wrote; see `from_pretrained`.

    Raises:
        CheckpointError: The file is missing, damaged or tampered with, or belongs to another
            network.
    """
    tensors, notes = _read(Path(path))
    if METADATA_KEY not in notes:
        raise CheckpointError(
            f"{path}: its metadata has no {METADATA_KEY!r}, so it is not a gated network written "
            "by save_file(); a directory written by save_pretrained() is read by from_pretrained()"
        )
    return _restore(notes[METADATA_KEY], tensors, model, str(path))


def _describe(gated: nn.Module) -> dict[str, Any]:
    if getattr(gated, "pag_deployed", False):
        raise PagError(
            "a deployed network cannot be saved: save the gated network that it was made from, and "
            "deploy it after loading"
        )
    state = state_of(gated)
    spec, settings = _spec_and_settings(gated)
    return {
        "format": FORMAT,
        "versions": {name: metadata.version(name) for name in ("torch", "timm", "pag-retrofit")},
        "model": spec.to_dict() if spec else None,
        "settings": settings,
        "class": type(gated).__name__,
        "resized_input": list(gated.pag_resized) if isinstance(gated, ResizedInput) else None,
        "retrofit": state.config.to_dict(),
        "budget": state.budget,
        "example_shape": list(state.example_shape),
        "total_macs": state.total_macs,
        "gateable_macs": _gateable_macs(gated),
        "sites": [name for name, _ in named_gates(gated)],
        "operating_points": sorted(state.operating_points.items()),
        "active_budget": state.active_budget,
        "mode": budget_mode(gated),
        "open_rates": sorted(state.open_rates.items()),
        "times": None if state.times is None else dataclasses.asdict(state.times),
    }


def _restore(
    text: str, tensors: dict[str, Tensor], model: nn.Module | None, source: str
) -> nn.Module:
    try:
        description = json.loads(text)
        if description["format"] != FORMAT:
            raise CheckpointError(
                f"{source}: format {description['format']!r}, this release reads {FORMAT}; "
                "upgrade pag-retrofit"
            )
        if description["sha256"] != _digest(tensors):
            raise CheckpointError(
                f"{source}: the tensors do not match their recorded checksum; the file was changed "
                "or damaged after it was saved"
            )
        config = RetrofitConfig.from_dict(description["retrofit"])
        gated = retrofit(
            _network(description, model, source),
            description["budget"],
            example_input=tuple(description["example_shape"]),
            # This release may know of more sites than the one that saved it.
            config=config.only(description["sites"]),
            inplace=True,
        )
        _check_sites(gated, description, source)
        _load_tensors(gated, tensors, source)
        state = state_of(gated)
        state.config = config
        state.rho = state.budget
        state.operating_points = {float(b): float(o) for b, o in description["operating_points"]}
        rates = description.get("open_rates", [])  # files of earlier releases lack them
        state.open_rates = {
            float(b): {str(site): float(rate) for site, rate in of.items()} for b, of in rates
        }
        if description.get("times") is not None:  # files of earlier releases lack it
            use_times(gated, NetworkTimes.from_dict(description["times"]))
        if description["active_budget"] is not None:
            # Files of earlier releases lack the mode.
            set_budget(gated, description["active_budget"], description.get("mode", "average"))
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{source}: its description is damaged or belongs to another network "
            f"({type(error).__name__}: {error})"
        ) from error
    return gated.eval()


def _network(description: dict[str, Any], model: nn.Module | None, source: str) -> nn.Module:
    spec = description["model"]
    if model is not None:
        network = restore_input(copy.deepcopy(model))
    elif spec is not None:
        network = ModelSpec(spec["library"], spec["name"], spec["arguments"]).build()
        _apply_settings(network, description.get("settings", {}))
    else:
        raise CheckpointError(
            f"{source}: it holds a {description['class']} that is neither a timm nor an SMP "
            "network, or one whose arguments were not known; pass the ungated network as model="
        )
    resized = description.get("resized_input")  # files of earlier releases lack it
    if resized is None:
        return network
    share, multiple = resized
    shape = tuple(description["example_shape"])
    return resize_input(network, share, example_input=shape, multiple=multiple)


def _check_sites(gated: nn.Module, description: dict[str, Any], source: str) -> None:
    sites = [name for name, _ in named_gates(gated)]
    # Not of the whole network: heads are replaced. Files of earlier releases hold that alone.
    if "gateable_macs" in description:
        same = _gateable_macs(gated) == description["gateable_macs"]
    else:
        same = state_of(gated).total_macs == description["total_macs"]
    if sites != description["sites"] or not same:
        different = sorted(set(sites) ^ set(description["sites"]))
        raise CheckpointError(
            f"{source}: belongs to another network: it was saved with {len(description['sites'])} "
            f"sites of {description.get('gateable_macs', 'other')} MACs, this one has {len(sites)} "
            f"of {_gateable_macs(gated)} (different: {different[:5]}); pass the same network, or "
            f"use the library versions it was saved with: {description['versions']}"
        )


def _gateable_macs(gated: nn.Module) -> int:
    state = state_of(gated)
    return round(state.gateable_share * state.total_macs)


def _load_tensors(gated: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    own = gated.state_dict()
    missing, unexpected = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    reshaped = [k for k in own if k in tensors and own[k].shape != tensors[k].shape]
    if missing or unexpected or reshaped:
        raise CheckpointError(
            f"{source}: belongs to another network: missing {missing[:5]}, unexpected "
            f"{unexpected[:5]}, of another shape {reshaped[:5]} ({len(missing)}, "
            f"{len(unexpected)} and {len(reshaped)} in all)"
        )
    for name, tensor in (*gated.named_parameters(), *gated.named_buffers()):
        if name in tensors:
            tensor.data = tensor.data.to(tensors[name].dtype)  # a network saved in half precision
    own.update(tensors)  # it knows the versions of modules, some of which load nothing without
    gated.load_state_dict(own)


def _tensors(gated: nn.Module) -> dict[str, Tensor]:
    """State dict on the CPU, one memory block per tensor, as safetensors wants it."""
    tensors = {}
    seen: set[int] = set()
    for name, tensor in gated.state_dict().items():
        plain = tensor.detach().cpu().contiguous()
        pointer = plain.untyped_storage().data_ptr()
        tensors[name] = plain.clone() if pointer in seen else plain
        seen.add(pointer)
    return tensors


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
        return safetensors.torch.load_file(path), notes
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({error}); it may be truncated, or saved by "
            "another format"
        ) from error


def _tensor_writer(tensors: dict[str, Tensor], notes: dict[str, str]) -> Callable[[Path], None]:
    return lambda path: safetensors.torch.save_file(tensors, path, notes)


def _replace(writers: dict[Path, Callable[[Path], Any]]) -> None:
    """Write all files beside their places, then take the places: a failure leaves the old ones."""
    temporaries: dict[Path, Path] = {}
    folders = [str(path) for path in writers if path.is_dir()]
    if folders:
        raise PagError(f"cannot write {folders[0]}: it is a folder; expected the name of a file")
    missing = sorted({str(path.parent) for path in writers if not path.parent.is_dir()})
    if missing:
        raise PagError(f"cannot write {list(map(str, writers))}: there is no folder {missing[0]}")
    try:
        for path, write in writers.items():
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            os.close(handle)
            temporaries[path] = Path(name)
            write(temporaries[path])
            temporaries[path].chmod(0o644)
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
