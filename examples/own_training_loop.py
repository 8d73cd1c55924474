"""Fine-tune a gated network to a budget in a training loop of your own, with accelerate.

The three lines that gating adds to a loop are marked. Data are the embedded rendered scenes; the
network starts from random weights and trains for seconds, so only the compute is worth a look.

    python examples/own_training_loop.py
    accelerate launch examples/own_training_loop.py
"""

from __future__ import annotations

import segmentation_models_pytorch as smp
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import pag_retrofit as pag
from pag_retrofit.data import Scenes

BUDGET = 0.7
EPOCHS = 4


def main() -> None:
    """Run the example."""
    torch.manual_seed(0)
    # This decoder leaves the deepest layers of its encoder out, so some weights have no gradient.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(kwargs_handlers=[unused])
    scenes = Scenes(32, size=(64, 64), seed=0)
    model = smp.Unet(
        "resnet18",
        encoder_depth=3,
        decoder_channels=(32, 16, 16),
        encoder_weights=None,
        classes=len(scenes.classes),
    )
    gated = pag.retrofit(model, BUDGET, example_input=(1, 3, 64, 64))

    gates = pag.gate_parameters(gated)  # 1: a higher learning rate for the gates
    others = [p for p in gated.parameters() if all(p is not gate for gate in gates)]
    optimizer = torch.optim.AdamW([{"params": others, "lr": 1e-3}, {"params": gates, "lr": 5e-2}])
    loader = DataLoader(scenes, batch_size=4, shuffle=True, drop_last=True)
    wrapped, optimizer, loader = accelerator.prepare(gated, optimizer, loader)
    annealer = pag.Annealer(gated, total_steps=EPOCHS * len(loader))

    for epoch in range(EPOCHS):
        wrapped.train()
        for batch in loader:
            task_loss = cross_entropy(wrapped(batch["image"]), batch["label"])
            loss = task_loss + 10 * pag.sparsity_loss(gated)  # 2: pulls towards the target
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            annealer.step()  # 3: lowers the target and the temperature
        expected = pag.expected_fraction(gated).item()
        accelerator.print(
            f"epoch {epoch + 1}: task loss {task_loss.item():.3f}, compute {expected:.3f}, "
            f"target {annealer.rho:.3f}"
        )

    batches = [batch["image"] for batch in loader]
    if accelerator.is_main_process:  # on its share of the images; here you would also save it
        for budget, fraction in pag.calibrate(gated, batches, budgets=(0.8, BUDGET)).items():
            print(f"budget {budget}: {fraction:.3f} measured after calibration")


if __name__ == "__main__":
    main()
