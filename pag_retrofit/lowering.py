"""From the exported graph of a gated network to the steps of its deployed form.

Nodes are visited in order. A convolution is not emitted where it stands: what follows it (batch
norm, scales, an activation, the mix with a bypass, a mask, an addition) is folded into it as long
as nothing else looks at the result in between. Upsampled and concatenated maps are not made where
convolutions and gates can read their parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.export.graph_signature import ConstantArgument

from pag_retrofit import kernels
from pag_retrofit.aliasing import may_give_a_view
from pag_retrofit.bands import in_bands
from pag_retrofit.demand import EVERYWHERE, Demand, Grid, Masked, both
from pag_retrofit.execution import (
    Activate,
    Allocate,
    Average,
    Buffer,
    Call,
    Choose,
    Convolve,
    Decide,
    DecidePerImage,
    Interpolate,
    MaxPool,
    Normalize,
    NormalizeGroups,
    Program,
    Resize,
    Source,
    Stand,
    Step,
    Value,
    on_grid_or_open,
)
from pag_retrofit.exported import (
    activation_of,
    base_name,
    is_float,
    is_global_mean,
    is_pixelwise,
    is_whole_slice,
    keeps_type,
    layouts_of,
    mean_layout,
    out_of_place,
    padding_before,
    shape_of,
    spatial_size,
)
from pag_retrofit.functional import POINTWISE, Window, subsample
from pag_retrofit.gates import Gate, PixelGate
from pag_retrofit.locality import Node, conv_arguments, pair
from pag_retrofit.multipool import BranchSelector
from pag_retrofit.ordering import put_off
from pag_retrofit.policies import InputFreeGate, LayerGate
from pag_retrofit.sharing import activate_early, weigh_together

_TRANSPARENT = frozenset({"alias", "detach", "contiguous", "clone", "lift_fresh_copy", "identity"})
_DROPOUTS = frozenset({"dropout", "feature_dropout"})
_VIEWS_OF_MASKS = frozenset(
    {"permute", "transpose", "flatten", "view", "reshape", "to", "_to_copy"}
)
_NOT_NEGATIVE = frozenset({"relu", "relu6", "sigmoid", "hardsigmoid"})
_KEEPS_SIGN = frozenset({"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "cat", "add", "slice",
                         "upsample_nearest2d", "upsample_bilinear2d", "permute"})  # fmt: skip


@dataclass(frozen=True)
class _Part:
    """One convolution of a group that writes one map.

    Args:
        sources: What it reads.
        weight: (C', C / groups, kh, kw), with all that was folded into it.
        bias: (C',).
        window: Of the convolution.
        groups: Of the convolution.
        size: (H, W) of its input.
        where: At which pixels its result is the map's.
        added: What is added, or None.
    """

    sources: tuple[Source, ...]
    weight: Tensor
    bias: Tensor
    window: Window
    groups: int
    size: tuple[int, int]
    where: Demand = EVERYWHERE
    added: Source | None = None

    def scaled(self, scale: Tensor, shift: Tensor | None = None) -> _Part:
        """Multiply (and shift) each output channel."""
        bias = self.bias * scale
        return replace(
            self,
            weight=self.weight * scale.view(-1, 1, 1, 1),
            bias=bias if shift is None else bias + shift,
        )


@dataclass(frozen=True)
class _Group:
    """Convolutions, not emitted yet, and what is folded into them.

    Args:
        parts: The convolutions.
        rows: (B, H, W, C) of the map.
        layout: Of the node it has come to.
        coarse: Mask of a coarse bypass, or "".
        activation: Of the kernels, or "none".
        slope: Of a leaky ReLU.
        mask: Mask outside of which the map is zero, or "".
        residual: What is added: a node.
        residual_after: It is added after the activation.
    """

    parts: tuple[_Part, ...]
    rows: tuple[int, int, int, int]
    layout: str
    coarse: str = ""
    activation: str = "none"
    slope: float = 0.01
    mask: str = ""
    residual: Node | None = None
    residual_after: bool = False

    @property
    def is_linear(self) -> bool:
        """Nothing but convolutions yet."""
        return self.activation == "none" and self.residual is None and not self.mask


@dataclass(frozen=True)
class _Parts:
    """A map that is not made: a concatenation of maps, upsampled or scaled."""

    sources: tuple[Source, ...]


@dataclass(frozen=True)
class _Kept:
    """Every stride-th pixel of a map that is not made."""

    source: Source
    offset: tuple[int, int] = (0, 0)
    stride: tuple[int, int] = (1, 1)


@dataclass
class _State:
    steps: list[Step] = field(default_factory=list)
    constants: dict[Node, Any] = field(default_factory=dict)
    groups: dict[Node, _Group] = field(default_factory=dict)
    virtual: dict[Node, _Parts | _Kept] = field(default_factory=dict)
    made: set[Node] = field(default_factory=set)


def lower(exported: torch.export.ExportedProgram, gates: Mapping[str, Gate]) -> Program:
    """Turn a marked graph into a program.

    Args:
        exported: By `export_marked`.
        gates: Site -> gate; the program asks them, so they can be overridden and recalibrated.
    """
    return _Lowering(exported, gates).run()


class _Lowering:
    def __init__(self, exported: torch.export.ExportedProgram, gates: Mapping[str, Gate]):
        self.graph = exported.graph
        self.gates = gates
        self.state = _State()
        self.inputs: list[str] = []
        self.same: dict[Node, Node] = {}
        self.not_negative: set[Node] = set()
        self._read_inputs(exported)
        self._find_aliases()
        self.order = {node: place for place, node in enumerate(self.graph.nodes)}
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.readers: dict[Node, list[Node]] = {}
        for node in self.graph.nodes:
            if node not in self.same:
                for parent in dict.fromkeys(map(self.real, node.all_input_nodes)):
                    self.readers.setdefault(parent, []).append(node)

    # --- the graph ------------------------------------------------------------------------

    def _read_inputs(self, exported: torch.export.ExportedProgram) -> None:
        signature = exported.graph_signature
        stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        lifted = signature.inputs_to_lifted_tensor_constants
        arguments = [spec.arg for spec in signature.input_specs]
        given = {x.name: x.value for x in arguments if isinstance(x, ConstantArgument)}
        for node in self.graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in stored:
                name = stored[node.name]
                value = exported.state_dict.get(name, exported.constants.get(name))
                self.state.constants[node] = value.detach()
            elif node.name in lifted:
                self.state.constants[node] = exported.constants[lifted[node.name]]
            elif node.name in given:
                self.state.constants[node] = given[node.name]
            else:
                self.inputs.append(node.name)
                self.state.made.add(node)

    def _find_aliases(self) -> None:
        for node in self.graph.nodes:
            name = base_name(node)
            off = name in _DROPOUTS and not node.args[2]
            if name in _TRANSPARENT or off or is_whole_slice(node):
                self.same[node] = node.args[0]
            elif name in ("to", "_to_copy") and keeps_type(node):
                self.same[node] = node.args[0]
            elif name == "upsample_bilinear2d" and node.args[3:] in ((), (None,)):
                if shape_of(node) == shape_of(node.args[0]):
                    self.same[node] = node.args[0]

    def real(self, node: Node) -> Node:
        """The node whose value a node passes on."""
        while node in self.same:
            node = self.same[node]
        return node

    def constant(self, x: Any) -> Any:
        """Value of a constant node or of a plain argument; None for anything else."""
        if isinstance(x, fx.Node):
            return self.state.constants.get(self.real(x))
        return x

    def only_reader(self, node: Node, reader: Node) -> bool:
        """Whether one node alone looks at a value."""
        return self.readers.get(node, []) == [reader]

    # --- the walk -------------------------------------------------------------------------

    def run(self) -> Program:
        """Visit every node, then put the program together."""
        outputs: list[Any] = []
        for node in self.graph.nodes:
            if node in self.same or node.op == "placeholder":
                continue
            if node.op == "output":
                outputs = [self._output(x) for x in node.args[0]]
            elif not self._fold_constant(node):
                self._visit(node)
        constants = {n.name: v for n, v in self.state.constants.items() if isinstance(v, Tensor)}
        used = {name for step in self.state.steps for name in step.reads()}
        used |= {output.name for output in outputs if isinstance(output, Value)}
        steps = put_off(activate_early(self.state.steps, outputs), outputs)
        steps = in_bands(weigh_together(steps), outputs)
        return Program(
            steps,
            self.inputs,
            outputs,
            {name: value for name, value in constants.items() if name in used},
        )

    def _output(self, x: Any) -> Any:
        if not isinstance(x, fx.Node):
            return x
        node = self.real(x)
        if node not in self.state.constants:
            self.make(node)
        return Value(node.name)

    def _fold_constant(self, node: Node) -> bool:
        """Compute what depends on parameters alone, once."""
        if node.op != "call_function" or base_name(node) in ("decide",):
            return False
        parents = list(map(self.real, node.all_input_nodes))
        if not parents or not all(parent in self.state.constants for parent in parents):
            return False
        lookup = lambda n: self.state.constants[self.real(n)]  # noqa: E731
        arguments = fx.map_arg(node.args, lookup)
        self.state.constants[node] = node.target(*arguments, **fx.map_arg(node.kwargs, lookup))
        return True

    def _visit(self, node: Node) -> None:
        name = base_name(node)
        handler: Callable[[Node], bool] | None = getattr(self, f"_visit_{name}", None)
        if name in kernels.ACTIVATIONS or name in ("hardtanh", "leaky_relu"):
            handler = self._visit_activation
        if handler is None or not handler(node):
            self._call(node)

    def group(self, x: Any, reader: Node) -> _Group | None:
        """The group that a node ends, if only the reader looks at it."""
        if not isinstance(x, fx.Node):
            return None
        node = self.real(x)
        found = self.state.groups.get(node)
        return found if found is not None and self.only_reader(node, reader) else None

    def move(self, source: Any, node: Node, group: _Group) -> bool:
        """Let a group end at the next node."""
        self.state.groups.pop(self.real(source))
        self.state.groups[node] = group
        return True

    # --- convolutions and what is folded into them ----------------------------------------

    def _visit_conv2d(self, node: Node) -> bool:
        values = conv_arguments(node)
        weight = self.constant(node.args[1])
        bias = self.constant(node.args[2]) if len(node.args) > 2 else None
        shape = shape_of(node)
        if not isinstance(weight, Tensor) or weight.dtype is not torch.float32 or len(shape) != 4:
            return False
        groups = int(values["groups"])
        strides, dilation = pair(values["stride"]), pair(values["dilation"])
        kernel = (int(weight.shape[2]), int(weight.shape[3]))
        sources, size, shift = self._sources(node.args[0], kernel, groups)
        top, left = padding_before(node)
        if shift is not None:
            if kernel != (1, 1) or strides != (1, 1) or (top, left) != (0, 0):
                self.make(self.real(node.args[0]))
                sources, size, shift = self._sources(node.args[0], kernel, groups, whole=True)
            else:
                (top, left), strides = (-shift.offset[0], -shift.offset[1]), shift.stride
        window = Window(kernel, strides, dilation, (top, left))
        zero = weight.new_zeros(weight.shape[0])
        part = _Part(
            sources, weight.detach(), zero if bias is None else bias.detach(), window, groups, size
        )
        rows = (shape[0], shape[2], shape[3], shape[1])
        self.state.groups[node] = _Group((part,), rows, "BCHW")
        return True

    def _visit_linear(self, node: Node) -> bool:
        weight = self.constant(node.args[1])
        bias = self.constant(node.args[2]) if len(node.args) > 2 else None
        shape = shape_of(node)
        layout = {4: "BHWC", 3: "BNC", 2: "BC"}.get(len(shape))
        if layout is None or not isinstance(weight, Tensor) or weight.dtype is not torch.float32:
            return False
        source = self.real(node.args[0])
        self.make(source)
        rows = (shape[0], *spatial_size(node, layout), shape[-1])
        zero = weight.new_zeros(weight.shape[0])
        part = _Part(
            (Source(source.name, layout),),
            weight.detach()[:, :, None, None],
            zero if bias is None else bias.detach(),
            POINTWISE,
            1,
            (rows[1], rows[2]),
        )
        self.state.groups[node] = _Group((part,), rows, layout)
        return True

    def _sources(
        self, x: Node, kernel: tuple[int, int], groups: int, whole: bool = False
    ) -> tuple[tuple[Source, ...], tuple[int, int], _Kept | None]:
        """What a convolution reads, the size of it, and which pixels of that if not all."""
        node = self.real(x)
        virtual = self.state.virtual.get(node)
        height, width = shape_of(node)[2:]
        if isinstance(virtual, _Kept) and not whole:
            size = shape_of(self.nodes[virtual.source.value])[2:]
            return (virtual.source,), (size[0], size[1]), virtual
        if isinstance(virtual, _Parts) and virtual.sources and groups == 1:
            return virtual.sources, (height, width), None
        self.make(node)
        return (Source(node.name, "BCHW"),), (height, width), None

    def _visit_batch_norm(self, node: Node) -> bool:
        group = self.group(node.args[0], node)
        if group is None or not group.is_linear or group.layout != "BCHW":
            return False
        weight, bias, mean, variance = (self.constant(x) for x in node.args[1:5])
        if node.args[5] or mean is None:
            return False
        scale = (variance + node.args[7]).rsqrt()
        scale = scale if weight is None else scale * weight
        shift = -mean * scale
        shift = shift if bias is None else shift + bias
        parts = tuple(part.scaled(scale, shift) for part in group.parts)
        return self.move(node.args[0], node, replace(group, parts=parts))

    def _visit_mul(self, node: Node) -> bool:
        for x, y in (node.args[:2], node.args[1::-1]):
            factor, group = self.constant(y), self.group(x, node)
            if factor is None or group is None or group.activation != "none" or group.residual:
                continue
            scale = _per_channel(factor, group)
            if scale is not None:
                parts = tuple(part.scaled(scale) for part in group.parts)
                return self.move(x, node, replace(group, parts=parts))
        return self._scale_channels(node)

    def _scale_channels(self, node: Node) -> bool:
        """A map times factors per image and channel: read so by convolutions and gates."""
        for x, y in (node.args[:2], node.args[1::-1]):
            if not (isinstance(x, fx.Node) and isinstance(y, fx.Node)):
                continue
            source, factor = self.real(x), self.real(y)
            shape = shape_of(source)
            if len(shape) != 4 or shape_of(factor) != (shape[0], shape[1], 1, 1):
                continue
            if not (is_float(source) and is_float(factor)):
                continue
            if factor in self.state.constants or not self._read_by_kernels(node, scaled=True):
                continue
            self.make(source)
            self.make(factor)
            scaled = Source(source.name, "BCHW", scale=factor.name)
            self.state.virtual[node] = _Parts((scaled,))
            return True
        return False

    def _read_by_kernels(self, node: Node, scaled: bool = False) -> bool:
        """Whether all that reads a map can read it in parts."""
        for reader in self.readers.get(node, []):
            name = base_name(reader)
            if name == "decide" and not isinstance(self.gates[str(reader.args[1])], BranchSelector):
                continue
            if name == "cat" and not scaled and self._visit_cat(reader, dry=True):
                continue
            if name == "apply_mask" and scaled:
                continue
            if name != "conv2d" or conv_arguments(reader)["groups"] != 1:
                return False
            if not isinstance(self.constant(reader.args[1]), Tensor):
                return False
        return True

    def _visit_add(self, node: Node) -> bool:
        if node.kwargs.get("alpha", 1) != 1 or len(node.args) < 2:
            return False
        for x, y in (node.args[:2], node.args[1::-1]):
            shift, group = self.constant(y), self.group(x, node)
            if shift is not None and group is not None and group.is_linear:
                vector = _per_channel(shift, group)
                if vector is not None:
                    one = torch.ones_like(vector)
                    parts = tuple(part.scaled(one, vector) for part in group.parts)
                    return self.move(x, node, replace(group, parts=parts))
        return self._add_residual(node)

    def _add_residual(self, node: Node) -> bool:
        operands = [self.real(x) if isinstance(x, fx.Node) else None for x in node.args[:2]]
        a, b = operands
        if a is None or b is None or a is b or shape_of(a) != shape_of(b):
            return False
        if not (is_float(a) and is_float(b)):
            return False
        candidates = [(n, g) for n in (a, b) if (g := self.group(n, node)) and _can_add(g)]
        if not candidates:
            return False
        source, group = max(candidates, key=lambda c: (bool(c[1].mask), self.order[c[0]]))
        other = b if source is a else a
        if other in self.state.constants:
            return False
        self.make(other)
        after = group.activation != "none"
        return self.move(source, node, replace(group, residual=other, residual_after=after))

    def _visit_activation(self, node: Node) -> bool:
        kind = activation_of(node)
        group = self.group(node.args[0], node)
        if kind is None or group is None or group.activation != "none":
            return False
        if group.mask and group.residual is None:
            return False
        activation, slope = kind
        return self.move(node.args[0], node, replace(group, activation=activation, slope=slope))

    def _visit_permute(self, node: Node) -> bool:
        group = self.group(node.args[0], node)
        layouts = layouts_of(node)
        if layouts is None:
            return False
        if group is not None and group.residual is None:
            moved = replace(group, layout=layouts[1])
            return group.layout == layouts[0] and self.move(node.args[0], node, moved)
        if layouts[1] != "BHWC":
            return False
        self.state.virtual[node] = _Parts(())  # made if need be: layer norms look through it
        return True

    # --- marks ----------------------------------------------------------------------------

    def mask_value(self, x: Node) -> str:
        """Name of the mask (B, 1, h, w) that a node is another view of."""
        node = self.real(x)
        while base_name(node) in _VIEWS_OF_MASKS:
            node = self.real(node.args[0])
        self.make(node)
        return node.name

    def _visit_apply_mask(self, node: Node) -> bool:
        mask = self.mask_value(node.args[1])
        group = self.group(node.args[0], node)
        if group is not None and not group.mask and group.residual is None:
            return self.move(node.args[0], node, replace(group, mask=mask))
        passed_on = self._passed_on(self.real(node.args[0]), self._layout_of_mask(node.args[1]))
        if passed_on is None:
            return False
        self.state.groups[node] = replace(passed_on, mask=mask)
        return True

    def _layout_of_mask(self, x: Node) -> str:
        """Layout of the maps that a view of a mask fits."""
        if len(shape_of(x)) == 3:
            return "BNC"
        node = self.real(x)
        while base_name(node) in _VIEWS_OF_MASKS:
            if base_name(node) == "permute":
                return "BHWC"
            node = self.real(node.args[0])
        return "BCHW"

    def _passed_on(self, node: Node, layout: str) -> _Group | None:
        """A map as it is, as a group: so that what follows is computed at listed pixels."""
        shape = shape_of(node)
        virtual = self.state.virtual.get(node)
        source = Source(node.name, layout)
        if isinstance(virtual, _Parts) and len(virtual.sources) == 1 and virtual.sources[0].scale:
            source = virtual.sources[0]
        else:
            self.make(node)
        if layout == "BNC":  # tokens are left to torch
            return None
        channels, size = shape[layout.index("C")], spatial_size(node, layout)
        part = _Part(
            (source,),
            torch.ones(channels, 1, 1, 1),
            torch.zeros(channels),
            POINTWISE,
            channels,
            size,
        )
        return _Group((part,), (shape[0], *size, channels), layout)

    def _visit_mix(self, node: Node) -> bool:
        active, bypass = self.real(node.args[0]), self.real(node.args[1])
        mask = self.mask_value(node.args[2])
        if base_name(bypass) == "coarse" and self.real(bypass.args[0]) is active:
            group = self.state.groups.get(active)
            readers = self.readers.get(active, [])
            if group is None or not group.is_linear or set(readers) != {bypass, node}:
                return False
            if not self.only_reader(bypass, node) or group.coarse:
                return False
            self.state.virtual.pop(bypass, None)
            return self.move(active, node, replace(group, coarse=mask))
        first, second = self.group(active, node), self.group(bypass, node)
        if first is None or second is None or not (first.is_linear and second.is_linear):
            return False
        if first.coarse or second.coarse or first.rows != second.rows:
            return False
        parts = [replace(p, where=both(p.where, Masked(mask))) for p in first.parts]
        parts += [replace(p, where=both(p.where, Masked(mask, False))) for p in second.parts]
        self.state.groups.pop(bypass)
        return self.move(active, node, replace(first, parts=tuple(parts)))

    def _visit_coarse(self, node: Node) -> bool:
        """Nothing to do if the mix that follows takes it in; else `make` calls it."""
        self.state.virtual[node] = _Parts(())
        return True

    def _visit_decide(self, node: Node) -> bool:
        gate, shape = self.gates[str(node.args[1])], shape_of(node)
        source = self.real(node.args[0])
        if isinstance(gate, BranchSelector):
            self.make(source)
            self.state.steps.append(
                Choose(writes=node.name, selector=gate, source=Source(source.name, "BCHW"))
            )
            self.state.made.add(node)
            return True
        assert isinstance(gate, PixelGate)
        mask_shape = (shape[0], shape[1], shape[2], shape[3])
        if isinstance(gate, LayerGate):
            self.make(source)
            self.state.steps.append(
                DecidePerImage(
                    writes=node.name,
                    gate=gate,
                    source=Source(source.name, gate.layout),
                    shape=mask_shape,
                )
            )
            self.state.made.add(node)
            return True
        virtual = self.state.virtual.get(source)
        if isinstance(virtual, _Parts) and virtual.sources:
            sources = virtual.sources
        else:
            self.make(source)
            sources = (Source(source.name, gate.layout),)
        if isinstance(gate, InputFreeGate):
            step = Stand(writes=node.name, gate=gate, sources=sources, shape=mask_shape)
            self.state.steps.append(step)
            self.state.made.add(node)
            return True
        height, width = spatial_size(source, gate.layout)
        grid = torch.empty(1, 1, height, width, device="meta")
        size = (shape[2], shape[3])
        ends = [
            n - 1 - (count - 1) * s
            for n, count, s in zip((height, width), size, gate.cost.stride, strict=True)
        ]
        offset = (min(gate.cost.offset[0], ends[0]), min(gate.cost.offset[1], ends[1]))
        assert subsample(grid, gate.cost.stride, gate.cost.offset, size).shape[2:] == size
        self.state.steps.append(
            Decide(writes=node.name, gate=gate, sources=sources, shape=mask_shape, offset=offset)
        )
        self.state.made.add(node)
        return True

    def _visit_mask_pool_input(self, node: Node) -> bool:
        """Left to the mean that follows, if it is one."""
        readers = self.readers.get(node, [])
        if len(readers) != 1 or not is_global_mean(readers[0]):
            return False
        users = self.readers.get(readers[0], [])
        if len(users) != 1 or base_name(users[0]) != "renormalize_pool":
            return False
        source = self.real(node.args[0])
        self.make(source)
        layout = mean_layout(readers[0])
        mean = users[0]
        self.state.steps.append(
            Average(
                writes=mean.name,
                source=Source(source.name, layout),
                where=Masked(self.mask_value(mean.args[1])),
                shape=shape_of(mean),
            )
        )
        self.state.made |= {node, readers[0], mean}
        return True

    # --- maps that are not made -----------------------------------------------------------

    def _visit_upsample_nearest2d(self, node: Node) -> bool:
        source = self.real(node.args[0])
        low, high = shape_of(source)[2:], shape_of(node)[2:]
        factor = high[0] // max(low[0], 1)
        doubled = factor > 1 and factor & (factor - 1) == 0
        given = [x for x in node.args[2:] if x is not None]  # torch places pixels by these
        doubled &= all(x in (factor, [factor, factor]) for x in given)
        if doubled and high == (low[0] * factor, low[1] * factor) and self._read_by_kernels(node):
            self.make(source)
            self.state.virtual[node] = _Parts((Source(source.name, "BCHW", factor),))
            return True
        return self._resize(node, torch.ops.aten.upsample_nearest2d.default)

    def _visit_cat(self, node: Node, dry: bool = False) -> bool:
        axis = node.args[1] if len(node.args) > 1 else 0
        if len(shape_of(node)) != 4 or axis not in (1, -3) or not all(map(is_float, node.args[0])):
            return False
        maps = [x for x in node.args[0] if shape_of(x)[1]]  # SMP has encoders that give no channels
        if not 1 <= len(maps) <= kernels.MAX_SOURCES:
            return False
        if not self._read_by_kernels(node):
            return False
        if dry:
            return True
        sources: list[Source] = []
        for x in map(self.real, maps):
            virtual = self.state.virtual.get(x)
            if isinstance(virtual, _Parts) and virtual.sources:
                sources += virtual.sources
            else:
                self.make(x)
                sources.append(Source(x.name, "BCHW"))
        if len(sources) > kernels.MAX_SOURCES or any(s.scale for s in sources):
            return False
        self.state.virtual[node] = _Parts(tuple(sources))
        return True

    def _visit_stack(self, node: Node) -> bool:
        """Not made if what follows adds the maps up."""
        readers = self.readers.get(node, [])
        if len(readers) != 1 or not self._adds_up(readers[0], node) or not is_float(node):
            return False
        self.state.virtual[node] = _Parts(())
        return True

    def _adds_up(self, node: Node, stacked: Node) -> bool:
        """Whether a node is the sum of the maps that another one stacks."""
        if base_name(node) != "sum" or base_name(stacked) != "stack" or len(node.args) != 2:
            return False
        axis = stacked.args[1] if len(stacked.args) > 1 else stacked.kwargs.get("dim", 0)
        return list(node.args[1]) == [axis] and not node.kwargs and len(stacked.args[0]) > 1

    def _visit_sum(self, node: Node) -> bool:
        """One map after the other: a stack of large ones takes long to make, and longer to add."""
        stacked = self.real(node.args[0])
        if stacked not in self.state.virtual or not self._adds_up(node, stacked):
            return False
        maps = [self.real(x) for x in stacked.args[0]]
        for x in maps:
            self.make(x)
        total = maps[0].name
        for number, x in enumerate(maps[1:], 1):
            name = node.name if number == len(maps) - 1 else f"{node.name}.{number}"
            self.state.steps.append(
                Call(
                    writes=name,
                    function=torch.ops.aten.add.Tensor,
                    arguments=(Value(total), Value(x.name)),
                    keywords={},
                    pixelwise=(total, x.name),
                )
            )
            total = name
        self.state.made.add(node)
        return True

    def _visit_slice(self, node: Node) -> bool:
        """Every stride-th row or column, if a 1x1 convolution reads it."""
        source = self.real(node.args[0])
        given = [*node.args[1:]]
        axis, start, end, step = given + [0, None, None, 1][len(given) :]
        shape = shape_of(source)
        if len(shape) != 4 or axis not in (2, 3):
            return False
        if self.state.groups.get(source) is not None or base_name(source) == "decide":
            return False
        kept = self.state.virtual.get(source)
        if not isinstance(kept, _Kept):
            if kept is not None:
                self.make(source)
            kept = _Kept(Source(source.name, "BCHW"))
        offset, stride = list(kept.offset), list(kept.stride)
        offset[axis - 2] += slice(start, end, step).indices(shape[axis])[0] * stride[axis - 2]
        stride[axis - 2] *= int(step or 1)
        self.state.virtual[node] = _Kept(
            kept.source, (offset[0], offset[1]), (stride[0], stride[1])
        )
        return True

    # --- everything else ------------------------------------------------------------------

    def _visit_max_pool2d(self, node: Node) -> bool:
        kernel = pair(node.args[1])
        given = [pair(x) if x else kernel for x in node.args[2:5]]  # no stride: the kernel's size
        stride, padding, dilation = given + [kernel, (0, 0), (1, 1)][len(given) :]
        shape = shape_of(node)
        if len(shape) != 4 or not is_float(node):
            return False
        source = self.real(node.args[0])
        self.make(source)
        buffer = Buffer((shape[0], shape[2], shape[3], shape[1]), "BCHW")
        window = Window(kernel, stride, dilation, padding)
        self.state.steps += [
            Allocate(writes=node.name, buffer=buffer),
            MaxPool(writes=node.name, source=source.name, window=window),
        ]
        self.state.made.add(node)
        if source in self.not_negative:
            self.not_negative.add(node)
        return True

    def _visit__upsample_nearest_exact2d(self, node: Node) -> bool:
        return self._resize(node, torch.ops.aten._upsample_nearest_exact2d.default)

    def _visit_upsample_bilinear2d(self, node: Node) -> bool:
        return self._resize(node, torch.ops.aten.upsample_bilinear2d.default, node.args[2])

    def _visit__upsample_bilinear2d_aa(self, node: Node) -> bool:
        return self._resize(node, torch.ops.aten._upsample_bilinear2d_aa.default, node.args[2])

    def _resize(self, node: Node, operator: Callable[..., Tensor], *options: Any) -> bool:
        """Take rows and columns as weighted sums; an operator tells the weights itself.

        Its arguments are the map, the new size, options, and by how much each axis grows.
        """
        source = self.real(node.args[0])
        before, after = shape_of(source), shape_of(node)
        if not is_float(node):
            return False
        given = node.args[2 + len(options) :]
        factors = given if len(given) == 2 else given[0] if given else None
        if not isinstance(factors, list | tuple | None):
            return False
        taps = []
        for axis in (0, 1):
            size, wanted = before[2 + axis], after[2 + axis]
            whole = torch.eye(size)[None, None]
            factor = factors[axis] if factors else None
            matrix = operator(whole, [wanted, size], *options, factor, None)[0, 0]
            taps.append(kernels.Taps.of_matrix(matrix))
        self.make(source)
        buffer = Buffer((after[0], after[2], after[3], after[1]), "BCHW")
        self.state.steps += [
            Allocate(writes=node.name, buffer=buffer),
            Resize(writes=node.name, source=source.name, rows=taps[0], columns=taps[1]),
        ]
        self.state.made.add(node)
        if source in self.not_negative:
            self.not_negative.add(node)
        return True

    def _visit_mean(self, node: Node) -> bool:
        if node in self.state.made:  # of a masked mean
            return True
        if not is_global_mean(node) or not is_float(node):
            return False
        source = self.real(node.args[0])
        self.make(source)
        self.state.steps.append(
            Average(
                writes=node.name,
                source=Source(source.name, mean_layout(node)),
                where=EVERYWHERE,
                shape=shape_of(node),
            )
        )
        self.state.made.add(node)
        if source in self.not_negative:
            self.not_negative.add(node)
        return True

    _visit_adaptive_avg_pool2d = _visit_mean

    def _affine(self, node: Node) -> tuple[Tensor | None, Tensor | None] | None:
        """Weight and bias of a norm; None if they are computed from the input."""
        given = [node.args[i] if len(node.args) > i else None for i in (2, 3)]
        weight, bias = map(self.constant, given)
        known = (weight is None) == (given[0] is None) and (bias is None) == (given[1] is None)
        return (weight, bias) if known else None

    def _visit_layer_norm(self, node: Node) -> bool:
        """And the view of the result with channels first, if nothing else reads that."""
        source, shape, readers = self.real(node.args[0]), shape_of(node), self.readers.get(node, [])
        layout, affine = {4: "BHWC", 3: "BNC"}.get(len(shape)), self._affine(node)
        if layout is None or affine is None or len(node.args[1]) != 1 or not is_float(node):
            return False
        rows = (shape[0], shape[1], shape[2] if layout == "BHWC" else 1, shape[-1])
        read_as, written_as, written = layout, layout, node
        if source in self.state.virtual and layouts_of(source):
            source, read_as = self.real(source.args[0]), "BCHW"
        if len(readers) == 1 and layouts_of(readers[0]) == ("BHWC", "BCHW"):
            written, written_as = readers[0], "BCHW"
        self.make(source)
        self.state.steps += [
            Allocate(
                writes=written.name,
                buffer=Buffer(rows, written_as),
                overwritten=source.name,
                copied_layout=read_as,
            ),
            Normalize(
                writes=written.name,
                source=Source(source.name, read_as),
                weight=affine[0],
                bias=affine[1],
                epsilon=float(node.args[4]) if len(node.args) > 4 else 1e-5,
                layout=written_as,
            ),
        ]
        self.state.made |= {node, written}
        return True

    def _visit_group_norm(self, node: Node) -> bool:
        """And the activation of the result, if nothing else reads that."""
        source, shape = self.real(node.args[0]), shape_of(node)
        affine, readers = self._affine(node), self.readers.get(node, [])
        if len(shape) != 4 or node.meta["val"].dtype is not torch.float32 or affine is None:
            return False
        found = activation_of(readers[0]) if len(readers) == 1 else None
        activation, slope = found or ("none", 0.01)
        written = readers[0] if found else node
        self.make(source)
        self.state.steps += [
            Allocate(writes=written.name, buffer=Buffer((shape[0], *shape[2:], shape[1]), "BCHW")),
            NormalizeGroups(
                writes=written.name,
                source=source.name,
                groups=int(node.args[1]),
                weight=affine[0],
                bias=affine[1],
                epsilon=float(node.args[4]) if len(node.args) > 4 else 1e-5,
                activation=activation,
                slope=slope,
            ),
        ]
        self.state.made |= {node, written}
        if activation in _NOT_NEGATIVE:
            self.not_negative.add(written)
        return True

    def make(self, node: Node) -> None:
        """See to it that a value is there once the steps so far have run."""
        if node in self.state.made or node in self.state.constants:
            return
        if node in self.state.groups:
            self._emit(node, self.state.groups.pop(node))
        else:
            self.state.virtual.pop(node, None)
            self._call(node)

    def _call(self, node: Node) -> None:
        """Run a node as torch would, but not in place."""
        if node in self.state.made:
            return
        parents = list(map(self.real, node.all_input_nodes))
        for parent in parents:
            self.make(parent)

        def argument(n: Node) -> Any:
            found = self.real(n)
            known = found in self.state.constants
            return self.state.constants[found] if known else Value(found.name)

        arguments = fx.map_arg(node.args, argument)
        keywords = fx.map_arg(node.kwargs, argument)
        maps = tuple(
            parent.name
            for parent in parents
            if is_pixelwise(node) and shape_of(parent)[-2:] == shape_of(node)[-2:]
        )
        function = out_of_place(node)
        self.state.steps.append(
            Call(
                writes=node.name,
                function=function,
                arguments=arguments,
                keywords=dict(keywords),
                pixelwise=maps,
                gives_a_view=may_give_a_view(node, function),
            )
        )
        self.state.made.add(node)
        if base_name(node) in _NOT_NEGATIVE or (
            base_name(node) in _KEEPS_SIGN and all(p in self.not_negative for p in parents)
        ):
            self.not_negative.add(node)

    # --- emission -------------------------------------------------------------------------

    def _emit(self, node: Node, group: _Group) -> None:
        """Write a group as steps that make the value of a node."""
        activation, last = self._activations(group)
        in_place = group.residual is not None and bool(group.mask)
        self.state.steps.append(self._allocate(node, group))
        residual = None
        if group.residual is not None and not in_place:
            residual = Source(group.residual.name, group.layout)
        parts = group.parts
        if _can_add(group):
            parts = tuple(self._upsampled_last(node, part, group) for part in parts)
        passes = [call for part in parts for call in self._passes(part, group)]
        for part, where, winograd, digits, activates, accumulates in passes:
            compressed = kernels.prefers_compressed(part.weight, part.groups)
            self.state.steps.append(
                Convolve(
                    writes=node.name,
                    layer=kernels.PerforatedConvolution(
                        part.weight,
                        part.bias,
                        window=part.window,
                        groups=part.groups,
                        activation=activation if activates else "none",
                        slope=group.slope,
                        winograd=winograd,
                        activate_if_all=bool(group.coarse) and activates,
                        compressed=compressed and not digits,
                        digits=digits,
                    ),
                    layout=group.layout,
                    sources=part.sources,
                    size=part.size,
                    where=where,
                    residual=part.added or residual,
                    accumulate=in_place or accumulates,
                    residual_after=group.residual_after,
                )
            )
        if group.coarse:
            self.state.steps.append(
                Interpolate(
                    writes=node.name,
                    layout=group.layout,
                    mask=group.coarse,
                    activation=group.activation,
                    slope=group.slope,
                    grid_apart=len(passes) > 1,
                )
            )
        if last != "none":
            self.state.steps.append(
                Activate(writes=node.name, layout=group.layout, activation=last, slope=group.slope)
            )
        if group.activation in _NOT_NEGATIVE and not group.residual_after:
            self.not_negative.add(node)
        self.state.made.add(node)

    def _passes(self, part: _Part, group: _Group) -> list[_Pass]:
        """The calls that compute a part.

        Between pixels of the grid others are interpolated. They lie in tiles of their own, so tiles
        are for what is open, and what else is on the grid is computed directly.
        """
        winograd, digits = _ways(part, group)
        if not group.coarse:
            where = both(Masked(group.mask) if group.mask else EVERYWHERE, part.where)
            return [_Pass(part, where, winograd, digits)]
        if not winograd:
            return [_Pass(part, on_grid_or_open(group.coarse), winograd, digits)]
        opened = _Pass(part, Masked(group.coarse), winograd, digits)
        closed = both(Grid(group.coarse), Masked(group.coarse, wanted=False))
        directly = [
            _Pass(
                some,
                closed,
                winograd=False,
                digits=kernels.prefers_digits(some.weight, some.groups),
                activates=False,
                accumulates=number > 0,
            )
            for number, some in enumerate(self._seen_by_grid(part))
        ]
        return [opened, *directly]

    def _seen_by_grid(self, part: _Part) -> list[_Part]:
        """What a 3x3 convolution is at every second pixel of every second row, as a sum.

        Of a map that is read upsampled by two it sees two pixels each way, the second one twice.
        """
        small = [self._is_half(source, part) for source in part.sources]
        if part.window != Window((3, 3), (1, 1), (1, 1), (1, 1)) or not any(small):
            return [part]
        halved = self._of_sources(part, small)
        rows = torch.stack([halved.weight[:, :, 0], halved.weight[:, :, 1:].sum(2)], 2)
        weight = torch.stack([rows[..., 0], rows[..., 1:].sum(3)], 3)
        folded = replace(halved, weight=weight, window=Window((2, 2), (1, 1), (1, 1), (1, 1)))
        if all(small):
            return [folded]
        others = self._of_sources(part, [not is_half for is_half in small])
        return [folded, replace(others, bias=torch.zeros_like(part.bias))]

    def _upsampled_last(self, node: Node, part: _Part, group: _Group) -> _Part:
        """Of a 1x1 convolution, what upsampled maps make, computed before, and the rest."""
        small = [self._is_half(source, part) for source in part.sources]
        if part.window != POINTWISE or part.groups > 1 or not any(small):
            return part
        channels, zeros = group.rows[3], torch.zeros_like(part.bias)
        added = self._on_small_map(node, self._of_sources(part, small), group)
        if not all(small):
            others = self._of_sources(part, [not is_half for is_half in small])
            return replace(others, bias=zeros, added=added)
        ones = part.weight.new_ones(channels, 1, 1, 1)
        return replace(part, sources=(added,), weight=ones, bias=zeros, groups=channels)

    def _of_sources(self, part: _Part, wanted: list[bool]) -> _Part:
        """What a convolution makes of some of its sources."""
        weights = part.weight.split([self._channels(source) for source in part.sources], 1)
        return replace(
            part,
            sources=tuple(
                source for source, keep in zip(part.sources, wanted, strict=True) if keep
            ),
            weight=torch.cat([w for w, keep in zip(weights, wanted, strict=True) if keep], 1),
        )

    def _on_small_map(self, node: Node, part: _Part, group: _Group) -> Source:
        """A 1x1 convolution of maps half as large as the result, where they are small."""
        batch, height, width, channels = group.rows
        size, name = (height // 2, width // 2), f"{node.name}.{len(self.state.steps)}"
        buffer = Buffer((batch, *size, channels), "BCHW")
        self.state.steps.append(Allocate(writes=name, buffer=buffer))
        self.state.steps.append(
            Convolve(
                writes=name,
                layer=kernels.PerforatedConvolution(part.weight, part.bias, window=POINTWISE),
                layout="BCHW",
                sources=tuple(source._replace(upsampling=1) for source in part.sources),
                size=size,
            )
        )
        return Source(name, "BCHW", upsampling=2, size=size)

    def _is_half(self, source: Source, part: _Part) -> bool:
        """Whether a source is half as large as the input, and read upsampled."""
        if source.upsampling != 2 or source.scale or source.layout != "BCHW":
            return False
        height, width = shape_of(self.nodes[source.value])[2:]
        return part.size == (2 * height, 2 * width)

    def _channels(self, source: Source) -> int:
        shape = shape_of(self.nodes[source.value])
        return shape[1] if source.layout == "BCHW" else shape[-1]

    def _activations(self, group: _Group) -> tuple[str, str]:
        """The one that kernels apply, and the one that the whole map goes through at the end.

        Pixels of a shortcut outside of a mask, which no convolution writes, need theirs, too,
        unless it has no effect there.
        """
        shortcut = group.residual is not None and bool(group.mask) and not group.residual_after
        if not shortcut or (group.activation == "relu" and group.residual in self.not_negative):
            return group.activation, "none"
        return "none", group.activation

    def _allocate(self, node: Node, group: _Group) -> Allocate:
        """The map that a group writes: what is outside of its mask is zero, or the shortcut."""
        buffer = Buffer(group.rows, group.layout)
        if group.residual is None or not group.mask:
            return Allocate(writes=node.name, buffer=buffer, zero=bool(group.mask))
        copied = group.residual.name
        return Allocate(writes=node.name, buffer=buffer, copied=copied, copied_layout=group.layout)


class _Pass(NamedTuple):
    """What one call computes of a convolution, and how.

    Args:
        part: The convolution, or some of its sources.
        where: At which pixels.
        winograd: In tiles of 2x2.
        digits: In digits.
        activates: Applies the activation, if the group has one; between some pixels others are
            interpolated first, so there only if it computes all of the map.
        accumulates: Adds to what another call wrote.
    """

    part: _Part
    where: Demand
    winograd: bool
    digits: bool
    activates: bool = True
    accumulates: bool = False


def _ways(part: _Part, group: _Group) -> tuple[bool, bool]:
    """Whether to compute in tiles of 2x2 pixels, and whether in digits.

    In tiles of an upsampled map less than half of the products are left, fewer than digits make up
    for.
    """
    pixels, upsampled = math.prod(group.rows[:3]), part.sources[0].upsampling > 1
    winograd = kernels.prefers_winograd(part.weight, part.window, part.groups, pixels, upsampled)
    if winograd and upsampled:
        return True, False
    digits = kernels.prefers_digits(part.weight, part.groups)
    return winograd and not digits, digits


def _can_add(group: _Group) -> bool:
    """Whether a kernel can add a residual to what a group computes."""
    return group.residual is None and not group.coarse


def _per_channel(factor: Any, group: _Group) -> Tensor | None:
    """A constant as one number per channel of a group, if it is constant over its pixels."""
    channels = group.rows[3]
    if isinstance(factor, int | float):
        return torch.full((channels,), float(factor))
    if not isinstance(factor, Tensor) or not factor.is_floating_point():
        return None
    axis = 1 if group.layout == "BCHW" else len(group.layout) - 1
    rank = len(group.layout)
    shape = (1,) * (rank - factor.dim()) + tuple(factor.shape)
    if len(shape) != rank or any(n != 1 for d, n in enumerate(shape) if d != axis):
        return None
    if shape[axis] not in (1, channels):
        return None
    return factor.float().reshape(-1).expand(channels).contiguous()
