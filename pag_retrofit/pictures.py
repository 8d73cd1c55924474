"""Pictures: predictions with compute maps, open rates per layer, metric against compute.

Drawn with matplotlib's object-oriented interface on the Agg canvas: no display, no global state.
All are 9 inches wide, that is 900 pixels in a README, and saved at 1.5 times that resolution.
Nothing in this module is imported by `import pag_retrofit`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from pag_retrofit.errors import PagError
from pag_retrofit.measurement import Measurement

DOTS_PER_INCH = 150
_WIDTH = 9.0
_SERIES = (  # Okabe and Ito, then Tol
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#332288",
)  # fmt: skip
_MARKERS = "osD^vPX*"
_COMPUTE_COLOURS = "viridis"
_VOID = (64, 64, 64)
_INK, _FAINT, _TRACK = "#222222", "#767676", "#ececec"

# Inches: places are computed, not left to a layout engine.
_MARGIN, _GAP, _TITLE, _HEAD = 0.08, 0.06, 0.28, 0.26
_LEGEND_COLUMNS, _LEGEND_LINE = 6, 0.2
_MOST_SITES, _WIDEST_IMAGE = 4, 3.0
_MAP_CHANNELS = {"boundaries": 1, "depth": 1, "normals": 3}
_COLUMNS = ("image", "label", "prediction", "compute (% of dense)")


def relative_compute_map(measured: Measurement) -> Tensor:
    """Compute of each input pixel as a fraction of what the original network spends per pixel.

    Args:
        measured: Of forward passes whose inputs all had the size of the last one.

    Returns:
        (B, H, W) float64 for the last forward pass; its mean is that pass's compute fraction.

    Raises:
        PagError: Nothing was measured.
    """
    compute = measured.compute_map
    dense = measured.total_macs / (measured.images * compute.shape[1] * compute.shape[2])
    return compute / dense


def prediction_panel(
    image: Tensor,
    label: Tensor,
    prediction: Tensor,
    compute_map: Tensor,
    *,
    palette: np.ndarray,
    classes: Sequence[str],
    title: str = "",
) -> Figure:
    """Draw a row per sample: image, label, prediction, and where the compute went.

    The colours of the compute maps mean the same in all rows: they span the values of all maps,
    rounded outwards to 5 points. A map's mean stands in its corner.

    Args:
        image: (B, 3, H, W) float in [0, 1], not normalised.
        label: (B, H, W) int64; values outside the classes are void and drawn dark grey.
        prediction: (B, H, W) int64.
        compute_map: (B, H, W) float, fraction of dense compute; see `relative_compute_map`.
        palette: (num_classes, 3) uint8 RGB.
        classes: Names for the legend.
        title: Above the panel; default none.

    Raises:
        PagError: The shapes do not fit each other, or palette and classes do not.
    """
    _check_panel(image, (label, prediction, compute_map), palette, classes)
    label, prediction = label.cpu(), prediction.cpu()
    void = bool(_is_void(label, len(classes)).any() or _is_void(prediction, len(classes)).any())
    columns = (
        [_picture(picture) for picture in image],
        [_coloured(picture, palette) for picture in label],
        [_coloured(picture, palette) for picture in prediction],
    )
    return _panel(columns, compute_map, _COLUMNS, title, _legend_patches(palette, classes, void))


def map_panel(
    image: Tensor,
    target: Tensor,
    prediction: Tensor,
    compute_map: Tensor,
    *,
    kind: str,
    title: str = "",
) -> Figure:
    """Draw a row per sample: image, target, prediction, and where the compute went.

    Depths are coloured from near (bright) to far, alike in target and prediction of a row; normals
    (x, y, z) as red, green, blue; where there is no reading both are black in the target.

    Args:
        image: (B, 3, H, W) float in [0, 1], not normalised.
        target: (B, C, H, W): boundary strength in [0, 1], metres (0 unknown), or unit normals (0
            unknown).
        prediction: (B, C, H, W), as the target.
        compute_map: (B, H, W) float, fraction of dense compute; see `relative_compute_map`.
        kind: `"boundaries"`, `"depth"` or `"normals"`.
        title: Above the panel; default none.

    Raises:
        PagError: The kind is unknown, or the shapes do not fit each other.
    """
    if kind not in _MAP_CHANNELS:
        raise PagError(f"kind={kind!r}: expected one of {tuple(_MAP_CHANNELS)}")
    expected = (len(image), _MAP_CHANNELS[kind], *image.shape[2:])
    _check_shapes(image, {"target": target, "prediction": prediction}, expected)
    _check_shapes(image, {"compute_map": compute_map}, (len(image), *image.shape[2:]))
    maps = (part.detach().float().cpu() for part in (target, prediction))
    drawn = [_drawn(kind, *pair) for pair in zip(*maps, strict=True)]
    columns = ([_picture(picture) for picture in image], *map(list, zip(*drawn, strict=True)))
    names = ("image", "target", "prediction", _COLUMNS[-1])
    return _panel(columns, compute_map, names, title, [])


def _picture(image: Tensor) -> np.ndarray:
    return np.asarray(image.detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy())


def _drawn(kind: str, target: Tensor, prediction: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Target and prediction as colours (H, W, 3)."""
    if kind == "boundaries":
        pair = (1 - part.clamp(0, 1).expand(3, -1, -1) for part in (target, prediction))
        first, second = (_picture(part) for part in pair)
        return first, second
    known = (target != 0).any(0).numpy()
    if kind == "normals":
        first, second = (_picture((part + 1) / 2) for part in (target, prediction))
    else:
        farthest = max(float(target.max()), 1e-6)
        shades = colormaps["magma_r"]
        first, second = (shades((d[0] / farthest).numpy())[..., :3] for d in (target, prediction))
    return np.where(known[..., None], first, 0.0), second


