"""Fine-tune a gated network whose weights and optimizer states are shared out over processes.

For networks too large for one device; others train with `own_training_loop.py`, which keeps a copy
of the network in each process. Sharding is PyTorch's `fully_shard` (FSDP2) or DeepSpeed's ZeRO;
what gating adds to the loop is the same. At the end one process has the whole network again,
calibrates and saves it.

    torchrun --nproc-per-node 2 examples/sharded_training.py --strategy fsdp
    torchrun --nproc-per-node 2 examples/sharded_training.py --strategy zero3    # needs deepspeed
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import pag_retrofit as pag
from pag_retrofit.data import Scenes

BUDGET = 0.7
EPOCHS = 2
BATCH = 4
STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3")


def build(classes: int) -> nn.Module:
    """The gated network, alike in all processes."""
    torch.manual_seed(0)
    channels = (64, 32, 32, 16, 16)
    model = smp.Unet("resnet18", encoder_weights=None, decoder_channels=channels, classes=classes)
    return pag.retrofit(model, BUDGET, example_input=(1, 3, 64, 64))


def optimizer_of(gated: nn.Module) -> torch.optim.Optimizer:
    """AdamW with a higher learning rate for the gates."""
    gates = pag.gate_parameters(gated)
    others = [p for p in gated.parameters() if all(p is not gate for gate in gates)]
    return torch.optim.AdamW([{"params": others, "lr": 1e-3}, {"params": gates, "lr": 5e-2}])


class Copies:
    """A copy of the network in each process; with `sharded`, each layer's weights in shares."""

    def __init__(self, gated: nn.Module, sharded: bool) -> None:
        if sharded:
            device = next(gated.parameters()).device.type
            mesh = init_device_mesh(device, (distributed.get_world_size(),))
            for part in (*gated.children(), gated):
                fully_shard(part, mesh=mesh)
        self.gated = gated
        self.network = gated if sharded else DistributedDataParallel(gated)
        self.optimizer = optimizer_of(gated)  # after sharding, so it sees this process's share

    def step(self, loss: Tensor) -> None:
        """One step against the loss."""
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> dict[str, Any]:
        """All weights, in the first process."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(self.gated, options=options)


class Zero:
    """DeepSpeed's ZeRO: optimizer states (1), gradients (2), weights (3) in shares."""

    def __init__(self, gated: nn.Module, stage: int) -> None:
        import deepspeed

        self.gathered = deepspeed.zero.GatheredParameters
        config = {
            "train_micro_batch_size_per_gpu": BATCH,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        self.gated = gated
        self.network, *_ = deepspeed.initialize(
            model=gated, optimizer=optimizer_of(gated), config=config
        )

    def step(self, loss: Tensor) -> None:
        """One step against the loss."""
        self.network.backward(loss)
        self.network.step()

    def weights(self) -> dict[str, Any]:
        """All weights."""
        with self.gathered(list(self.gated.parameters())):
            state = self.gated.state_dict()
            return {name: value.detach().cpu().clone() for name, value in state.items()}


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", choices=STRATEGIES, default="fsdp")
    parser.add_argument("--output", type=Path, default=Path("gated.safetensors"))
    arguments = parser.parse_args()
    strategy = arguments.strategy
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")

    scenes = Scenes(32, size=(64, 64), seed=0)
    loader = DataLoader(scenes, BATCH, sampler=DistributedSampler(scenes, drop_last=True))
    gated = build(len(scenes.classes)).to(device).train()
    if strategy.startswith("zero"):
        trained = Zero(gated, int(strategy[-1]))
    else:
        trained = Copies(gated, sharded=strategy == "fsdp")
    annealer = pag.Annealer(gated, total_steps=EPOCHS * len(loader))
    torch.manual_seed(distributed.get_rank())  # each process draws gate noise of its own
    for epoch in range(EPOCHS):
        for batch in loader:
            images, labels = batch["image"].to(device), batch["label"].to(device)
            task_loss = cross_entropy(trained.network(images), labels)
            trained.step(task_loss + 10 * pag.sparsity_loss(gated))
            annealer.step()
        expected = pag.expected_fraction(gated).item()
        if distributed.get_rank() == 0:
            print(f"epoch {epoch + 1}: task loss {task_loss.item():.5f}, compute {expected:.5f}")

    weights = trained.weights()
    if distributed.get_rank() == 0:
        whole = build(len(scenes.classes)).eval()
        whole.load_state_dict(weights)
        batches = [batch["image"] for batch in DataLoader(scenes, BATCH)]
        fraction = pag.calibrate(whole, batches, budgets=(BUDGET,))[BUDGET]
        pag.save_file(whole, arguments.output)
        print(f"budget {BUDGET}: {fraction:.3f} measured after calibration, {arguments.output}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
