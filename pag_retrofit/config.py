"""Configuration of a retrofit: frozen, versioned, and the same as JSON."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from pag_retrofit.errors import PagError

CONFIG_VERSION = 1
SCOPES = ("branch", "conv")
BYPASSES = ("auto", "identity", "collapsed", "coarse")
POLICIES = ("pixel", "layer", "random", "grid", "truncation")


@dataclass(frozen=True)
class GateConfig:
    """How gates start.

    Args:
        initial_probability: Probability of computing a pixel right after the retrofit, in
            (0.5, 1). Above 0.5 every gate is open in evaluation, so outputs do not change.
        dial: Give each gate a slope by which its logit falls as the budget does, so that one
            network can be trained for a range of budgets; see `Annealer`.
    """

    initial_probability: float = 0.99
    dial: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        if not (_is_number(self.initial_probability) and 0.5 < self.initial_probability < 1):
            raise PagError(
                f"gate.initial_probability={self.initial_probability!r}: expected a number "
                "between 0.5 and 1 (exclusive), so that gates start open; try 0.99"
            )
        if not isinstance(self.dial, bool):
            raise PagError(f"gate.dial={self.dial!r}: expected true or false")


@dataclass(frozen=True)
class MultiPoolConfig:
    """Which convolutions let each pixel choose its pooling field, and out of which.

    Args:
        dilations: Factors on a convolution's own dilation, one branch each, in rising order;
            1, which is the pretrained convolution, must be among them.
        identity: Offer a branch without neighbours too (dilation 0): the cheap one that a budget
            below the cost of one branch per pixel needs. It is what `RetrofitConfig.bypass` says
            for a convolution: its input where channels agree, or the collapsed 1x1 kernel.
        sites: Shell-style patterns of names of convolutions. None takes the square ones larger
            than 1x1 whose output has the lowest resolution of the network (of its `encoder`, if
            it has one); `()` none.
        shared: All dilations use the pretrained kernel itself; else each trains a copy of it.
        aspp: Let each pixel choose among the branches of every atrous spatial pyramid pooling
            module too.

    Raises:
        PagError: A field has a value that is not valid.
    """

    dilations: tuple[int, ...] = (1, 2, 4, 8, 16)
    identity: bool = True
    sites: tuple[str, ...] | None = None
    shared: bool = True
    aspp: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        given = self.dilations
        listed = isinstance(given, Sequence) and all(
            isinstance(factor, int) and not isinstance(factor, bool) and factor > 0
            for factor in given
        )
        if not listed or list(given) != sorted({1, *given}):
            raise PagError(
                f"multipool.dilations={given!r}: expected different positive integers in rising "
                "order, 1 among them, such as (1, 2, 4)"
            )
        object.__setattr__(self, "dilations", tuple(given))
        for name in ("identity", "shared", "aspp"):
            if not isinstance(getattr(self, name), bool):
                raise PagError(f"multipool.{name}={getattr(self, name)!r}: expected true or false")
        if self.sites is not None:
            object.__setattr__(self, "sites", _patterns("multipool.sites", self.sites))
        if len(self.factors) < 2:
            raise PagError("multipool offers one branch only: add dilations, or the identity")

    @property
    def factors(self) -> tuple[int, ...]:
        """Factor on the dilation, per branch; 0 is the identity."""
        return (0, *self.dilations) if self.identity else self.dilations


@dataclass(frozen=True)
class RetrofitConfig:
    """What is gated and how.

    Args:
        scope: `"branch"` gates whole residual branches, and convolutions outside them;
            `"conv"` gates only convolutions larger than 1x1, as the paper does.
        bypass: What a closed pixel of a gated convolution gets instead. `"identity"` is its
            input (where channels agree, else collapsed), `"collapsed"` a 1x1 convolution made
            of the kernel summed over its taps, `"coarse"` interpolated from the output at every
            second pixel of every second row, which is then computed in any case: best where
            outputs are smooth, but nothing below a quarter of the convolution. `"auto"` is
            collapsed in scope `"branch"` and identity in scope `"conv"`. Convolutions of 1x1 are
            coarse unless they pass on their input; truncation collapses what is larger. Residual
            branches always fall back to their shortcut.
        policy: Who decides. `"pixel"` is PAG: each pixel, by its features. The others are what it
            is compared with: `"layer"` computes a site or skips it, per image; `"random"` and
            `"grid"` compute pixels at random or on a regular grid, at rates that are learned;
            `"truncation"` drops the last sites of each stage for good, to come as close to the
            budget as it can. With these three outputs change at once.
        include: Shell-style patterns of site names; a site is gated if any matches.
        exclude: Patterns of site names that stay dense. The convolutions of a branch that is
            excluded may be sites of their own: `"layer1.0"` excludes the branch, `"layer1.0*"` all
            of it.
        min_share: Sites below this fraction of the network's MACs stay dense: a gate there
            costs more time than it can save.
        gate: How gates start.
        multipool: Where each pixel chooses its pooling field; default nowhere. Such a convolution
            gets no gate of its own.

    Raises:
        PagError: A field has an unknown value.
    """

    scope: str = "branch"
    bypass: str = "auto"
    policy: str = "pixel"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    min_share: float = 0.002
    gate: GateConfig = field(default_factory=GateConfig)
    multipool: MultiPoolConfig | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        choices = (("scope", SCOPES), ("bypass", BYPASSES), ("policy", POLICIES))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise PagError(f"{name}={getattr(self, name)!r}: expected one of {allowed}")
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        if not (_is_number(self.min_share) and 0 <= self.min_share < 1):
            raise PagError(f"min_share={self.min_share!r}: expected a fraction in [0, 1)")
        if not isinstance(self.gate, GateConfig):
            raise PagError(f"gate={self.gate!r}: expected a GateConfig")
        if not isinstance(self.multipool, MultiPoolConfig | None):
            raise PagError(f"multipool={self.multipool!r}: expected a MultiPoolConfig, or None")

    def only(self, sites: Iterable[str]) -> RetrofitConfig:
        """The same for these sites alone, whatever `include` and `exclude` said."""
        return replace(self, include=tuple(glob.escape(name) for name in sites), exclude=())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, with the version of the format."""
        return {"version": CONFIG_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RetrofitConfig:
        """Build a configuration from plain values, as `to_dict` gives them.

        Raises:
            PagError: A key is unknown, a value is not valid, or the version is newer.
        """
        if not isinstance(values, Mapping):
            raise PagError(f"{values!r}: expected a mapping of fields to values")
        known = dict(values)
        version = known.pop("version", CONFIG_VERSION)
        if version != CONFIG_VERSION:
            raise PagError(
                f"version={version!r} of a retrofit configuration: this release reads version "
                f"{CONFIG_VERSION}; upgrade pag-retrofit"
            )
        parts: dict[str, Any] = {}
        for key, kind in (("gate", GateConfig), ("multipool", MultiPoolConfig)):
            given = known.pop(key, None)
            if given is not None:
                parts[key] = kind(**_known_fields(given, kind, f"{key} configuration"))
        return cls(**_known_fields(known, cls, "retrofit configuration"), **parts)


def _known_fields(values: Mapping[str, Any], kind: Any, owner: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise PagError(f"{owner} {values!r}: expected a mapping of fields to values")
    allowed = {f.name for f in fields(kind)}
    unknown = sorted(set(values) - allowed)
    if unknown:
        raise PagError(f"unknown keys {unknown} in the {owner}: expected {sorted(allowed)}")
    return dict(values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    if not listed or not all(isinstance(item, str) for item in value):
        raise PagError(f"{name}={value!r}: expected a sequence of patterns, such as ('decoder.*',)")
    return tuple(value)