def _panel(
    columns: Sequence[Sequence[np.ndarray]],
    compute_map: Tensor,
    names: Sequence[str],
    title: str,
    patches: list[Patch],
) -> Figure:
    """Columns of pictures and one of compute maps, with a legend and a scale below."""
    compute_map = compute_map.cpu()
    rows, height, width = compute_map.shape
    side = (_WIDTH - 2 * _MARGIN - 3 * _GAP) / 4
    tall = side * height / width
    foot = max(0.5, 0.15 + _LEGEND_LINE * math.ceil(len(patches) / _LEGEND_COLUMNS))
    head = _HEAD + (_TITLE if title else 0)
    total = head + rows * (tall + _GAP) + foot
    figure = _figure(total, title)
    scale = _common_scale(compute_map)
    for row in range(rows):
        pictures = (*(column[row] for column in columns), compute_map[row].numpy())
        bottom = total - head - row * (tall + _GAP) - tall
        for column, (name, picture) in enumerate(zip(names, pictures, strict=True)):
            axes = _axes(figure, (_MARGIN + column * (side + _GAP), bottom, side, tall))
            # Labels are not to be mixed where they are scaled down.
            kind = "nearest" if name in ("label", "prediction") else "auto"
            axes.imshow(
                picture, cmap=_COMPUTE_COLOURS, norm=scale, interpolation=kind, aspect="auto"
            )
            if row == 0:
                axes.set_title(name, fontsize=9, color=_INK, pad=4)
        _note_mean(axes, float(compute_map[row].double().mean()))
    if patches:
        _class_legend(figure, patches, foot - 0.02)
    bar = _axes(figure, (_MARGIN + 3 * (side + _GAP) + 0.1, foot - 0.16, side - 0.2, 0.1))
    _colour_bar(figure, bar, scale)
    return figure


