"""modlab: scalar-modulated low-rank adapters. Train a direction once, dose it with one number."""

__version__ = "0.1.0"

from .adapter import Adapter, load_adapter
from .calibration import capture_activations
from .checkpoint import read_metadata
from .lora import ModulatedLoRA
from .lowrank import LowRank, fold, stack
from .models import cache_dir, load_model, load_pairs, tiny_model
from .pissa import ModulatedPiSSA, PiSSAConfig, selection_table, spectrum_table
from .plots import SCORE_COLOURS, plot_overlap, plot_selection, plot_tail_depth
from .selection import (
    EMPTIED, Mode, ProjectionStats, SCORES, act_only, both, called, chance_overlap, check_mode, check_scores, check_side,
    check_stats, cho_rej_min_std, choose, overlap, project, s_only, selection_scores, tail_depth, wanda,
)
from .svd import (
    EASY, SVD, cache_limit, cached, check_weight, factorise, float64, gram, in_order, mended, result_bytes, svd_arrays,
    tall_svd, thin_svd, thin_svds, workers,
)
from .targets import (
    LoRAConfig, block_of, block_stacks, dense_weight, find_targets, is_linear, is_quantised, layer_shape, role_of,
    target_table,
)
from .text import Batch, batches, collate, encode, encode_records, sides_of
