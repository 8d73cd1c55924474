"""Gate an SMP network, look at the plan, measure, save, load.

Shows the whole interface except training, on a U-Net with random weights (no download; yours
would come trained). An untrained gate is open everywhere, so masks are forced here to show what
closing half of the pixels would save.

    python examples/retrofit_smp.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import segmentation_models_pytorch as smp
import torch

import pag_retrofit as pag

SHAPE = (1, 3, 96, 128)


def main() -> None:
    """Run the example."""
    torch.manual_seed(0)
    model = smp.Unet("mobilenet_v2", encoder_weights=None, classes=11).eval()
    images = torch.rand(SHAPE)

    print(pag.plan(model, budget=0.7, example_input=SHAPE))
    gated = pag.retrofit(model, budget=0.7, example_input=SHAPE)

    with torch.no_grad():
        print("same outputs as before:", torch.equal(gated(images), model(images)))
        for density in (1.0, 0.5, 0.0):
            with pag.override_gates(gated, density), pag.measure(gated) as measured:
                gated(images)
            print(f"{density:.0%} of the pixels open: {measured.fraction:.1%} of the compute")

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "gated.safetensors"
            pag.save_file(gated, path)
            again = pag.load_file(path)  # builds the U-Net by its recorded name and arguments
        print("same outputs after loading:", torch.equal(again(images), gated(images)))


if __name__ == "__main__":
    main()
