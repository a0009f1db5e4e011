"""Models of transformers that run in milliseconds: the default configurations, with small numbers."""
import re

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TEXT
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGES
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as SOUNDS

VOCAB, WIDTH, HEADS, DEPTH, MOST = 300, 32, 4, 3, 3_000_000 # MOST: parameters of what still counts as small
SMALL = [ # a field gets the value of the first pattern that matches its whole name; None: it stays
    (r".*vocab_size.*(divisible|base).*|ngram.*", 8),
    (r"type_vocab_size", 2),
    (r".*codebook_size", 128),
    (r".*vocab_size.*|num_embeddings|encoder_hash_byte_group_vocab", VOCAB),
    (r"num_(dense|kv_shared|lstm|nextn_predict)_layers|num_mem_blocks|num_residual_layers|mtp_num_layers", None),
    (r"first_k_dense_replace|.*_layer_(period|interval)|num_dense_layers|prefix_dense_.*|full_attention_interval|"
     r".*sparse_step", 1),
    (r"expert_layer_offset|attn_layer_offset", 0),
    (r"num_hidden_layers|n_layers?|num_layers|.*(encoder|decoder)_layers|depth|num_blocks|num_global_layers|num_layers_per_stack|"
     r"conf_num_hidden_layers|.*num_hidden_layers", DEPTH),
    (r".*(kv_n|key_value|kv|query|index_n)_(heads|groups)|multi_query_group_num|num_query_groups|n_kv_heads", 2),
    (r"attention_head_dim|.*head_dim|d_kv|kv_channels|.*head_size|dim_head|d_head|mamba_headdim|mamba_d_head", 8),
    (r".*attention_heads|.*n_heads?|.*num_heads|num_.*_heads|mamba_n_heads", HEADS),
    (r".*lora_rank.*|.*_lora_r|adapter_rank|.*laurel_rank|hc_lowrank|gated_norm_rank", 4),
    (r".*(intermediate_size.*|ffn_dim|ffn_hidden_size|mlp_dim|feed_forward_size)|d_ff|dff|dim_ff|d_inner|"
     r"n_inner|mlp_hidden_size", 48),
    (r".*(hidden_size.*|hidden_dim|embed_dim|embedding_size|embedding_dim|emb_dim|proj_size)|d_model|n_embd|dim|n_embed|"
     r"lru_width|"
     r".*_width|.*projection_dim|proj(ector)?_(in|out)put_dim|adapter_out_dim|adapter_in_dim|dim_model_base|.*output_dim|"
     r"d_rel|.*embd_dim|.*_dim_model|mamba_d_ssm", WIDTH),
    (r"n_group|num_expert_group|topk_group|n_groups|mamba_n_?groups|o_groups|n_shared_experts|num_shared_experts|"
     r"moe_num_shared_experts", 1),
    (r"(num|n)_(local_|routed_|moe_)?experts|moe_num_experts|zero_expert_num|num_centroids", 4),
    (r".*(experts_per_tok(en)?|top_?k).*|moe_k", 2),
    (r".*max_position.*|n_positions|max_seq_len.*|seq_length|n_ctx|.*sequence_length|max_(source|target)_positions|"
     r"context_length|"
     r"model_max_length|num_position_embeddings", 64),
    (r".*sliding_window|attention_chunk_size|.*window_size|sliding_window_size|local_attention|window_len", 16),
    (r".*(d_state|state_size)", 8),
    (r".*time_step_rank|.*dt_rank", 4),
    (r".*chunk_(size|length)|max_inference_chunksize", 8),
    (r"image_size|img_size|video_size", 16),
    (r"patch_size", 4),
    (r".*(dropout.*|drop_rate|_pdrop|layerdrop|dropout_p)", 0.0),
    (r"initializer_range|init_std|initializer_std", 0.2),
]
PER_CLASS = { # what the rules cannot know
    "ZambaForCausalLM": dict(num_hidden_layers=8, layers_block_type=["linear_attention", "hybrid"] * 4, attn_layer_period=2,
                             attention_hidden_size=64, attention_head_dim=16, n_mamba_heads=2),
    "Zamba2ForCausalLM": dict(num_hidden_layers=8, layers_block_type=["linear_attention", "hybrid"] * 4, num_mem_blocks=2,
                              hybrid_layer_ids=[1, 3, 5, 7], n_mamba_heads=4, mamba_headdim=16, attention_hidden_size=64,
                              attention_head_dim=16, use_shared_attention_adapter=True, num_key_value_heads=4),
    "ZayaForCausalLM": dict(num_experts_per_tok=1, moe_router_topk=1),
    "CodeGenForCausalLM": dict(rotary_dim=4), "GPTJForCausalLM": dict(rotary_dim=4),
    "DbrxForCausalLM": dict(attn_config=dict(kv_n_heads=2, rope_theta=1e4),
                            ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2, hidden_size=32)),
    "FalconH1ForCausalLM": dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16),
    "BambaForCausalLM": dict(attn_layer_indices=[1]),
    "GraniteMoeHybridForCausalLM": dict(layer_types=["linear_attention", "full_attention", "linear_attention"]),
    "JambaForCausalLM": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    "Qwen2_5OmniThinkerForConditionalGeneration": dict(vision_start_token_id=290),
    "Qwen3OmniMoeThinkerForConditionalGeneration": dict(vision_start_token_id=290),
    "XmodForCausalLM": dict(default_language="en_XX"),
    "ReformerModelWithLMHead": dict(axial_pos_embds_dim=[16, 16], axial_pos_shape=[8, 8]),
    "DeepseekV2ForCausalLM": dict(num_experts_per_tok=2),
    "Dots1ForCausalLM": dict(n_routed_experts=4, n_shared_experts=1),
    "Lfm2MoeForCausalLM": dict(layer_types=["conv", "full_attention", "conv"]),
    "CohereCompassForCausalLM": dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "Mistral4ForCausalLM": dict(qk_rope_head_dim=8, head_dim=8),
}
MROPE = ("VL", "Glm4v", "Glm46V", "GlmOcr", "Omni", "OCR")


