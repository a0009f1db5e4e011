"""What is particular to each architecture: its layers by name and shape, its head, its experts, its second stack, its rows."""
import pytest
import torch
import transformers as hf
from models import ARCHS, CONFIGS, GROUPED, IDS, KINDS, MORE, adapter_of, build, changes, gap, half, logits, seeded, state, tokens
from torch.nn.functional import linear

from modlab import ModulatedLoRA, ModulatedPiSSA, load_adapter
from modlab.model.targets import LoRAConfig, block_stacks, find_targets, target_table

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*fused expert")]
EVERY = (*ARCHS, *MORE, "shared_moe")
CLOSE = 2**-16  # float32 through another batch or sequence length: other summation orders, 2^-23 a step, a few layers deep
C = torch.tensor([1.0, -2.0, 0.5])

ATTENTION = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
             "self_attn.o_proj": (32, 32)}
GATED = {"mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48)}
SHARED = {f"mlp.shared_expert.{n}": s for n, s in dict(gate_proj=(40, 32), up_proj=(40, 32), down_proj=(32, 40)).items()}
NEOX = {"attention.query_key_value": (96, 32), "attention.dense": (32, 32),
        "mlp.dense_h_to_4h": (64, 32), "mlp.dense_4h_to_h": (32, 64)}
LAYERS = dict(  # the stack, its blocks, how many layers are targets in all, and those of one block with their (o, i), in order
    llama=("model.layers", 4, 28, {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
                                   "self_attn.o_proj": (64, 64), "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64),
                                   "mlp.down_proj": (64, 128)}),
    gpt2=("transformer.h", 2, 8, {"attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (128, 32),
                                  "mlp.c_proj": (32, 128)}),
    neox=("gpt_neox.layers", 2, 8, NEOX),
    neox_japanese=("gpt_neox_japanese.layers", 2, 8, NEOX),
    opt=("model.decoder.layers", 2, 12, {"self_attn.k_proj": (32, 32), "self_attn.v_proj": (32, 32), "self_attn.q_proj": (32, 32),
                                         "self_attn.out_proj": (32, 32), "fc1": (64, 32), "fc2": (32, 64)}),
    qwen3=("model.layers", 2, 14, ATTENTION | GATED),
    gemma3=("model.layers", 2, 14, ATTENTION | GATED),
    gemma3_vision=("model.language_model.layers", 2, 14, ATTENTION | GATED),
    phi3=("model.layers", 2, 8, {"self_attn.o_proj": (32, 32), "self_attn.qkv_proj": (64, 32), "mlp.gate_up_proj": (96, 32),
                                 "mlp.down_proj": (32, 48)}),
    mixtral=("model.layers", 2, 8, ATTENTION),
    moe=("model.layers", 2, 8, ATTENTION),
    shared_moe=("model.layers", 2, 16, ATTENTION | SHARED | {"mlp.shared_expert_gate": (1, 32)}))
TIED = dict(gpt2=True, opt=True, gemma3=True, gemma3_vision=True, neox_japanese=True)  # as they come
EXPERTS = dict(mixtral=36_864, moe=18_432, shared_moe=18_432)  # 2 blocks of 4 experts of 32·96 + 48·32 or 32·48 + 24·32

every_arch, every_kind = pytest.mark.parametrize("arch", EVERY), pytest.mark.parametrize("kind", KINDS)
either_way = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def head_of(arch): return "embed_out" if arch == "neox_japanese" else "lm_head"


def expected(arch):
    stack, depth, count, block = LAYERS[arch]
    names = {f"{stack}.{n}.{layer}": shape for n in range(depth) for layer, shape in block.items()}
    assert len(names) == count
    return names


def rows_alone(model, a, run, cs=C):
    "Each row at its own c, out of runs in which all rows have that one c."
    out = []
    for n, c in enumerate(cs.tolist()):
        with torch.no_grad(), a(model, c): out.append(run()[n])
    return torch.stack(out)


def right_or_refused(model, a, run, cs=C):
    "One c a row gives each row what it would have alone; or an error says that the rows cannot be told apart."
    alone, before = rows_alone(model, a, run, cs), state(model)
    assert gap(alone, rows_alone(model, a, run, torch.zeros(len(cs)))) > 100 * CLOSE, "c did nothing at all"
    try:
        with torch.no_grad(), a(model, cs): y = run()
    except ValueError as e:
        assert "row" in str(e) and not changes(before, model)
        return "refused"
    assert max(gap(y[n], alone[n]) for n in range(len(cs))) < CLOSE, "a row was given the c of another"
    return "right"


def test_the_matrix_has_all_of_them():
    assert set(EVERY) == set(CONFIGS) | {"llama"} == set(LAYERS)


@every_arch
@either_way
def test_layers_by_name_and_shape(arch, tied):
    model, names, head = build(arch, tied=tied), expected(arch), head_of(arch)
    assert model.get_submodule(head) is model.get_output_embeddings()
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert block_stacks(model).pop(LAYERS[arch][0]) == LAYERS[arch][1]
    assert list(find_targets(model)) == list(names)
    table = target_table(model).set_index("name")
    assert dict(table["shape"][table.selected]) == names and not table.tied[table.selected].any()
    a = ModulatedLoRA(model, r=4)
    assert {n: (a.B[n].shape[0], a.A[n].shape[1]) for n in a.layers} == names
    p = ModulatedPiSSA(model, r=40, selection_score="s_only", extract=False)
    for n, (o, i) in names.items():
        k = min(o, i, 40)
        assert (p.U[n].shape, p.S[n].shape, p.Vh[n].shape, p.delta(n, 1.0).shape) == ((o, k), (k,), (k, i), (o, i))


@every_arch
def test_tied_or_not_as_they_come(arch):
    model = build(arch)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == TIED.get(arch, False)


@every_arch
@either_way
def test_the_head_is_left_out_unless_it_is_named(arch, tied):
    model, head = build(arch, tied=tied), head_of(arch)
    assert "lm_head" in LoRAConfig.exclude and "embed_out" not in LoRAConfig.exclude
    free = ("vision_tower",)
    assert list(find_targets(model, LoRAConfig(exclude=free))) == list(expected(arch))
    row = target_table(model, LoRAConfig(exclude=free)).set_index("name").loc[head]
    assert not row.selected and row.reason.startswith("output embedding") and row.tied == tied
    named = LoRAConfig(targets=("all-linear", f"{head}$"), exclude=free)
    assert list(find_targets(model, named)) == [*expected(arch), head]


@every_arch
@either_way
def test_an_adapter_on_the_head_leaves_the_embedding_alone(arch, tied):
    model, ids, head = build(arch, tied=tied), tokens(), head_of(arch)
    base, embedding = logits(model, ids), model.get_input_embeddings().weight.detach().clone()
    kw = dict(targets=(f"{head}$",), exclude=())
    for kind in ("lora", "pissa-unextracted"):
        a = adapter_of(kind, model, **kw)
        with a(model, torch.tensor([0.0, 1.0, 0.0])): y = logits(model, ids)
        assert [torch.equal(y[n], base[n]) for n in range(3)] == [True, False, True]
    if tied:
        with pytest.raises(ValueError, match=f"{head}.*tied.*extract=False"): adapter_of("pissa-extracted", model, **kw)
    else:
        a = adapter_of("pissa-extracted", model, **kw)
        with a(model, 0.0): assert gap(logits(model, ids), base) < CLOSE < gap(y[1], base[1])
        a.restore_base_W()
    assert torch.equal(model.get_input_embeddings().weight, embedding) and torch.equal(logits(model, ids), base)


@every_arch
@either_way
def test_a_fresh_lora_is_a_no_op(arch, tied):
    model, ids = build(arch, tied=tied), tokens()
    base, fresh = logits(model, ids), ModulatedLoRA(model, r=4)
    for c in (0.0, 1.0, -1e4, C):
        with fresh(model, c): assert torch.equal(logits(model, ids), base)


@every_arch
@either_way
def test_an_extraction_changes_its_layers_and_no_embedding(arch, tied):
    model, ids = build(arch, tied=tied), tokens()
    base, before = logits(model, ids), {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
    a = half("pissa-extracted", model)
    changed = {n for n, p in model.named_parameters(remove_duplicate=False) if not torch.equal(p, before[n])}
    assert changed == {f"{n}.weight" for n in a.layers} and set(a.layers) <= set(expected(arch))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert gap(logits(model, ids), base) > 100 * CLOSE, "nothing was extracted"
    with a(model, 0.0): assert gap(logits(model, ids), base) < CLOSE
    a.restore_base_W()
    assert torch.equal(logits(model, ids), base)


def generate(model, ids):
    "Ten greedy tokens, made with the cache, and the logits behind them."
    model.generation_config.eos_token_id = None
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, use_cache=True,
                         return_dict_in_generate=True, output_logits=True, pad_token_id=0)
    return out.sequences[:, ids.shape[1]:], torch.stack(out.logits, 1)


@every_arch
@every_kind
def test_rows_generate_together_as_each_would_alone(arch, kind):
    model, ids = build(arch), tokens()
    base, a = generate(model, ids)[1], half(kind, model)
    with a(model, C): together, y = generate(model, ids)
    for n, c in enumerate(C.tolist()):
        with a(model, c): alone, z = generate(model, ids[n:n + 1])
        assert torch.equal(alone[0], together[n]) and gap(y[n], z[0]) < CLOSE and gap(y[n], base[n]) > 100 * CLOSE


@every_arch
@every_kind
def test_saved_and_loaded(tmp_path, arch, kind):
    "With the embeddings tied where they usually are not, and the other way round: the usual is in the matrix."
    kw, path = dict(tied=not TIED.get(arch, False)), tmp_path / "a.safetensors"
    model, other = build(arch, **kw), build(arch, **kw)
    a = half(kind, model)
    a.save(path)
    b = load_adapter(other, path)
    with a(model, C), b(other, C): assert torch.equal(logits(model, tokens()), logits(other, tokens()))
    assert b.cfg == a.cfg and list(b.layers) == list(a.layers) and type(b) is type(a)
    if kind == "lora": return
    with pytest.raises(ValueError): load_adapter(build(arch, seed=1, **kw), path)


# Phi-3: q, k and v are one layer, gate and up another.


def test_fused_layers_are_adapted_as_the_one_matrix_that_they_are():
    model, ids, name = build("phi3"), tokens(), "model.layers.1.self_attn.qkv_proj"
    a = adapter_of("lora", model, targets=("qkv_proj",))
    assert list(a.layers) == ["model.layers.0.self_attn.qkv_proj", name] and a.layers[name].weight.shape == (64, 32)
    a.B[name].data[32:] = 0  # k and v are rows 32 to 48 and 48 to 64: what is left moves q alone
    x = torch.randn(3, 7, 32, generator=seeded(1))
    with torch.no_grad(), a(model, -2.0): q, k, v = (a.layers[name](x) - linear(x, a.layers[name].weight)).split([32, 16, 16], -1)
    assert gap(q, linear(x, a.delta(name, -2.0)[:32])) < CLOSE and not k.any() and not v.any()
    assert right_or_refused(model, a, lambda: logits(model, ids)) == "right"


def test_a_pattern_of_the_separate_layers_finds_none_where_they_are_fused():
    cfg = LoRAConfig(targets=("all-linear", "q_proj"))
    with pytest.raises(ValueError, match="no linear layer.*q_proj"): find_targets(build("phi3"), cfg)


# GPT-2: the weight is stored transposed.


@pytest.mark.parametrize("name, o, i", [("transformer.h.0.attn.c_attn", 96, 32), ("transformer.h.1.mlp.c_proj", 32, 128)])
def test_conv1d_is_read_and_written_transposed(name, o, i):
    model, base = build("gpt2"), build("gpt2")
    W = base.get_submodule(name).weight.T  # (o, i)
    assert W.shape == (o, i) and type(base.get_submodule(name)).__name__ == "Conv1D"
    a = adapter_of("pissa-extracted", model, targets=(f"{name}$",))
    left = model.get_submodule(name).weight
    assert left.shape == (i, o) and left.is_contiguous()
    assert gap(left.T, W - a.U[name] * a.S[name] @ a.Vh[name]) < CLOSE
    assert gap(a.S[name], torch.linalg.svdvals(W.double())[:6]) < CLOSE and a.delta(name, 2.0).shape == (o, i)


# OPT: the MLP sees the tokens of all rows in one long list.


@every_kind
@pytest.mark.parametrize("layer", ["fc1", "fc2"])
def test_flattened_tokens_get_the_c_of_their_row(kind, layer):
    model, ids, name, seen = build("opt"), tokens(), f"model.decoder.layers.0.{layer}", {}
    a = adapter_of(kind, model, targets=(f"layers.0.{layer}",))
    with a(model, C):
        a.layers[name].register_forward_hook(lambda m, args, y: seen.update(x=args[0], y=y))
        logits(model, ids)
    x, y = seen["x"], seen["y"]
    assert x.ndim == 2 and len(x) == 21 and list(a.layers) == [name]
    W, bias = a.layers[name].weight.double(), a.layers[name].bias.double()
    rows = [linear(x[7 * n:7 * n + 7].double(), W + a.delta(name, c).double(), bias) for n, c in enumerate(C.tolist())]
    assert max(gap(y[7 * n:7 * n + 7], rows[n]) for n in range(3)) < CLOSE < gap(y[:7], rows[1])


# GPT-NeoX Japanese: another name for the head, and a bias that no linear layer holds.


def test_the_japanese_head_and_bias():
    model = build("neox_japanese")
    assert model.get_submodule("embed_out").weight is model.get_input_embeddings().weight
    loose = [n for n, p in model.named_parameters() if n.endswith("dense_bias")]
    assert loose == ["gpt_neox_japanese.layers.1.attention.dense_bias"]
    with pytest.raises(ValueError, match="no layer.*output embedding|no layer.*no pattern"):
        find_targets(model, LoRAConfig(targets=("lm_head|embed_in",)))
    assert list(find_targets(model, LoRAConfig(targets=("embed_out",)))) == ["embed_out"]


# Gemma 3: scaled embeddings, windows, soft caps; and the same stack under another name, beside a vision tower.


def test_the_tiny_gemma_has_what_gemma_has():
    model, ids = build("gemma3"), tokens()
    assert logits(model, ids).abs().max() < 5.0 < logits(build("qwen3"), ids).abs().max() * 2
    bare = torch.nn.functional.embedding(ids, model.get_input_embeddings().weight)
    assert gap(model.get_input_embeddings()(ids), bare * 32**0.5) < CLOSE
    far = ids.clone()
    far[:, 0] = (far[:, 0] + 1) % 90 + 3
    seen = model.model(input_ids=ids, output_hidden_states=True).hidden_states[1]  # after the block that looks 4 tokens back
    assert torch.equal(seen[:, 4:], model.model(input_ids=far, output_hidden_states=True).hidden_states[1][:, 4:])


@every_kind
def test_the_soft_cap_holds_at_any_dose(kind):
    model = build("gemma3")
    with half(kind, model)(model, 30.0): y = logits(model, tokens())
    assert y.isfinite().all() and y.abs().max() <= 5.0


VISION_BLOCK = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
SEEING = dict(targets=("all-linear", "vision_tower"), exclude=("lm_head",)) # with the layers of the image tower


def test_the_vision_tower_is_left_out_by_default():
    model = build("gemma3_vision")
    assert block_stacks(model) == {"model.vision_tower.encoder.layers": 5, "model.language_model.layers": 2}
    table = target_table(model).set_index("name")
    vision = [f"model.vision_tower.encoder.layers.{n}.{layer}" for n in range(5) for layer in VISION_BLOCK]
    assert list(table.index) == [*vision, *expected("gemma3_vision"), "lm_head"] and len(vision) == 30
    assert (table.reason[vision] == "excluded by 'vision_tower'").all() and table.selected.sum() == 14
    by_structure = target_table(model, LoRAConfig(exclude="lm_head")).set_index("name")
    assert by_structure.reason[vision].str.startswith("no text token passes through it; name it").all()
    assert list(find_targets(model, LoRAConfig(exclude=()))) == list(expected("gemma3_vision"))
    assert list(find_targets(model, LoRAConfig(**SEEING))) == [*vision, *expected("gemma3_vision")]


@pytest.mark.parametrize("layer_range, text, vision", [
    ((0.0, 0.5), [0], [0, 1]), ((0.5, 1.0), [1], [2, 3, 4]), ((0.0, 0.4), [], [0, 1]), ((0.6, 1.0), [1], [3, 4]),
    ((0.2, 0.8), [0], [1, 2, 3]), ((0.0, 1.0), [0, 1], [0, 1, 2, 3, 4])])
def test_each_stack_counts_its_own_blocks(layer_range, text, vision):
    model = build("gemma3_vision")
    written = {"text": [f"model.language_model.layers.{n}.{layer}" for n in text for layer in ATTENTION | GATED],
               "vision": [f"model.vision_tower.encoder.layers.{n}.{layer}" for n in vision for layer in VISION_BLOCK]}
    both = find_targets(model, LoRAConfig(layer_range=layer_range, **SEEING))
    assert list(both) == [*written["vision"], *written["text"]]
    if not text:
        with pytest.raises(ValueError, match="outside layer_range"): find_targets(model, LoRAConfig(layer_range=layer_range))
    else: assert list(find_targets(model, LoRAConfig(layer_range=layer_range))) == written["text"]


def see(model, images):
    "Run on rows of 24 tokens that hold so many images each, four tokens an image."
    ids = tokens(len(images), 24).clamp_max(90)
    for row, n in zip(ids, images):
        for k in range(n): row[1 + 6 * k:5 + 6 * k] = 95
    pixels = torch.randn(sum(images), 3, 8, 8, generator=seeded(5))
    return logits(model, ids, pixel_values=pixels, token_type_ids=(ids == 95).long())


@every_kind
def test_text_adapters_know_their_rows_beside_images(kind):
    model = build("gemma3_vision")
    base, a = see(model, (2, 1, 0)), half(kind, model)
    assert gap(base, logits(model, tokens(3, 24))) > 100 * CLOSE
    assert right_or_refused(model, a, lambda: see(model, (2, 1, 0))) == "right"


@every_kind
def test_vision_layers_take_one_c_for_all(kind):
    model = build("gemma3_vision")
    base = see(model, (1, 2))
    a = adapter_of(kind, model, targets=("vision_tower",), exclude=())
    assert len(a.layers) == 30
    with a(model, 0.0): assert gap(see(model, (1, 2)), base) < CLOSE
    with a(model, 1.0): assert gap(see(model, (1, 2)), base) > 100 * CLOSE


@pytest.mark.parametrize("images", [(1, 1, 1), (2, 1, 0), (3, 0), (1, 2)], ids=str)
def test_images_get_the_c_of_their_row_or_none(images):
    "As many images as rows need not be one a row; and 3 images of 16 patches are as many as 2 rows of 24 tokens."
    model = build("gemma3_vision")
    a = adapter_of("lora", model, **SEEING)
    right_or_refused(model, a, lambda: see(model, images), C[:len(images)])


# Experts.


@pytest.mark.parametrize("arch", EXPERTS)
def test_what_experts_are_not_reached_is_told(arch):
    model = build(arch)
    fused = {n: p.numel() for n, p in model.named_parameters() if ".experts." in n}
    assert sum(fused.values()) == EXPERTS[arch] and len(fused) == 4
    for build_one in (find_targets, ModulatedLoRA, lambda m: adapter_of("pissa-unextracted", m)):
        with pytest.warns(UserWarning, match=f"{EXPERTS[arch]:,} parameters in fused expert") as told: build_one(model)
        assert len(told) == 1


@pytest.mark.parametrize("arch", EXPERTS)
def test_a_router_of_its_own_kind_is_no_linear_layer(arch):
    model = build(arch)
    assert model.get_submodule("model.layers.0.mlp.gate").weight.shape == (4, 32)
    assert not [n for n in target_table(model).name if n.endswith("mlp.gate")]
    cfg = LoRAConfig(targets=("q_proj", r"mlp\.gate$"))
    with pytest.raises(ValueError, match="no linear layer.*mlp"): find_targets(model, cfg)


@every_kind
def test_shared_experts_see_flattened_tokens_and_know_their_row(kind):
    model, ids, shapes = build("shared_moe"), tokens(), []
    a = adapter_of(kind, model, targets=("shared_expert",))
    assert [n.removeprefix("model.layers.1.mlp.") for n in list(a.layers)[4:]] == [
        "shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj", "shared_expert_gate"]
    a.layers["model.layers.1.mlp.shared_expert.up_proj"].register_forward_hook(lambda m, args, y: shapes.append(args[0].shape))
    assert right_or_refused(model, a, lambda: logits(model, ids)) == "right" and set(shapes) == {(21, 32)}


@pytest.mark.parametrize("arch", EXPERTS)
@every_kind
def test_experts_as_they_come_differ_by_rounding(arch, kind):
    "Grouped by expert, tokens of one row share sums with those of another."
    model, ids = build(arch, experts="grouped_mm"), tokens()
    assert right_or_refused(model, half(kind, model), lambda: logits(model, ids)) == "right"


SMALL = GROUPED | IDS | dict(num_local_experts=4)


def other(cls, cfg):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(cfg).eval()


def llama4(): return other(hf.Llama4ForCausalLM, hf.Llama4TextConfig(
    head_dim=8, intermediate_size_mlp=48, num_experts_per_tok=1, interleave_moe_layer_step=1, attention_chunk_size=64, **SMALL))


def phimoe(): return other(hf.PhimoeForCausalLM, hf.PhimoeConfig(num_experts_per_tok=2, **SMALL))


def dbrx(): return other(hf.DbrxForCausalLM, hf.DbrxConfig(
    d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=96, attn_config=dict(kv_n_heads=2, rope_theta=1e4),
    ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2, hidden_size=32)))


