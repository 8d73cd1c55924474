"""Pictures are read back as pixels and as what was drawn."""

from __future__ import annotations

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from networks import CustomNet
from PIL import Image

import pag_retrofit as pag
from pag_retrofit.pictures import (
    DOTS_PER_INCH,
    branch_panel,
    latency_chart,
    map_panel,
    open_rates_chart,
    prediction_panel,
    relative_compute_map,
    save_figure,
    tradeoff_chart,
)

PALETTE = np.array([[200, 30, 30], [30, 30, 200]], dtype=np.uint8)
CLASSES = ("red", "blue")


def sample(rows=2, height=24, width=32):
    """Images of one grey; labels 0 left and 1 right, predictions the other way round."""
    image = torch.full((rows, 3, height, width), 0.5)
    label = torch.zeros(rows, height, width, dtype=torch.int64)
    label[:, :, width // 2 :] = 1
    compute_map = torch.linspace(0.2, 1.0, rows).view(-1, 1, 1).expand(rows, height, width)
    return image, label, 1 - label, compute_map.clone()


def panel(**changes):
    image, label, prediction, compute_map = sample()
    arguments = {"palette": PALETTE, "classes": CLASSES, **changes}
    return prediction_panel(
        arguments.pop("image", image),
        arguments.pop("label", label),
        arguments.pop("prediction", prediction),
        arguments.pop("compute_map", compute_map),
        **arguments,
    )


def pixels(figure):
    """(H, W, 3) uint8 as drawn."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


def colour_at(figure, axes, x, y):
    """Colour at a place given in fractions of axes, y from the bottom."""
    left, bottom, width, height = axes.get_position().bounds
    drawn = pixels(figure)
    row = int((1 - bottom - y * height) * drawn.shape[0])
    return drawn[row, int((left + x * width) * drawn.shape[1])]


def texts(figure):
    found = figure.findobj(matplotlib.text.Text)
    return [text.get_text() for text in found if text.get_text()]


def test_the_panel_shows_each_part_in_its_place():
    figure = panel()
    image, label, prediction, _ = figure.axes[:4]
    assert np.abs(colour_at(figure, image, 0.5, 0.5).astype(int) - 128).max() <= 1
    assert tuple(colour_at(figure, label, 0.2, 0.5)) == tuple(PALETTE[0])
    assert tuple(colour_at(figure, label, 0.8, 0.5)) == tuple(PALETTE[1])
    assert tuple(colour_at(figure, prediction, 0.2, 0.5)) == tuple(PALETTE[1])
    assert tuple(colour_at(figure, prediction, 0.8, 0.5)) == tuple(PALETTE[0])


def test_images_are_upright_and_in_rgb():
    image = torch.zeros(2, 3, 24, 32)
    image[:, 0, :12] = 1  # red above
    image[:, 2, 12:] = 1  # blue below
    figure = panel(image=image)
    assert tuple(colour_at(figure, figure.axes[0], 0.5, 0.9)) == (255, 0, 0)
    assert tuple(colour_at(figure, figure.axes[0], 0.5, 0.1)) == (0, 0, 255)


def test_all_rows_share_the_scale_of_compute():
    figure = panel()  # 0.2 everywhere in the first row, 1.0 in the second
    colours = matplotlib.colormaps["viridis"]
    for axes, value in ((figure.axes[3], 0.0), (figure.axes[7], 1.0)):
        drawn = colour_at(figure, axes, 0.3, 0.7).astype(int)
        assert np.abs(drawn - np.array(colours(value)[:3]) * 255).max() <= 1
    assert figure.axes[3].images[0].norm is figure.axes[7].images[0].norm
    assert {"20", "60", "100", "mean 20%", "mean 100%"} <= set(texts(figure))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.42, 0.88, (0.40, 0.90)), (1.0, 1.0, (0.9, 1.0)), (0.31, 1.02, (0.30, 1.05))],
)
def test_the_scale_is_rounded_outwards(low, high, expected):
    compute_map = sample()[3]
    compute_map[0], compute_map[1] = low, high
    norm = panel(compute_map=compute_map).axes[3].images[0].norm
    assert (norm.vmin, norm.vmax) == pytest.approx(expected)


def test_void_is_grey_and_in_the_legend_only_where_it_occurs():
    label = sample()[1]
    label[0, :, :16] = 255
    figure = panel(label=label)
    assert len(set(colour_at(figure, figure.axes[1], 0.2, 0.5))) == 1
    assert "void" in texts(figure)
    assert "void" not in texts(panel())
    assert set(CLASSES) <= set(texts(panel()))


def test_the_panel_is_as_wide_as_a_readme_and_keeps_the_aspect():
    figure = panel(title="a title")
    assert pixels(figure).shape[1] == 9 * DOTS_PER_INCH
    for axes in figure.axes[:8]:
        box = axes.get_window_extent()
        assert box.width / box.height == pytest.approx(32 / 24, rel=0.01)
        assert 0 < box.x0 and box.x1 < pixels(figure).shape[1]
    assert "a title" in texts(figure)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": torch.zeros(2, 1, 24, 32)}, r"image has shape \(2, 1, 24, 32\)"),
        ({"label": torch.zeros(2, 24, 31)}, "label has shape"),
        ({"compute_map": torch.zeros(2, 1, 24, 32)}, "compute_map has shape"),
        ({"classes": ("red",)}, "palette has shape"),
    ],
)
def test_wrong_shapes_are_named(changes, message):
    with pytest.raises(pag.PagError, match=message):
        panel(**changes)


def test_the_relative_map_of_an_image_averages_to_its_fraction():
    gated = pag.retrofit(CustomNet().eval(), 0.9, example_input=(1, 3, 32, 32))
    with torch.no_grad(), pag.measure(gated) as measured:
        with pag.override_gates(gated, 0.5, pattern="rows"):
            gated(torch.zeros(2, 3, 32, 32))
        gated(torch.zeros(2, 3, 32, 32))  # open: another pass does not change the unit
    relative = relative_compute_map(measured)
    assert relative.shape == (2, 32, 32)
    with torch.no_grad(), pag.measure(gated) as last:
        gated(torch.zeros(2, 3, 32, 32))
    assert float(relative.mean()) == pytest.approx(last.fraction)


def bars(axes):
    """Widths of the coloured bars, from top to bottom."""
    top = axes.containers[-1].patches
    return [bar.get_width() for bar in sorted(top, key=lambda bar: bar.get_y())]


def test_open_rates_are_grouped_and_drawn_to_scale():
    rates = {"encoder.a": 0.25, "decoder.x": 1.0, "encoder.b": 0.0, "head": 0.5}
    shares = {"encoder.a": 0.5, "encoder.b": 0.1, "decoder.x": 0.3, "head": 0.05, "other": 0.05}
    figure = open_rates_chart(rates, shares, title="a title")
    left, right = figure.axes
    assert bars(left) == [25, 0, 100, 50]  # encoder's two together
    assert bars(right) == [50, 10, 30, 5]
    assert left.get_xlim() == (0, 100)
    written = texts(figure)
    assert {"a title", "encoder", "a", "b", "decoder.x", "head", "25", "100"} <= set(written)
    assert "decoder" not in written  # a group of one needs no heading
    colours = [bar.get_facecolor() for bar in left.containers[-1].patches]
    assert colours[0] == colours[1] and len(set(colours)) == 3


@pytest.mark.parametrize("count", [1, 22, 60])
def test_names_of_sites_neither_overlap_nor_leave_the_picture(count):
    sites = [f"encoder.stages.{i}.blocks.{i}.conv{i}.0" for i in range(count)]
    figure = open_rates_chart(dict.fromkeys(sites, 0.5), dict.fromkeys(sites, 0.01))
    figure.canvas.draw()
    names = [text for text in figure.axes[0].texts if "stages" in text.get_text()]
    boxes = sorted((name.get_window_extent() for name in names), key=lambda box: -box.y0)
    assert len(boxes) == count
    assert all(box.x0 > 0 for box in boxes)
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in zip(boxes, boxes[1:], strict=False))


def test_a_site_without_share_is_named():
    with pytest.raises(pag.PagError, match="encoder.b"):
        open_rates_chart({"encoder.a": 0.1, "encoder.b": 0.1}, {"encoder.a": 0.1})
    with pytest.raises(pag.PagError, match="0 sites"):
        open_rates_chart({}, {})


def test_the_tradeoff_is_drawn_in_the_order_of_compute():
    figure = tradeoff_chart(
        {"gated": [(0.9, 0.68), (0.5, 0.66), (0.7, 0.67)]}, {"dense": 0.681}, metric="mIoU"
    )
    (axes,) = figure.axes
    line, reference = axes.lines
    assert np.allclose(line.get_xydata(), [(50, 0.66), (70, 0.67), (90, 0.68)])
    assert list(reference.get_ydata()) == [0.681, 0.681]
    assert {"gated", "dense 0.681", "0.670", "mIoU"} <= set(texts(figure))


def test_names_at_the_tradeoff_do_not_overlap():
    figure = tradeoff_chart(
        {"gated": [(0.9, 0.68)], "other": [(0.9, 0.68)], "none": []}, {"a": 0.68, "b": 0.6801}
    )
    figure.canvas.draw()
    names = [text for text in figure.axes[0].texts if text.get_position()[0] > 1]
    boxes = sorted((name.get_window_extent() for name in names), key=lambda box: box.y0)
    assert len(boxes) == 4
    assert all(low.y1 <= high.y0 for low, high in zip(boxes, boxes[1:], strict=False))
    with pytest.raises(pag.PagError, match="at least one"):
        tradeoff_chart({"gated": []}, {})


def test_saving_writes_what_was_drawn(tmp_path):
    figure = panel()
    save_figure(figure, tmp_path / "new" / "panel.png")
    saved = np.asarray(Image.open(tmp_path / "new" / "panel.png").convert("RGB"))
    assert np.array_equal(saved, pixels(figure))


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "panel.png"
    path.write_bytes(b"old")
    figure = panel()

    def fail(target, **_):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        save_figure(figure, path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["panel.png"]


def test_an_unknown_format_is_named(tmp_path):
    with pytest.raises(pag.PagError, match=r"panel\.xyz.*png"):
        save_figure(panel(), tmp_path / "panel.xyz")


def test_no_global_state_of_matplotlib_is_touched():
    code = (
        "import sys, pag_retrofit; assert 'matplotlib' not in sys.modules\n"
        "import pag_retrofit.pictures; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_each_pixel_shows_its_branch():
    image = torch.full((2, 3, 24, 32), 0.5)
    left_right = torch.tensor([[1, 4]]).expand(2, 3, 2)
    all_and_none = torch.tensor([[[-1], [0]], [[0], [-1]]])
    figure = branch_panel(image, {"layer4.conv": left_right, "aspp": all_and_none})
    axes = figure.axes
    assert len(axes) == 2 * 3
    assert np.abs(colour_at(figure, axes[0], 0.5, 0.5).astype(int) - 128).max() <= 1
    near, far = (tuple(colour_at(figure, axes[1], x, 0.5)) for x in (0.2, 0.8))
    assert near != far
    top, bottom = (tuple(colour_at(figure, axes[2], 0.5, y)) for y in (0.8, 0.2))
    second = axes[5]
    assert (tuple(colour_at(figure, second, 0.5, 0.8)), top) == (bottom, top)
    assert len({near, far, top, bottom}) == 4
    legend = figure.legends[0]
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["all branches", "no neighbours", "dilation 1", "dilation 4"]
    shown = [tuple((255 * np.array(p.get_facecolor()[:3])).round()) for p in legend.get_patches()]
    assert np.abs(np.array(shown) - np.array([top, bottom, near, far])).max() <= 1
    assert {"layer4.conv", "aspp", "image"} <= set(texts(figure))


def test_branch_maps_that_do_not_fit_are_refused():
    image = torch.rand(2, 3, 24, 32)
    with pytest.raises(pag.PagError, match="one to 4 sites"):
        branch_panel(image, {})
    with pytest.raises(pag.PagError, match="branch_maps of .'a'.: expected shapes .2, h, w."):
        branch_panel(image, {"a": torch.zeros(1, 3, 3, dtype=torch.int64)})


def test_the_latency_chart_shows_each_network_and_the_ideal():
    figure = latency_chart({"a": [(0.5, 1.6), (1.0, 0.9)], "b": [(0.3, 2.0)]}, title="T")
    (axes,) = figure.axes
    ideal, _, first, second = axes.lines
    x, y = ideal.get_data()
    assert np.allclose(x * y, 100)
    assert list(zip(*first.get_data(), strict=True)) == [(50, 1.6), (100, 0.9)]
    assert second.get_label() == "b"
    assert axes.get_ylim()[1] > 2.0
    with pytest.raises(pag.PagError, match="at least one"):
        latency_chart({"a": []})
    figure = latency_chart({"a": [], "b": [(0.5, 1.6)]}, title=r"of $\lr$")  # no formula
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()][-1] == "b"
    figure.canvas.draw()


@pytest.mark.parametrize(("kind", "channels"), [("boundaries", 1), ("depth", 1), ("normals", 3)])
def test_map_panel_shows_targets_and_predictions(kind: str, channels: int) -> None:
    image, compute = torch.rand(2, 3, 24, 32), torch.rand(2, 24, 32)
    target = torch.rand(2, channels, 24, 32) + 0.1
    target[:, :, :6] = 0
    prediction = (0.5 * target).requires_grad_()
    figure = map_panel(image, target, prediction, compute, kind=kind, title="title")
    map_panel(image, target, target.bfloat16(), compute, kind=kind)
    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]
    assert len(shown) >= 8
    first, second = shown[1], shown[2]
    if kind == "boundaries":
        assert np.allclose(first[..., 0], 1 - target[0, 0].clamp(max=1).numpy())
    else:
        assert (first[:6] == 0).all() and (first[6:] != second[6:]).any()
    with pytest.raises(pag.PagError, match="target has shape"):
        map_panel(image, target[:, :, 1:], target, compute, kind=kind)
    for wrong in (compute[:1], compute[:, :12], torch.rand(3, 24, 32)):
        with pytest.raises(pag.PagError, match="compute_map has shape"):
            map_panel(image, target, target, wrong, kind=kind)
    with pytest.raises(pag.PagError, match=r"image has shape \(0, 3"):
        map_panel(image[:0], target[:0], target[:0], compute[:0], kind=kind)
    with pytest.raises(pag.PagError, match="kind='poses'"):
        map_panel(image, target, target, compute, kind="poses")