def number(key: str, old: float) -> float:
    "What a number of a configuration becomes."
    new = next((new for pattern, new in SMALL if re.fullmatch(pattern, key)), None)
    if key.endswith(("token_id", "token_index")): return old if old is None or 0 <= old < VOCAB else VOCAB - 1 - len(key) % 20
    if new is None or old == 0 and isinstance(new, int): return old
    return type(old)(new) if isinstance(old, int) else new


def per_layer(items: list) -> list:
    "As many items as there are layers, each kind of them at least once if there is room."
    kinds = [x for n, x in enumerate(items) if x not in items[:n]]
    return (kinds * DEPTH)[:DEPTH]


def mended(fields: dict) -> dict:
    "Fields that have to fit one another."
    if "qk_rope_head_dim" in fields and "num_key_value_heads" in fields: fields["num_key_value_heads"] = HEADS
    if fields.get("rope_parameters") and "mrope_section" in fields["rope_parameters"]:
        fields["rope_parameters"]["mrope_section"] = [1, 1, 2]
    if {"expand", "num_heads", "head_dim"} <= fields.keys(): fields["head_dim"] = WIDTH * fields["expand"] // HEADS
    inner = WIDTH * fields.get("mamba_expand", fields.get("expand", 2))
    for heads, dim in dict(mamba_n_heads="mamba_d_head", mamba_num_heads="mamba_head_dim", n_mamba_heads="mamba_headdim").items():
        if heads in fields and dim in fields: fields[dim] = inner // fields[heads]
    return fields


def shrunk(fields: dict) -> dict:
    "The fields of a configuration, those of the configurations inside it too."
    whole = {k: v for k, v in fields.items() if isinstance(v, int) and not isinstance(v, bool)}
    depths = {v for k, v in whole.items() if number(k, v) == DEPTH and v > DEPTH}
    out = {}
    for key, value in fields.items():
        if not isinstance(key, str) or key == "per_layer_config": continue
        if isinstance(value, dict): out[key] = shrunk(value)
        elif isinstance(value, list | tuple) and len(value) in depths: out[key] = per_layer(list(value))
        elif isinstance(value, int | float) and not isinstance(value, bool): out[key] = number(key, value)
        else: out[key] = value
    return mended(out)


def config_of(kind: str, name: str) -> PreTrainedConfig:
    "The small configuration of a class of models."
    cls = class_of(name).config_class or CONFIG_MAPPING[kind]
    fields = shrunk(cls().to_dict()) | PER_CLASS.get(name, {})
    for part in (fields, *(v for v in fields.values() if isinstance(v, dict))):
        if "head_dim" in part and part["head_dim"] is None: part["head_dim"] = 8
        if any(word in name for word in MROPE) and isinstance(part.get("rope_parameters"), dict):
            part["rope_parameters"] |= dict(mrope_section=[1, 1, 2])
        if "num_attention_heads" in part and part.get("num_key_value_heads", 0) is None: part["num_key_value_heads"] = HEADS
    for key in ("architectures", "transformers_version", "model_type", "_name_or_path"): fields.pop(key, None)
    return cls.from_dict(fields)


def class_of(name: str) -> type[PreTrainedModel]: return getattr(transformers, name)


def build(kind: str, name: str) -> PreTrainedModel:
    "The model of a class on the small configuration of a type, in eval mode; the same weights every time."
    cls, config = class_of(name), config_of(kind, name)
    if hasattr(config, "is_decoder"): config.is_decoder = True
    config._attn_implementation = "eager" # rows that do not depend on their neighbours
    with torch.device("meta"): size = cls(config).num_parameters()
    if size > MOST: raise ValueError(f"{size:,} parameters, more than {MOST:,}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config)
        for p in model.parameters():
            if not p.isfinite().all() or p.abs().max() > 1e3: torch.nn.init.normal_(p, std=0.1)
            elif not p.any(): torch.nn.init.normal_(p, std=0.1) # what starts at zero: something to be lost
    return model.eval()


def cases() -> list[tuple[str, str]]:
    "(type, class): every class of a language model, each once."
    found = {}
    for names in (TEXT, IMAGES, SOUNDS):
        for kind, cls in names.items():
            if isinstance(cls, str): found.setdefault(cls, kind)
    return [(kind, cls) for cls, kind in found.items()]
