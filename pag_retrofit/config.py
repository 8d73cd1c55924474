"""Configuration of a retrofit: frozen, versioned, and the same as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pag_retrofit.errors import PagError

CONFIG_VERSION = 1
SCOPES = ("branch", "conv")
BYPASSES = ("auto", "identity", "collapsed")


@dataclass(frozen=True)
class GateConfig:
    """How gates start.

    Args:
        initial_probability: Probability of computing a pixel right after the retrofit, in
            (0.5, 1). Above 0.5 every gate is open in evaluation, so outputs do not change.
    """

    initial_probability: float = 0.99

    def __post_init__(self) -> None:
        """Check the fields."""
        if not 0.5 < self.initial_probability < 1:
            raise PagError(
                f"gate.initial_probability={self.initial_probability!r}: expected a number "
                "between 0.5 and 1 (exclusive), so that gates start open; try 0.99"
            )


@dataclass(frozen=True)
class RetrofitConfig:
    """What is gated and how.

    Args:
        scope: `"branch"` gates whole residual branches, and convolutions outside them;
            `"conv"` gates only convolutions larger than 1x1, as the paper does.
        bypass: What a closed pixel of a gated convolution gets instead. `"identity"` is its
            input (where channels agree, else collapsed), `"collapsed"` a 1x1 convolution made
            of the kernel summed over its taps, `"auto"` collapsed in scope `"branch"` and
            identity in scope `"conv"`. Residual branches always fall back to their shortcut.
        include: Shell-style patterns of site names; a site is gated if any matches.
        exclude: Patterns of site names that stay dense.
        min_share: Sites below this fraction of the network's MACs stay dense: a gate there
            costs more time than it can save.
        gate: How gates start.

    Raises:
        PagError: A field has an unknown value.
    """

    scope: str = "branch"
    bypass: str = "auto"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    min_share: float = 0.002
    gate: GateConfig = field(default_factory=GateConfig)

    def __post_init__(self) -> None:
        """Check the fields."""
        for name, allowed in (("scope", SCOPES), ("bypass", BYPASSES)):
            if getattr(self, name) not in allowed:
                raise PagError(f"{name}={getattr(self, name)!r}: expected one of {allowed}")
        for name in ("include", "exclude"):
            value = getattr(self, name)
            listed = isinstance(value, Sequence) and not isinstance(value, str)
            if not listed or not all(isinstance(item, str) for item in value):
                raise PagError(
                    f"{name}={value!r}: expected a sequence of patterns, such as ('decoder.*',)"
                )
            object.__setattr__(self, name, tuple(value))
        if not 0 <= self.min_share < 1:
            raise PagError(f"min_share={self.min_share!r}: expected a fraction in [0, 1)")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, with the version of the format."""
        return {"version": CONFIG_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RetrofitConfig:
        """Build a configuration from plain values, as `to_dict` gives them.

        Raises:
            PagError: A key is unknown, a value is not valid, or the version is newer.
        """
        known = dict(values)
        version = known.pop("version", CONFIG_VERSION)
        if version != CONFIG_VERSION:
            raise PagError(
                f"version={version!r} of a retrofit configuration: this release reads version "
                f"{CONFIG_VERSION}; upgrade pag-retrofit"
            )
        gate = dict(known.pop("gate", {}))
        for owner, given, allowed in (
            ("retrofit configuration", known, {f.name for f in fields(cls)} - {"gate"}),
            ("gate configuration", gate, {f.name for f in fields(GateConfig)}),
        ):
            unknown = sorted(set(given) - allowed)
            if unknown:
                raise PagError(f"unknown keys {unknown} in the {owner}: expected {sorted(allowed)}")
        return cls(gate=GateConfig(**gate), **known)
