"""modlab: scalar-modulated low-rank adapters. Train a direction once, dose it with one number."""

__version__ = "0.1.0"

from .adapter import Adapter, load_adapter
from .bake import HistoryBake, PiSSAHistoryBake, bake_, bake_report, baked
from .calibration import capture_activations, capture_statistics
from .checkpoint import read_metadata
from .contrast import ContrastConfig, ContrastRun, contrast, gradient_cosine
from .divergence import AGGREGATES, aggregate, barrier, kl_fwd, kl_rev, token_nll
from .explore import Explorer, explore
from .heal import HealConfig, HealRun, heal
from .interop import from_peft, to_peft
from .lora import ModulatedLoRA
from .lowrank import LowRank, fold, stack
from .models import cache_dir, load_model, load_pairs, tiny_model
from .pissa import ModulatedPiSSA, PiSSAConfig, selection_table, spectrum_table
from .plots import (
    SCORE_COLOURS, SIGN_COLOURS, STAT_COLOURS, plot_gradient_cosine, plot_kl_vs_c, plot_nll, plot_overlap, plot_selection,
    plot_tail_depth,
)
from .readout import Readout, answer_ids, answer_rows
from .selection import ProjectionStats, SCORES, chance_overlap, choose, overlap, project, selection_scores, tail_depth
from .study import Study
from .svd import thin_svd, thin_svds
from .sweep import Calibration, calibrate_c, kl_curve
from .targets import LoRAConfig, block_of, block_stacks, find_targets, role_of, target_table
from .text import Batch, batches, collate, encode, encode_records, sides_of
from .training import NonFiniteLoss
from .weights import dense_weight, device_of, is_linear, is_quantised, layer_shape
