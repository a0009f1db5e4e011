"""modlab: scalar-modulated low-rank adapters. Train a direction once, dose it with one number."""

__version__ = "0.2.0"

from .maths.divergence import aggregate, kl_fwd, kl_rev, token_nll
from .maths.lowrank import LowRank, fold, stack
from .maths.scores import ProjectionStats, chance_overlap, choose, overlap, selection_scores, tail_depth
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
from .learn.heal import HealConfig, HealRun, heal
from .learn.loop import NonFiniteLoss
from .measure.calibrate import Calibration, calibrate_c
from .measure.dose import kl_curve
from .share.peft import from_peft, to_peft
from .show.explore import Explorer, explore
from .show.plots import plot_gradient_cosine, plot_kl_vs_c, plot_nll, plot_overlap, plot_selection, plot_tail_depth
