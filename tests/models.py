"""Tiny random models of many architectures, adapters on them that do something, and a way to see what changed."""
import os

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXJapaneseConfig,
    GPTNeoXJapaneseForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from modlab import ModulatedLoRA, ModulatedPiSSA
from modlab.model.calls import _SLOTS, is_swapped
from modlab.model.ledger import extraction_ids
from modlab.model.loading import tiny_model

DEVICE = torch.device(os.environ.get("MODLAB_TEST_DEVICE", "cpu"))  # of every model and every token here
IDS = dict(vocab_size=96, bos_token_id=1, eos_token_id=2, pad_token_id=0)
# Wide initialisers: with the usual 0.02 a width of 32 gives logits so small that nothing could be told apart.
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, initializer_range=0.2)
GROUPED = SIZES | dict(num_key_value_heads=2, intermediate_size=48)  # grouped-query attention, as most have it now
WIDE = GROUPED | dict(head_dim=8)  # for those that do not take it from the width
GEMMA = WIDE | IDS | dict(query_pre_attn_scalar=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"],
                          attn_logit_softcapping=20.0, final_logit_softcapping=5.0)
VISION = dict(hidden_size=24, num_hidden_layers=5, num_attention_heads=2, intermediate_size=40, image_size=8, patch_size=2,
              vision_use_head=False)
CONFIGS = dict(
    gpt2=(GPT2LMHeadModel, GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, **IDS)),
    neox=(GPTNeoXForCausalLM, GPTNeoXConfig(intermediate_size=64, tie_word_embeddings=False, **SIZES, **IDS)),
    opt=(OPTForCausalLM, OPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32,
                                   max_position_embeddings=64, init_std=0.2, dropout=0.0, **IDS)),
    qwen3=(Qwen3ForCausalLM, Qwen3Config(**WIDE, **IDS)),
    gemma3=(Gemma3ForCausalLM, Gemma3TextConfig(**GEMMA)),
    gemma3_vision=(Gemma3ForConditionalGeneration, Gemma3Config(text_config=GEMMA, vision_config=VISION, mm_tokens_per_image=4,
                                                                image_token_index=95, boi_token_index=94, eoi_token_index=93,
                                                                initializer_range=0.2)),
    phi3=(Phi3ForCausalLM, Phi3Config(**GROUPED, **IDS)),
    neox_japanese=(GPTNeoXJapaneseForCausalLM, GPTNeoXJapaneseConfig(intermediate_multiple_size=2, hidden_dropout=0.0,
                                                                     **SIZES, **IDS)),
    mixtral=(MixtralForCausalLM, MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **WIDE, **IDS)),
    moe=(Qwen3MoeForCausalLM, Qwen3MoeConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                             head_dim=8, intermediate_size=64, moe_intermediate_size=24, num_experts=4,
                                             num_experts_per_tok=2, max_position_embeddings=64, initializer_range=0.2, **IDS)),
    shared_moe=(Qwen2MoeForCausalLM, Qwen2MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                                                    shared_expert_intermediate_size=40, **GROUPED, **IDS)))
ARCHS = ("llama", "gpt2", "neox", "opt")
MORE = ("qwen3", "gemma3", "gemma3_vision", "phi3", "neox_japanese", "mixtral", "moe")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("lora", "pissa-extracted", "pissa-unextracted")


def build(arch="llama", dtype=torch.float32, seed=0, tied=None, experts="batched_mm"):
    "A model in eval mode; the same weights for the same arguments. Its embeddings are tied as is usual for it, or as told."
    if arch == "llama" and tied is None: return tiny_model(seed)[0].to(DEVICE, dtype)
    cls, cfg = CONFIGS[arch] if arch != "llama" else (LlamaForCausalLM, tiny_model(seed)[0].config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(type(cfg)(**cfg.to_dict() | ({} if tied is None else dict(tie_word_embeddings=tied))))
        for name, p in model.named_parameters():  # what starts at zero: give it something to be lost
            if name.endswith(("bias", "mm_input_projection_weight")): torch.nn.init.normal_(p, std=0.1)
    # As they come, experts multiply all tokens routed to them at once, and how many there are decides how sums are rounded: a
    # row's logits then depend on its neighbours, in the last bits. This way each token goes by itself.
    if hasattr(cfg, "num_experts_per_tok"): model.set_experts_implementation(experts)
    return model.eval().to(DEVICE, dtype)


def seeded(seed): return torch.Generator().manual_seed(seed)


def tokens(b=3, s=7, seed=1): return torch.randint(3, 96, (b, s), generator=seeded(seed)).to(DEVICE)


def adapter_of(kind, model, seed=2, **kw):
    "An adapter as training would leave it: every factor is something."
    kw = dict(r=6, generator=seeded(seed)) | kw
    if kind.startswith("pissa"):
        return ModulatedPiSSA(model, **dict(selection_score="s_only", init=(0.3, 0.5), extract=kind == "pissa-extracted") | kw)
    a, g = ModulatedLoRA(model, **kw), seeded(seed + 1)
    with torch.no_grad():
        for B in a.B.values(): B.copy_(torch.randn(B.shape, generator=g) * 0.1)  # drawn on the CPU: the same on every device
    return a


def half(kind, model, **kw):
    "`adapter_of` on the middle blocks of the deeper Llama, on all of the others: in the matrix, time counts."
    deep = model.config.get_text_config().num_hidden_layers == 4
    return adapter_of(kind, model, **dict(layer_range=(0.25, 0.75) if deep else (0.0, 1.0)) | kw)


@torch.no_grad()
def logits(model, ids, **kw): return model(input_ids=ids, **kw).logits


def gap(a, b):
    "The largest difference as a share of the largest value."
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def hooks(model):
    "What is registered where: hooks of torch, and what modlab adds to a module's call, for which it swaps the module's class."
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs",
             "_forward_pre_hooks_with_kwargs")
    found = {(n, k): len(getattr(m, k)) for n, m in model.named_modules() for k in kinds if getattr(m, k, None)}
    slots = {(n, k): len(v) for n, m in model.named_modules() for k, v in vars(m).items() if k in _SLOTS}
    return found | slots | {(n, "class"): type(m) for n, m in model.named_modules() if is_swapped(m)}


def state(model):
    "Everything that an adapter must not change behind one's back: values, the very storage, hooks, what trains, extractions."
    plain = lambda p: p.detach().clone() if type(p.data) is torch.Tensor else p.detach().dequantize()
    return dict(values={n: plain(p) for n, p in model.named_parameters()},
                storage={n: p.data_ptr() for n, p in model.named_parameters()},
                trains={n: p.requires_grad for n, p in model.named_parameters()}, hooks=hooks(model),
                rounds={n: ids for n, m in model.named_modules() if (ids := extraction_ids(m))})


def changes(before, model):
    "Names of what differs from `state`, as far as a reader wants to see."
    now, found = state(model), []
    for part in before:
        found += [f"{part}: {k}" for k in before[part].keys() | now[part].keys()
                  if k not in before[part] or k not in now[part] or not same(before[part][k], now[part][k])]
    return sorted(found)


def same(a, b): return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
