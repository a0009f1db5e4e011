"""Quantised layers that modlab could take for something else: bare codes, cut gradients, weights made anew, unknown widths."""
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear8bitLt
from models import adapter_of, build, logits, tokens
from test_quantised import KINDS, every_kind, gradients, quantised
from torch import nn
from transformers.integrations.bitnet import BitLinear
from transformers.integrations.eetq import EetqLinear
from transformers.integrations.fbgemm_fp8 import FbgemmFp8Linear
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.integrations.gemma_quant import QuantizedLinear

from modlab import ModulatedLoRA, find_targets
from modlab.model.layers import is_linear, is_quantised

sys.path.append(str(Path(sys.prefix) / "quantised"))  # where `make setup` puts it, out of transformers' sight
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.skipif(not has_avx512bf16(), reason="this processor does not repack 4-bit weights")
def test_a_repacking_undone_is_refused_too():
    "Saving undoes the layout and leaves the scales rounded: another weight than the one that was loaded."
    model = quantised("bnb4")
    scales = lambda m: m.model.layers[0].self_attn.q_proj.weight.quant_state.absmax
    logits(model, tokens()), model.state_dict()
    assert not torch.equal(scales(model), scales(quantised("bnb4")))
    with pytest.raises(RuntimeError, match="repacked.*load the model anew"): ModulatedLoRA(model, targets="up_proj")


@every_kind
def test_a_layer_that_cuts_the_gradient_is_refused_by_name(kind):
    "Quantised activations without a gradient: whatever lies before would train on the rest of it alone."
    model = build()
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda m, name: name.endswith("down_proj"))
    a = adapter_of(kind, model)
    with a(model, 1.0): assert logits(model, tokens()).isfinite().all()
    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.down_proj.*no gradient.*weight-only"): gradients(a, model, tokens())


def test_eight_bits_made_in_every_forward_are_no_float_weight():
    "The layer keeps the integers of its first forward: what extraction writes into the weight would never be seen."
    model = build()
    model.model.layers[0].mlp.up_proj = Linear8bitLt(64, 128, bias=False)
    with pytest.raises(ValueError, match=r"up_proj.*Linear8bitLt.*extract=False"): adapter_of("pissa-extracted", model)



@pytest.mark.parametrize("cls", [FP8Linear, FbgemmFp8Linear, QuantizedLinear, BitLinear])
def test_codes_are_not_taken_for_weights(cls):
    model = nn.ModuleDict(dict(a=cls(8, 8, bias=False) if cls is not FP8Linear else cls(8, 8), b=nn.Linear(8, 6)))
    assert is_quantised(model["a"]) and list(find_targets(model)) == ["a", "b"]
    for kind in KINDS:
        with pytest.raises(ValueError, match=f"{cls.__name__}.*no dequantize.*exclude"): adapter_of(kind, model, r=2)
    assert adapter_of("lora", model, r=2, exclude="a").layers.keys() == {"b"}


def test_a_layer_of_unknown_width_is_told_not_silently_skipped():
    model = nn.ModuleDict(dict(a=EetqLinear(8, 6), b=nn.Linear(8, 6)))
    with pytest.warns(UserWarning, match="EetqLinear.*not reached"): assert list(find_targets(model)) == ["b"]


class QuantLinear(nn.Module):
    "A stand-in as GPTQ, AWQ or HQQ have it: no weight, integers under other names."
    def __init__(self, readable):
        super().__init__()
        self.in_features, self.out_features, self.qweight = 8, 6, nn.Buffer(torch.zeros(6, 4, dtype=torch.int32))
        if readable: self.dequantize = lambda: torch.eye(6, 8)

    def forward(self, x): return x @ torch.eye(8, 6)


@every_kind
def test_stand_ins_are_recognised_or_refused_by_name(kind):
    for readable in (True, False):
        model = nn.ModuleDict(dict(a=QuantLinear(readable), b=nn.Linear(8, 6)))
        assert is_linear(model["a"]) and is_quantised(model["a"]) and list(find_targets(model)) == ["a", "b"]
        if readable: assert adapter_of(kind, model, r=2).layers.keys() == {"a", "b"}
        else:
            with pytest.raises(ValueError, match="QuantLinear.*no dequantize"): adapter_of(kind, model, r=2)
