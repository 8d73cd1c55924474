"""Retrofit pixel-wise attentional gating onto pretrained convolutional networks."""

from pag_retrofit.annealing import Annealer
from pag_retrofit.calibration import calibrate, set_budget
from pag_retrofit.config import GateConfig, MultiPoolConfig, RetrofitConfig
from pag_retrofit.conversion import average_branches, convert_aspp
from pag_retrofit.deployment import deploy
from pag_retrofit.errors import (
    BudgetError,
    CheckpointError,
    DataError,
    NoSitesError,
    PagError,
    RecipeError,
    TrainingError,
)
from pag_retrofit.gates import gate_parameters
from pag_retrofit.io import ModelSpec, from_pretrained, load_file, save_file, save_pretrained
from pag_retrofit.losses import expected_fraction, sparsity_loss
from pag_retrofit.measurement import Measurement, measure, override_branches, override_gates
from pag_retrofit.planning import Plan, plan
from pag_retrofit.pruning import prune_gates
from pag_retrofit.resizing import resize_input
from pag_retrofit.surgery import remove, retrofit
from pag_retrofit.timing import budget_in_time

__all__ = [
    "Annealer",
    "BudgetError",
    "CheckpointError",
    "DataError",
    "GateConfig",
    "Measurement",
    "ModelSpec",
    "MultiPoolConfig",
    "NoSitesError",
    "PagError",
    "Plan",
    "RecipeError",
    "RetrofitConfig",
    "TrainingError",
    "average_branches",
    "budget_in_time",
    "calibrate",
    "convert_aspp",
    "deploy",
    "expected_fraction",
    "from_pretrained",
    "gate_parameters",
    "load_file",
    "measure",
    "override_branches",
    "override_gates",
    "plan",
    "prune_gates",
    "remove",
    "resize_input",
    "retrofit",
    "save_file",
    "save_pretrained",
    "set_budget",
    "sparsity_loss",
]