def branch_panel(image: Tensor, branch_maps: Mapping[str, Tensor], *, title: str = "") -> Figure:
    """Draw a row per sample: the image, and which branch each pixel chose at each site.

    Args:
        image: (B, 3, H, W) float in [0, 1], not normalised.
        branch_maps: Site -> factor on the dilation (B, h, w), as `Measurement.branch_maps` has
            them; at most four sites.
        title: Above the panel; default none.

    Raises:
        PagError: There are no sites or more than four, or the shapes do not fit each other.
    """
    sites = list(branch_maps)
    if image.dim() != 4 or image.shape[1] != 3 or not 1 <= len(sites) <= _MOST_SITES:
        raise PagError(
            f"image has shape {tuple(image.shape)} and branch_maps holds {sites}: expected "
            f"(B, 3, H, W), and one to {_MOST_SITES} sites"
        )
    rows = len(image)
    wrong = [
        site for site in sites if branch_maps[site].dim() != 3 or len(branch_maps[site]) != rows
    ]
    if wrong:
        raise PagError(f"branch_maps of {wrong}: expected shapes ({rows}, h, w)")
    height, width = image.shape[2:]
    columns = len(sites) + 1
    side = min((_WIDTH - 2 * _MARGIN - len(sites) * _GAP) / columns, _WIDEST_IMAGE)
    tall = side * height / width
    foot, head = 0.36, _HEAD + (_TITLE if title else 0)
    total = head + rows * (tall + _GAP) + foot
    figure = _figure(total, title)
    factors = sorted({int(factor) for chosen in branch_maps.values() for factor in chosen.unique()})
    colours = _branch_colours(factors)
    for row in range(rows):
        pictures = {"image": image[row].detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy()}
        for site in sites:
            chosen = branch_maps[site][row].cpu().numpy()
            pictures[site] = np.stack([colours[int(f)] for f in chosen.flat]).reshape(
                *chosen.shape, 3
            )
        bottom = total - head - row * (tall + _GAP) - tall
        for column, (name, picture) in enumerate(pictures.items()):
            axes = _axes(figure, (_MARGIN + column * (side + _GAP), bottom, side, tall))
            axes.imshow(picture, interpolation="nearest", aspect="auto")
            if row == 0:
                axes.set_title(_shortened(name, side), fontsize=9, color=_INK, pad=4)
    patches = [Patch(facecolor=colours[f], label=_branch_name(f)) for f in factors]
    _class_legend(figure, patches, foot - 0.02)
    return figure


def open_rates_chart(
    open_rates: Mapping[str, float], shares: Mapping[str, float], *, title: str = ""
) -> Figure:
    """Draw how much of each site stays open, beside its share of the network's MACs.

    Sites stand in the order given, under the first part of their name where several share it.

    Args:
        open_rates: Site -> mean of its mask, in [0, 1].
        shares: Site -> fraction of the original network's MACs, in [0, 1].
        title: Above the chart; default none.

    Raises:
        PagError: There is no site, or a site has no share.
    """
    missing = [site for site in open_rates if site not in shares]
    if missing or not open_rates:
        raise PagError(
            f"open_rates has {len(open_rates)} sites, shares lacks {missing[:5]}: expected at "
            "least one site and a share of each, such as those of the plan"
        )
    lines = _grouped_lines(list(open_rates))
    high, bottom = 0.17 * len(lines), 0.42
    figure = _figure(bottom + high + _HEAD + 0.08 + (_TITLE if title else 0), title)
    # Room for the names, at about 0.066 inches a letter.
    left = min(0.35 + 0.066 * max(len(line.text) for line in lines), 3.5)
    rates = _axes(figure, (left, bottom, 6.5 - left, high))
    weights = _axes(figure, (6.85, bottom, 1.75, high))
    _write_names(rates, lines)
    places = [place for place, line in enumerate(lines) if line.site]
    sites = [line.site for line in lines if line.site]
    colours = [line.colour for line in lines if line.site]
    opened = [100 * open_rates[site] for site in sites]
    weight = [100 * shares[site] for site in sites]
    rates.barh(places, [100.0] * len(sites), height=0.72, color=_TRACK)
    rates.barh(places, opened, height=0.72, color=colours)
    weights.barh(places, weight, height=0.72, color=colours, alpha=0.55)
    _write_values(rates, places, opened)
    for axes, limit, heading in (
        (rates, 100.0, "open rate (%)"),
        (weights, 1.05 * max(*weight, 1e-6), "share of MACs (%)"),
    ):
        axes.set_xlim(0, limit)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.tick_params(bottom=True, labelbottom=True, labelsize=8, length=2)
        axes.set_title(heading, fontsize=9, color=_INK, pad=4, loc="left")
    return figure


