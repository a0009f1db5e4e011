"""A model in the place of the tokenizer, a path in that of the model, a text beyond the positions: told at every entry point."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import adapter_of, build
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig, RobertaConfig

from modlab import (
    ContrastConfig,
    HealConfig,
    HistoryBake,
    calibrate_c,
    capture_activations,
    capture_gradients,
    capture_statistics,
    contrast,
    explore,
    generate_at,
    gradient_cosine,
    heal,
    kl_curve,
    tiny_model,
)
from modlab.model.layers import room_of

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[1]

# In a process of its own: under test the types are checked, and something else would be raised first.
SCRIPT = '''
import json, sys, warnings
warnings.simplefilter("ignore")
from modlab import *
from modlab.model.targets import LoRAConfig
folder = sys.argv[1]
model, tok = tiny_model()
a = ModulatedLoRA(model, r=2, targets="q_proj")
a.save(f"{folder}/a.safetensors")
to_peft(a, f"{folder}/peft")
P, S = [dict(prompt="Tea?", cho="yes", rej="no")] * 30, [dict(prompt="Tea?", completion="yes")] * 30
H = [(a, 1.0)]
calls = {
    "kl_curve": lambda m, t: kl_curve(m, t, a, P, [0.0]), "calibrate_c": lambda m, t: calibrate_c(m, t, a, P, 0.1),
    "heal": lambda m, t: heal(m, t, S), "heal with an adapter": lambda m, t: heal(m, t, a, S),
    "contrast": lambda m, t: contrast(m, t, a, P),
    "gradient_cosine": lambda m, t: gradient_cosine(m, t, a, P), "capture_activations": lambda m, t: capture_activations(m, t, P),
    "capture_statistics": lambda m, t: capture_statistics(m, t, P), "explore": lambda m, t: explore(m, t, a, P, live=False),
    "ModulatedLoRA": lambda m, t: ModulatedLoRA(m), "ModulatedPiSSA": lambda m, t: ModulatedPiSSA(m, selection_score="s_only"),
    "find_targets": lambda m, t: find_targets(m), "target_table": lambda m, t: target_table(m),
    "load_adapter": lambda m, t: load_adapter(m, f"{folder}/a.safetensors"),
    "from_peft": lambda m, t: from_peft(m, f"{folder}/peft"),
    "from_checkpoint": lambda m, t: ModulatedLoRA.from_checkpoint(m, f"{folder}/a.safetensors"),
    "attach": lambda m, t: a(m, 1.0).__enter__(),
    "HistoryBake": lambda m, t: HistoryBake(m, H), "baked": lambda m, t: baked(m, H).__enter__(),
    "bake_": lambda m, t: bake_(m, H),
    "bake_report": lambda m, t: bake_report(m, H), "restore": lambda m, t: restore(m), "encode": lambda m, t: encode(t, "a", "b"),
    "batches": lambda m, t: list(batches(t, P, "cho"))}
found = {}
for name, call in calls.items():
    for what, (m, t) in dict(swapped=(tok, model), path=("gpt2", "gpt2"), nothing=(None, None)).items():
        try: call(m, t)
        except Exception as e: found[f"{name}, {what}"] = type(e).__name__, str(e)
        else: found[f"{name}, {what}"] = "nothing", ""
print(json.dumps(found))
'''


def test_a_model_and_a_tokenizer_in_each_others_place(tmp_path):
    env = dict(PYTHONPATH=str(ROOT), PATH="/usr/bin:/bin", HOME=str(tmp_path), HF_HUB_OFFLINE="1", MODLAB_SVD_CACHE="0")
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    says = {"swapped": ("TokenizersBackend", "PreTrainedTokenizerFast", "LlamaForCausalLM"), "path": ("str",),
            "nothing": ("NoneType",)}
    assert len(found) == 72
    wrong = {name: end for name, end in found.items()
             if end[0] != "ValueError" or not any(word in end[1] for word in says[name.rpartition(", ")[2]])}
    assert not wrong


SMALL = dict(vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
TABLES = dict(gpt2=(GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=2, n_positions=48), 48),
              opt=(OPTConfig(vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
                             word_embed_proj_dim=16, max_position_embeddings=48), 48),
              roberta=(RobertaConfig(**SMALL, max_position_embeddings=50, is_decoder=True, pad_token_id=1), 48))


@pytest.mark.parametrize("kind", TABLES)
def test_the_room_is_what_the_model_can_run(kind):
    config, room = TABLES[kind]
    model = AutoModelForCausalLM.from_config(config).eval()
    assert room_of(model) == room and room_of(torch.nn.DataParallel(model)) == room
    with torch.no_grad():
        model(torch.full((1, room), 7))
        with pytest.raises((IndexError, RuntimeError)): model(torch.full((1, room + 1), 7))


def test_without_a_table_there_is_no_limit(tiny_llama):
    assert room_of(tiny_llama) is None and room_of(torch.nn.Linear(2, 2)) is None
    with torch.no_grad(): assert tiny_llama(torch.full((1, 600), 7)).logits.isfinite().all()


LONG = dict(prompt="Tea or coffee, or something else altogether? ", cho="Milk.", rej="Lemon, please.")
SHORT = dict(prompt="Tea?", cho="yes", rej="no")
SAMPLES = [dict(prompt=r["prompt"], completion=r["cho"]) for r in (SHORT, SHORT, LONG)]
ENTRIES = dict(
    kl_curve=lambda m, t, a, P: kl_curve(m, t, a, P, [0.0]), calibrate_c=lambda m, t, a, P: calibrate_c(m, t, a, P, 0.1),
    held_out=lambda m, t, a, P: calibrate_c(m, t, a, P[:2], 0.1, held_out=P),
    heal=lambda m, t, a, P: heal(m, t, SAMPLES, cfg=HealConfig(min_train=1)),
    contrast=lambda m, t, a, P: contrast(m, t, a, P, ContrastConfig(val_frac=0.0)),
    cosine=lambda m, t, a, P: gradient_cosine(m, t, a, P),
    activations=lambda m, t, a, P: capture_activations(m, t, P), statistics=lambda m, t, a, P: capture_statistics(m, t, P),
    gradients=lambda m, t, a, P: capture_gradients(m, t, P),
    texts=lambda m, t, a, P: generate_at(m, t, a, [p["prompt"] for p in P], [0.0], max_new_tokens=8),
    explore=lambda m, t, a, P: explore(m, t, a, P, live=False))


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_text_beyond_the_positions_is_told_with_its_number(entry):
    torch.manual_seed(0)
    model, tok = AutoModelForCausalLM.from_config(TABLES["gpt2"][0]).eval(), tiny_model()[1]
    a = adapter_of("lora", model, r=2)
    with pytest.raises(ValueError, match=" 2(, cho)?: .*tokens, and the model has 48 positions; shorten"):
        ENTRIES[entry](model, tok, a, [SHORT, SHORT, LONG])
    assert not a.attached


def test_what_is_shown_as_html_is_escaped():
    "Also the name of somebody's own class."
    a = adapter_of("lora", build(), r=2, targets="q_proj")
    a.__class__ = type("<i>mine", (type(a),), {})
    bake = type("<i>stack", (HistoryBake,), {})(a.model, [(a, 1.0)])
    for shown in (a._repr_html_(), bake._repr_html_()): assert "&lt;i&gt;" in shown and "<i>" not in shown
    bake.remove()
