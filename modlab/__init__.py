"""modlab: scalar-modulated low-rank adapters. Train a direction once, dose it with one number."""

__version__ = "0.2.0"

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

from .maths.divergence import aggregate, kl_fwd, kl_rev, token_nll
from .maths.lowrank import LowRank, fold, stack
from .maths.scores import chance_overlap, choose, overlap, selection_scores, tail_depth
from .maths.statistics import GradientStats, ProjectionStats
from .maths.svd import thin_svd
from .model.loading import load_model, load_pairs, tiny_model
from .model.targets import LoRAConfig, find_targets, target_table
from .model.text import batches, collate, encode
from .adapters.adapter import Adapter, load_adapter
from .adapters.files import read_metadata
from .adapters.history import HistoryBake, PiSSAHistoryBake, bake_, baked
from .adapters.lora import ModulatedLoRA
from .adapters.pissa import ModulatedPiSSA
from .adapters.report import bake_report
from .adapters.restore import restore
from .adapters.selection import PiSSAConfig, selection_table, spectrum_table
from .learn.activations import capture_activations, capture_statistics
from .learn.contrast import ContrastConfig, ContrastRun, contrast
from .learn.cosine import gradient_cosine
from .learn.gradients import capture_gradients
from .learn.heal import HealConfig, HealRun, heal
from .learn.loop import NonFiniteLoss
from .measure.calibrate import Calibration, calibrate_c
from .measure.dose import kl_curve
from .measure.grid import grid
from .measure.writing import generate_at
from .share.peft import from_peft, to_peft

# What draws is imported when it is asked for: matplotlib and seaborn take as long as the rest of modlab.
if _TYPE_CHECKING:
    from .show.explore import Explorer, explore
    from .show.plots import plot_gradient_cosine, plot_kl_vs_c, plot_nll, plot_overlap, plot_selection, plot_tail_depth
_LATER = {name: module for module, names in {
    ".show.explore": "Explorer explore",
    ".show.plots": "plot_gradient_cosine plot_kl_vs_c plot_nll plot_overlap plot_selection plot_tail_depth",
}.items() for name in names.split()}
__all__ = [*(name for name in list(globals()) if not name.startswith("_")), *_LATER]


def __getattr__(name):
    if name not in _LATER: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(_import_module(_LATER[name], __name__), name)
    return value


def __dir__(): return sorted(set(globals()) | set(_LATER))
