"""modlab: scalar-modulated low-rank adapters. Train a direction once, dose it with one number."""

__version__ = "0.1.0"

from modlab.adapter import Adapter, load_adapter
from modlab.calibration import capture_activations
from modlab.checkpoint import read_metadata
from modlab.lora import ModulatedLoRA
from modlab.lowrank import LowRank
from modlab.models import load_model, load_pairs, tiny_model
from modlab.pissa import ModulatedPiSSA
from modlab.selection import selection_scores, tail_depth