def gpt_oss(): return other(hf.GptOssForCausalLM, hf.GptOssConfig(
    head_dim=8, num_experts_per_tok=2, layer_types=["full_attention"] * 2, **SMALL))


@pytest.mark.parametrize("make, router", [(llama4, "feed_forward.router"), (phimoe, "mlp.router")], ids=["llama4", "phimoe"])
def test_a_linear_router_that_returns_more_than_a_tensor_is_left_alone(make, router):
    "Descendants of nn.Linear, and yet what they return is no W x: an adapter on them could only fail."
    model, ids = make(), tokens()
    layer = model.get_submodule(f"model.layers.0.{router}")
    assert isinstance(layer, torch.nn.Linear) and isinstance(layer(torch.randn(5, 32)), tuple)
    base, a = logits(model, ids), adapter_of("lora", model)
    with a(model, 1.0): assert gap(logits(model, ids), base) > CLOSE
    assert not [n for n in a.layers if n.endswith(router)]


@pytest.mark.parametrize("make, count, key", [
    (llama4, 2 * 4 * (96 * 32 + 48 * 32), "experts"), (phimoe, 2 * 4 * (96 * 32 + 48 * 32), "experts"),
    (dbrx, 2 * 3 * 4 * 48 * 32, "experts.mlp"), (gpt_oss, 2 * 4 * (96 * 32 + 48 * 32 + 96 + 32), "experts")],
    ids=["llama4", "phimoe", "dbrx", "gpt_oss"])