def tradeoff_chart(
    points: Mapping[str, Sequence[tuple[float, float]]],
    reference: Mapping[str, float],
    *,
    metric: str = "mIoU",
    title: str = "",
    axis: str = "measured compute (% of the dense network's MACs)",
) -> Figure:
    """Draw a metric against the measured compute fraction, or another one.

    Args:
        points: Series -> (compute fraction, metric) of each network.
        reference: Dense network -> metric; dashed lines over the whole width.
        metric: Name on the axis; default `"mIoU"`.
        title: Above the chart; default none.
        axis: What the fractions are of; default compute.

    Raises:
        PagError: There is no point.
    """
    if not any(points.values()):
        raise PagError(f"points={dict(points)!r}: expected at least one (fraction, metric)")
    figure = _figure(4.2 + (_TITLE if title else 0), title)
    axes = _axes(figure, (0.75, 0.6, 6.15, 3.5))
    axes.tick_params(bottom=True, labelbottom=True, left=True, labelleft=True, labelsize=9)
    for side in ("left", "bottom"):
        axes.spines[side].set(visible=True, color=_FAINT)
    axes.grid(color=_TRACK, linewidth=0.8)
    axes.set_axisbelow(True)
    names = []
    styles = cycle(zip(_SERIES, _MARKERS, strict=True))
    for (name, series), (colour, marker) in zip(points.items(), styles, strict=False):
        if series:
            _draw_series(axes, series, colour, marker, valued=len(points) <= 2)
            names.append((max(series)[1], name, colour))
    for name, value in reference.items():
        axes.axhline(value, color=_FAINT, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
        names.append((value, f"{name} {value:.3f}", _FAINT))
    fractions = [fraction for series in points.values() for fraction, _ in series]
    axes.set_xlim(max(0.0, 100 * min(fractions) - 8), max(102, 100 * max(fractions) + 4))
    axes.margins(y=0.18)
    axes.set_xlabel(axis, fontsize=9, color=_INK)
    axes.set_ylabel(metric, fontsize=9, color=_INK)
    _name_lines(axes, names)
    return figure


def latency_chart(lines: Mapping[str, Sequence[tuple[float, float]]], *, title: str = "") -> Figure:
    """Draw speed-up against compute fraction, beside the line of time proportional to compute.

    Args:
        lines: Network -> (compute fraction, speed-up over the best dense runtime) of each mask.
        title: Above the chart; default none.

    Raises:
        PagError: There is no point.
    """
    points = [point for line in lines.values() for point in line]
    if not points:
        raise PagError(f"lines={dict(lines)!r}: expected at least one (fraction, speed-up)")
    figure = _figure(4.4 + (_TITLE if title else 0), title)
    axes = _axes(figure, (0.75, 0.6, 5.2, 3.7))
    axes.tick_params(bottom=True, labelbottom=True, left=True, labelleft=True, labelsize=9)
    for side in ("left", "bottom"):
        axes.spines[side].set(visible=True, color=_FAINT)
    axes.grid(color=_TRACK, linewidth=0.8)
    axes.set_axisbelow(True)
    highest = 1.15 * max(speed for _, speed in points)
    fractions = np.linspace(1 / highest, 1.0, 200)
    axes.plot(
        100 * fractions, 1 / fractions, color=_FAINT, linestyle=(0, (5, 3)), linewidth=1.2,
        label="time proportional to compute",
    )  # fmt: skip
    axes.axhline(1.0, color=_FAINT, linewidth=0.8)
    styles = product(("-", ":"), zip(_SERIES, _MARKERS, strict=True))  # repeated only then
    drawn = [(name, line) for name, line in lines.items() if line]
    for (name, line), (dashes, (colour, marker)) in zip(drawn, cycle(styles), strict=False):
        xs, ys = zip(*sorted(line), strict=True)
        axes.plot(
            [100 * x for x in xs], ys, color=colour, marker=marker, markersize=5, linewidth=1.6,
            linestyle=dashes, label=name,
        )  # fmt: skip
    axes.set_xlim(0, 105)
    axes.set_ylim(0, highest)
    axes.set_xlabel("compute (% of the dense network's MACs)", fontsize=9, color=_INK)
    axes.set_ylabel("speed-up", fontsize=9, color=_INK)
    axes.legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False, labelcolor=_INK
    )
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure whole or not at all; missing folders are made.

    Args:
        figure: Of this module or any other.
        path: The suffix names the format: `.png`, `.svg`, `.pdf`, ...

    Raises:
        PagError: matplotlib cannot write the format.
    """
    target = Path(path)
    known = FigureCanvasAgg.get_supported_filetypes()
    kind = target.suffix[1:].lower()
    if kind not in known:
        raise PagError(f"{target}: expected a suffix out of {sorted(known)}, such as .png")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial")
    try:
        figure.savefig(temporary, format=kind, dpi=DOTS_PER_INCH)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _figure(height: float, title: str) -> Figure:
    """An empty figure of the common width and a height in inches, with its title."""
    figure = Figure(figsize=(_WIDTH, height), dpi=DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    place = (_MARGIN / _WIDTH, 1 - 0.08 / height)
    figure.text(*place, title, fontsize=11, va="top", color=_INK, weight="bold", parse_math=False)
    return figure


def _axes(figure: Figure, box: tuple[float, float, float, float]) -> Axes:
    """Bare axes at (left, bottom, width, height) in inches."""
    left, bottom, wide, tall = box
    height = figure.get_figheight()
    axes = figure.add_axes((left / _WIDTH, bottom / height, wide / _WIDTH, tall / height))
    axes.set_facecolor("white")
    axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
    axes.tick_params(color=_FAINT, labelcolor=_INK)
    axes.spines[:].set_visible(False)
    return axes


def _check_panel(
    image: Tensor, maps: tuple[Tensor, ...], palette: np.ndarray, classes: Sequence[str]
) -> None:
    named = dict(zip(("label", "prediction", "compute_map"), maps, strict=True))
    _check_shapes(image, named, (image.shape[0], *image.shape[2:]))
    if palette.shape != (len(classes), 3):
        raise PagError(
            f"palette has shape {palette.shape}: expected ({len(classes)}, 3), a colour for each "
            f"of {list(classes)}"
        )


def _check_shapes(image: Tensor, maps: Mapping[str, Tensor], expected: tuple[int, ...]) -> None:
    if image.dim() != 4 or image.shape[1] != 3 or not len(image):
        raise PagError(f"image has shape {tuple(image.shape)}: expected (B, 3, H, W)")
    for name, part in maps.items():
        if tuple(part.shape) != expected:
            raise PagError(
                f"{name} has shape {tuple(part.shape)}: expected {expected}, as image is "
                f"{tuple(image.shape)}"
            )


def _is_void(label: Tensor, classes: int) -> Tensor:
    return (label < 0) | (label >= classes)


def _coloured(label: Tensor, palette: np.ndarray) -> np.ndarray:
    """Colours (H, W, 3) uint8 of a label map (H, W)."""
    table = np.vstack([palette, _VOID]).astype(np.uint8)
    void = len(palette)
    return np.asarray(table[label.masked_fill(_is_void(label, void), void).numpy()])


def _legend_patches(palette: np.ndarray, classes: Sequence[str], void: bool) -> list[Patch]:
    named = list(zip(classes, palette, strict=True))
    if void:
        named.append(("void", np.array(_VOID)))
    return [Patch(facecolor=colour / 255, label=name) for name, colour in named]


def _common_scale(compute_map: Tensor) -> Normalize:
    """From the smallest to the largest value in steps of 0.05, at least 0.1 apart."""
    values = compute_map.double()
    low = math.floor(float(values.min()) * 20 + 1e-6) / 20
    high = math.ceil(float(values.max()) * 20 - 1e-6) / 20
    low = max(0.0, min(low, high - 0.1))
    return Normalize(low, max(high, low + 0.1))


def _branch_colours(factors: Sequence[int]) -> dict[int, tuple[float, float, float]]:
    """Grey without neighbours, red for all branches at once, dilations from dark to light."""
    dilations = [factor for factor in factors if factor > 0]
    places = np.linspace(0.05, 0.95, max(len(dilations), 2))
    shades = colormaps[_COMPUTE_COLOURS](places)[:, :3]
    colours = {f: tuple(shade) for f, shade in zip(dilations, shades, strict=False)}
    return {0: (0.7, 0.7, 0.7), -1: (0.84, 0.37, 0.0), **colours}


def _branch_name(factor: int) -> str:
    special = {0: "no neighbours", -1: "all branches"}
    return special.get(factor, f"dilation {factor}")


def _shortened(name: str, inches: float) -> str:
    """The end of a name, as much as fits."""
    letters = int(inches / 0.075)
    return name if len(name) <= letters else "…" + name[1 - letters :]


def _class_legend(figure: Figure, patches: list[Patch], top: float) -> None:
    """Write the classes below the images, with the upper edge at `top` inches."""
    figure.legend(
        handles=patches,
        loc="upper left",
        bbox_to_anchor=((_MARGIN - 0.05) / _WIDTH, top / figure.get_figheight()),
        ncols=_LEGEND_COLUMNS,
        fontsize=8,
        frameon=False,
        handlelength=1.0,
        handleheight=1.0,
        columnspacing=1.2,
        borderpad=0.2,
        labelcolor=_INK,
    )


def _note_mean(axes: Axes, mean: float) -> None:
    axes.text(
        0.97,
        0.04,
        f"mean {mean:.0%}",
        transform=axes.transAxes,
        ha="right",
        va="bottom",
        fontsize=8,
        color="white",
        bbox={"facecolor": "black", "alpha": 0.6, "edgecolor": "none", "pad": 1.5},
    )


def _colour_bar(figure: Figure, axes: Axes, scale: Normalize) -> None:
    bar = figure.colorbar(ScalarMappable(scale, _COMPUTE_COLOURS), axes, orientation="horizontal")
    bar.outline.set_visible(False)
    low, high = float(scale.vmin or 0.0), float(scale.vmax or 1.0)
    ticks = np.linspace(low, high, 3)
    bar.set_ticks(list(ticks), labels=[f"{100 * tick:.3g}" for tick in ticks])
    axes.tick_params(bottom=True, labelbottom=True, labelsize=8, length=2, pad=2, color=_FAINT)


@dataclass(frozen=True)
class _Line:
    """A line of the open-rate chart: a site, or the heading of a group if `site` is empty."""

    text: str
    site: str
    colour: str


def _grouped_lines(sites: list[str]) -> list[_Line]:
    """Sites in their order, those with the same first part of the name together."""
    groups: dict[str, list[str]] = {}
    for site in sites:
        groups.setdefault(site.partition(".")[0], []).append(site)
    lines = []
    for (group, members), colour in zip(groups.items(), cycle(_SERIES), strict=False):
        if len(members) == 1:
            lines.append(_Line(members[0], members[0], colour))
            continue
        lines.append(_Line(group, "", colour))
        lines += [_Line(site.partition(".")[2] or site, site, colour) for site in members]
    return lines


def _write_names(axes: Axes, lines: list[_Line]) -> None:
    """Write sites to the left of their bars, and headings at the margin."""
    left, width = (inches * _WIDTH for inches in axes.get_position().bounds[::2])
    for place, line in enumerate(lines):
        axes.text(
            -0.06 / width if line.site else (_MARGIN - left) / width,
            place,
            line.text,
            transform=axes.get_yaxis_transform(),
            ha="right" if line.site else "left",
            va="center_baseline",
            fontsize=8,
            color=_INK if line.site else line.colour,
            fontweight="normal" if line.site else "bold",
        )


def _write_values(axes: Axes, places: list[int], values: list[float]) -> None:
    """Write each percentage at the end of its bar."""
    for place, value in zip(places, values, strict=True):
        inside = value > 12  # it fits into the bar
        axes.text(
            value + (-0.8 if inside else 0.8),
            place,
            f"{value:.0f}",
            ha="right" if inside else "left",
            va="center_baseline",
            fontsize=7,
            color="white" if inside else _INK,
        )


def _draw_series(
    axes: Axes, series: Sequence[tuple[float, float]], colour: str, marker: str, *, valued: bool
) -> None:
    """Draw points in the order of their compute, each with its value above it if there is room."""
    fractions, values = zip(*sorted((100 * f, value) for f, value in series), strict=True)
    axes.plot(fractions, values, marker=marker, markersize=6, linewidth=1.8, color=colour)
    for place in zip(fractions, values, strict=True) if valued else ():
        axes.annotate(
            f"{place[1]:.3f}",
            place,
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=colour,
        )


def _name_lines(axes: Axes, names: list[tuple[float, str, str]]) -> None:
    """Write names to the right of the axes at their values, pushed apart where they overlap."""
    low, high = axes.get_ylim()
    least = 0.055 * (high - low)
    place = -np.inf
    for value, name, colour in sorted(names):
        place = max(value, place + least)
        axes.text(
            1.015,
            (place - low) / (high - low),
            name,
            transform=axes.transAxes,
            va="center",
            fontsize=9,
            color=colour,
        )
