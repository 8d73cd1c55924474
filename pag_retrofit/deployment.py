"""Deployment: a network as an inference-only module whose time follows its compute."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pag_retrofit.errors import PagError
from pag_retrofit.execution import Program
from pag_retrofit.gates import RetrofitState, count_changes_together, named_gates
from pag_retrofit.kernels import can_record, using, watched
from pag_retrofit.lowering import lower
from pag_retrofit.mapped import MappedWeights
from pag_retrofit.markers import export_marked

BACKENDS = ("auto", "cpu", "reference")
_MOST_PROGRAMS = 16
_EXPORTING = threading.RLock()  # what torch.export patches belongs to the whole process
_MOST_READY = 2  # of these hold the memory of their maps between passes


class _Last(NamedTuple):
    """The program of the last call, if that was with one image tensor and gave one tensor.

    To find the program of arguments of any structure takes longer than small layers do.
    """

    program: Program
    shape: torch.Size


class DeployedNetwork(nn.Module):
    """What `deploy` returns; call it as the gated network was called.

    For each shape of the input that it meets, it makes a program once (this takes as long as
    `plan` does) and keeps the last sixteen. All share their weights; the last two keep the memory
    of their maps. The gated network's own weights wait in a temporary file for new shapes.
    """

    pag_state: RetrofitState
    pag_deployed = True
    _programs: OrderedDict[Any, tuple[Program, Any]]
    _lock: threading.Lock
    _weights: MappedWeights
    _last: _Last | None

    def __init__(self, gated: nn.Module, backend: str):
        """Copy the network."""
        super().__init__()
        with torch.inference_mode(False):  # later passes tell by versions whether gates changed
            self.gated = copy.deepcopy(gated).float().eval().requires_grad_(False)
        self.backend = backend
        if hasattr(self.gated, "pag_state"):
            self.__dict__["pag_state"] = self.gated.pag_state
        self._reset()

    @torch.inference_mode(False)
    def _reset(self) -> None:
        self.__dict__["_programs"] = OrderedDict()
        self.__dict__["_lock"] = threading.Lock()
        count_changes_together(gate for _, gate in named_gates(self.gated))
        self.__dict__["_weights"] = MappedWeights(self.gated)
        self.__dict__["_last"] = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run; arguments and results are those of the gated network in evaluation mode.

        Maps are computed in float32: floating-point inputs of other types are converted.

        Raises:
            PagError: An input is not on the CPU, or the network cannot be exported.
        """
        # Python is slow between kernels, which push it out of the caches: where a pass was recorded
        # for such an input, nothing else is looked at.
        last, shape = self._last, _shape_of_image(args, kwargs)
        if last is not None and shape == last.shape:
            if not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or watched()):
                found = last.program.replay(args)
                if found is not None:
                    return found[0]
        return self._forward(args, kwargs)

    @torch.inference_mode(False)
    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)
    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        last, shape = self._last, _shape_of_image(args, kwargs)
        if last is not None and shape == last.shape:
            with using(self.backend):
                return last.program.run(args)[0]
        leaves, spec = pytree.tree_flatten((args, kwargs))
        leaves = [_float32(leaf) for leaf in leaves]
        program, out_spec = self._program(self._key(leaves, spec), leaves, spec)
        found = _Last(program, shape) if shape is not None and out_spec.is_leaf() else None
        self.__dict__["_last"] = found
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        with using(self.backend):
            results = program.run(tensors)
        return pytree.tree_unflatten(results, out_spec)

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)
    def profile(
        self, *tensors: Tensor, rounds: int = 1
    ) -> list[tuple[str, tuple[Any, ...], float]]:
        """Time every kernel call of a pass, one after the other; native kernels only.

        Args:
            tensors: What `forward` takes.
            rounds: Passes, of which the fastest call counts.

        Returns:
            Kind, what the call was made of (a convolution's `ConvolutionArguments`), and seconds.

        Raises:
            PagError: The network does not run on native kernels.
        """
        leaves, spec = pytree.tree_flatten((tensors, {}))
        leaves = [_float32(leaf) for leaf in leaves]
        with using(self.backend):
            if not can_record():
                raise PagError("profile() times native kernels, and none run here: see deploy()")
            program, _ = self._program(self._key(leaves, spec), leaves, spec)
            return program.time_calls(leaves, rounds)

    def _key(self, leaves: list[Any], spec: Any) -> tuple[Any, ...]:
        """What a program holds for: shapes."""
        kinds = (x.dtype if isinstance(x, Tensor) else type(x) for x in leaves)
        values = (tuple(x.shape) if isinstance(x, Tensor) else x for x in leaves)
        return (spec, *kinds, *values)  # True and 1 are equal

    def _program(self, key: Any, leaves: list[Any], spec: Any) -> tuple[Program, Any]:
        with self._lock:
            found = self._programs.get(key)
            if found is None:
                args, kwargs = pytree.tree_unflatten(leaves, spec)
                found = self._lower(args, kwargs)
                found[0].share_weights(other for other, _ in self._programs.values())
                self._programs[key] = found
                self._weights.leave_memory()
                while len(self._programs) > _MOST_PROGRAMS:
                    self._programs.popitem(last=False)
            self._programs.move_to_end(key)
            for other, _ in list(self._programs.values())[:-_MOST_READY]:
                other.forget()
        return found

    def _lower(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Program, Any]:
        try:
            with _EXPORTING:
                exported = export_marked(self.gated, args, kwargs)
        except Exception as error:
            self._check_taken(args, kwargs)
            line = (str(error).splitlines() or [""])[0][:200]
            raise PagError(
                f"{type(self.gated).__name__} cannot be deployed: torch.export cannot follow it "
                f"({type(error).__name__}: {line})"
            ) from error
        gates = dict(named_gates(self.gated))
        return lower(exported, gates), exported.call_spec.out_spec

    def _check_taken(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell arguments that the gated network does not take either."""
        try:
            self.gated(*args, **kwargs)
        except Exception as error:
            raise PagError(
                f"{type(self.gated).__name__} does not take these arguments "
                f"({type(error).__name__}: {error})"
            ) from error

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeployedNetwork:
        """Stay where it is, in float32.

        Raises:
            PagError: The function, such as that of `half` or `cuda`, changes tensors.
        """
        before = torch.zeros(1, dtype=torch.float32, device="cpu")
        after = fn(before)
        if (after.dtype, after.device) != (before.dtype, before.device):
            raise PagError(
                f"a deployed network computes in float32 on the CPU, not {after.dtype} on "
                f"{after.device}: it takes inputs of other types, and converts them"
            )
        return self

    def load_state_dict(self, *_arguments: Any, **_keywords: Any) -> Any:
        """Refuse other weights: they are packed.

        Raises:
            PagError: Always.
        """
        raise PagError(
            "a deployed network cannot be given other weights: load them into the gated one, and "
            "deploy that"
        )

    def train(self, mode: bool = True) -> DeployedNetwork:
        """Refuse training.

        Raises:
            PagError: Always, unless `mode` is False.
        """
        if mode:
            raise PagError("a deployed network cannot be trained: train the gated one")
        super().train(False)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave programs out: they are made anew."""
        left_out = ("_programs", "_lock", "_weights", "_last")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start without programs."""
        self.__dict__.update(state)
        self._reset()


def deploy(gated: nn.Module, backend: str = "auto") -> DeployedNetwork:
    """Turn a gated network into one that computes only what its gates leave open.

    Batch norms are folded and weights packed; every gated site is computed at its open pixels
    alone. The result is for inference on the CPU, in float32, and agrees with the gated network in
    evaluation mode up to rounding (a gate whose logit is within rounding of zero may decide
    otherwise). `override_gates` and `set_budget` work on it. It cannot be saved: save the gated
    network, and deploy it after loading. A network without gates may be deployed, too, to compare
    with: it runs on the same kernels, all of it.

    Args:
        gated: A gated network, or any other; it is copied.
        backend: `"cpu"` are the native kernels, `"reference"` plain torch, `"auto"` the native
            ones where they were built.

    Raises:
        PagError: The network is deployed already, the backend is unknown, or there are no native
            kernels and `"cpu"` was asked for.
    """
    if isinstance(gated, DeployedNetwork):
        raise PagError("the network is deployed already: deploy the gated one")
    if not isinstance(gated, nn.Module):
        raise PagError(f"gated is a {type(gated).__name__}: expected a network")
    if backend not in BACKENDS:
        raise PagError(f"backend={backend!r}: expected one of {BACKENDS}")
    with using(backend):
        return DeployedNetwork(gated, backend)


def _shape_of_image(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Size | None:
    """The shape of the arguments if they are one tensor, and that needs no conversion."""
    if len(args) != 1 or kwargs or type(args[0]) is not Tensor:
        return None
    return args[0].shape if args[0].dtype is torch.float32 and args[0].is_cpu else None


def _float32(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        if not isinstance(leaf, Hashable):
            raise PagError(f"an argument holds a {type(leaf).__name__}: expected tensors")
        return leaf
    if leaf.device.type != "cpu":
        raise PagError(f"an input is on {leaf.device}: deployed networks run on the CPU")
    return leaf.float() if leaf.is_floating_point() else leaf
