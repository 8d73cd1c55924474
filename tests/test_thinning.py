"""Thinning eight cuts at once gives what scikit-image makes of each."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import uniform_filter
from skimage.morphology import thin

from pag_retrofit.thinning import thin_cuts


def test_all_masks_of_four_by_four_pixels() -> None:
    """Whatever the neighbours of a pixel are, in either half of a step."""
    masks = (np.arange(2**16)[:, None] >> np.arange(16) & 1).reshape(256, 256, 4, 4)
    tiles = np.pad(masks, ((0, 0), (0, 0), (1, 1), (1, 1))).swapaxes(1, 2).reshape(1536, 1536)
    (thinned,) = thin_cuts(tiles, np.array([1]))
    assert np.array_equal(thinned, thin(tiles))


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 40), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_each_cut_is_thinned_by_itself(seed: int, height: int, width: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    values = uniform_filter(generator.random((height, width)), generator.integers(1, 6))
    heights = np.sort(generator.uniform(values.min(), values.max(), count))
    thinned = list(thin_cuts(values, heights))
    assert len(thinned) == count
    for cut, least in zip(thinned, heights, strict=True):
        assert cut.dtype == bool
        assert np.array_equal(cut, thin(values >= least))
