"""modlab: scalar-modulated low-rank adapters. Train a direction once, dose it with one number."""

__version__ = "0.1.0"

from .adapters.adapter import Adapter, load_adapter
from .adapters.history import HistoryBake, PiSSAHistoryBake, bake_, baked
from .adapters.report import bake_report
from .learn.activations import capture_activations, capture_statistics
from .adapters.files import read_metadata
from .learn.contrast import ContrastConfig, ContrastRun, contrast, gradient_cosine
from .maths.divergence import AGGREGATES, aggregate, barrier, kl_fwd, kl_rev, token_nll
from .show.explore import Explorer, explore
from .learn.heal import HealConfig, HealRun, heal
from .share.peft import from_peft, to_peft
from .adapters.lora import ModulatedLoRA
from .maths.lowrank import LowRank, fold, stack
from .model.loading import cache_dir, load_model, load_pairs, tiny_model
from .adapters.pissa import ModulatedPiSSA
from .adapters.selection import PiSSAConfig, selection_table, spectrum_table
from .show.plots import (
    SCORE_COLOURS, SIGN_COLOURS, STAT_COLOURS, plot_gradient_cosine, plot_kl_vs_c, plot_nll, plot_overlap, plot_selection,
    plot_tail_depth,
)
from .model.readout import Readout, answer_ids, answer_rows
from .maths.scores import ProjectionStats, SCORES, chance_overlap, choose, overlap, project, selection_scores, tail_depth
from .show.study import Study
from .maths.svd import thin_svd, thin_svds
from .measure.calibrate import Calibration, calibrate_c
from .measure.dose import kl_curve
from .model.targets import LoRAConfig, block_of, block_stacks, find_targets, role_of, target_table
from .model.text import Batch, batches, collate, encode, encode_records, sides_of
from .learn.loop import NonFiniteLoss
from .model.changes import restore
from .model.layers import dense_weight, device_of, is_linear, is_quantised, layer_shape