def test_experts_are_told_however_they_are_stored(make, count, key):
    "As (experts, o, i); with the experts along the rows of one matrix, as DBRX has them; with biases."
    model = make()
    assert sum(p.numel() for n, p in model.named_parameters() if f".{key}." in n) == count
    with pytest.warns(UserWarning, match=f"{count:,} parameters"): find_targets(model)


# What else could be taken for the rows of the batch, or for a linear layer.


def test_sequences_along_the_second_axis_are_not_taken_for_flattened_rows():
    "XLNet computes on (s, b, i): its tokens are not in the order of the rows."
    model, ids = other(hf.XLNetLMHeadModel, hf.XLNetConfig(vocab_size=96, d_model=32, n_layer=2, n_head=4, d_inner=48)), tokens()
    right_or_refused(model, adapter_of("lora", model), lambda: model(input_ids=ids).logits)


def test_a_linear_layer_whose_weight_is_read_but_that_is_never_called():
    "The projection inside nn.MultiheadAttention: a hook on it would never run, and what was taken out of it never come back."
    model = other(hf.SiglipVisionModel, hf.SiglipVisionConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, image_size=8, patch_size=4))
    pixels = torch.randn(3, 3, 8, 8, generator=seeded(5))
    with torch.no_grad(): base = model(pixel_values=pixels).pooler_output
    assert isinstance(model.head.attention, torch.nn.MultiheadAttention)
    a = adapter_of("pissa-extracted", model)
    with torch.no_grad(), a(model, 0.0): assert gap(model(pixel_values=pixels).pooler_output, base) < CLOSE
