"""Random Llamas of the shape of larger models, made on the device itself: nothing is downloaded, and it takes seconds."""
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modlab import tiny_model

SHAPES = {
    "8B": dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=32,
               vocab_size=128256),
    "1B": dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=16,
               vocab_size=128256),
    "small": dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4,
                  vocab_size=512)}


@torch.no_grad()
def random_llama(shape: str, device, dtype=torch.bfloat16, layers: int | None = None):
    "(model in eval mode, tokenizer): normal weights; the tokenizer knows fewer tokens than the model has."
    cfg = LlamaConfig(**SHAPES[shape] | ({} if layers is None else dict(num_hidden_layers=layers)), max_position_embeddings=2048,
                      tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with torch.device("meta"): model = LlamaForCausalLM(cfg)
    model = model.to(dtype).to_empty(device=device)
    for p in model.parameters(): p.normal_(std=0.02) if p.ndim > 1 else p.fill_(1.0)
    model.model.rotary_emb = type(model.model.rotary_emb)(cfg).to(device)  # its frequencies are computed, not drawn
    return model.requires_grad_(False).eval(), tiny_model()[1]
