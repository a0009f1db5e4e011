"""What must hold on any device, on the tiny model and without a network: the checks of `gpu_check.py`, one function each.

A check gets the device and the dtype of the base, returns what it measured (words), and fails by an AssertionError or any error.
`NotHere` says that what it needs is not installed.
"""
import copy
import importlib.util
import tempfile
from pathlib import Path

import torch

from modlab import HealConfig, ModulatedLoRA, ModulatedPiSSA, baked, heal, kl_curve, load_adapter, restore, tiny_model
from modlab.model.copies import FastMap

ABLE = {torch.float32: 2**-12, torch.bfloat16: 2**-4}  # of the logits' norm: what rounding may do over four blocks at |c| <= 3


class NotHere(Exception):
    "What a check needs is not there."


def seeded(seed: int) -> torch.Generator: return torch.Generator().manual_seed(seed)


def build(device, dtype): return tiny_model()[0].to(device, dtype)


def tokens(device, b=3, s=7): return torch.randint(3, 96, (b, s), generator=seeded(1)).to(device)


@torch.no_grad()
def logits(model, ids): return model(input_ids=ids, use_cache=False).logits


def gap(a, b) -> float: return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def away(a, b) -> float: return ((a.double() - b.double()).norm() / b.double().norm()).item()


def lora(model, seed=2, **kw):
    "A LoRA as training would leave it."
    a = ModulatedLoRA(model, **dict(r=6, generator=seeded(seed)) | kw)
    with torch.no_grad():
        for B in a.B.values(): B.copy_((torch.randn(B.shape, generator=seeded(seed + 1)) * 0.1).to(B.device))
    return a


def pissa(model, extract, **kw):
    how = dict(r=6, selection_score="s_only", init=(0.3, 0.5), extract=extract, generator=seeded(2))
    return ModulatedPiSSA(model, **how | kw)


def near(got, wanted, dtype, times=1.0) -> str:
    off = away(got, wanted)
    assert off <= times * ABLE[dtype], f"off by {off:.2g} of the norm, allowed {times * ABLE[dtype]:.2g}"
    return f"off by {off:.1e}"


def fresh_lora_is_no_op(device, dtype):
    model, ids = build(device, dtype), tokens(device)
    base, a = logits(model, ids), ModulatedLoRA(model, r=6)
    for c in (1.0, -3.5, torch.tensor([1.0, 2.0, 0.0])):
        with a(model, c): assert torch.equal(logits(model, ids), base), f"c = {c}"
    return "bit for bit at four doses"


def zero_is_the_base(device, dtype):
    model, ids = build(device, dtype), tokens(device)
    base, a = logits(model, ids), lora(model)
    with a(model, 0.0): assert torch.equal(logits(model, ids), base)
    with a(model, torch.zeros(3)): assert torch.equal(logits(model, ids), base), "a tensor of zeros"
    with a(model, 1.0): assert not torch.equal(logits(model, ids), base)
    assert torch.equal(logits(model, ids), base), "something stayed behind"
    return "bit for bit"


def a_dose_per_row(device, dtype):
    model, ids, cs = build(device, dtype), tokens(device), [1.0, 0.0, -2.5]
    said = []
    for a in (lora(model), pissa(model, False)):
        with a(model, torch.tensor(cs)):
            together, alone = logits(model, ids), []
            for c in cs:
                a.set_coeff(c)
                alone.append(logits(model, ids))
        assert all(torch.equal(together[n], alone[n][n]) for n in range(3)), near(together[0], alone[0][0], dtype)
        said.append(type(a).__name__)
    return f"bit for bit: {', '.join(said)}"


def hook_is_fold(device, dtype):
    model, ids = build(device, dtype), tokens(device)
    base, a = logits(model, ids), lora(model)
    with a(model, 0.5): hooked = logits(model, ids)
    with baked(model, [(a, 0.5)]): folded = logits(model, ids)
    assert torch.equal(logits(model, ids), base), "taking it out left something behind"
    return near(hooked, folded, dtype)


def two_forms_of_pissa(device, dtype):
    model, ids = build(device, dtype), tokens(device)
    base, a = logits(model, ids), pissa(model, False)
    with a(model, 0.7): outside = logits(model, ids)
    other = build(device, dtype)
    b = pissa(other, True)
    with b(other, 0.0): zero = logits(other, ids)
    with b(other, 0.7): inside = logits(other, ids)
    return f"c = 0: {near(zero, base, dtype)}; c = 0.7: {near(inside, outside, dtype)}"


def exact_restore(device, dtype):
    model = build(device, dtype)
    before = {n: p.clone() for n, p in model.named_parameters()}
    pissa(model, True)
    changed = sum(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    restore(model)
    assert changed and all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    return f"{changed} weights changed and put back bit for bit"


def choices_are_those_of_the_cpu(device, dtype):
    here, there = (pissa(build(where, dtype), False) for where in (device, "cpu"))
    same = [torch.equal(here.chosen_idx[n].cpu(), there.chosen_idx[n].cpu()) for n in here.layers]
    off = max(gap(here.S[n].cpu(), there.S[n]) for n in here.layers)
    assert all(same) and off < 1e-5, f"{sum(same)} of {len(same)} layers, S off by {off:.1e}"
    return f"{len(same)} layers, S off by {off:.1e}"


def files_across_devices(device, dtype):
    a, ids = lora(model := build(device, dtype)), tokens("cpu")
    with tempfile.TemporaryDirectory() as folder:
        a.save(path := Path(folder) / "a.safetensors")
        there = load_adapter(cpu := build("cpu", dtype), path)
        there.save(path)
        back = load_adapter(model, path)
    for n in a.layers:
        for table in ("A", "B"): assert torch.equal(getattr(a, table)[n].cpu(), getattr(there, table)[n]), n
        assert back.A[n].device == a.A[n].device
    with there(cpu, 1.0): y = logits(cpu, ids)
    with back(model, 1.0): return near(logits(model, ids.to(device)).cpu(), y, dtype)


def fast_is_plain(device, dtype):
    "The way without gradients beside the way with them, layer by layer and through the model."
    model, ids, worst = build(device, dtype), tokens(device, 3, 20), 0.0
    a, serves = lora(model, r=16), FastMap.serves
    for name, layer in a.layers.items():
        x = torch.randn(3, 20, layer.in_features, generator=seeded(4)).to(device, dtype)
        with torch.no_grad(), a(model, 0.7):
            base = layer.weight.double() @ x.double().mT
            exact = (a.delta(name, 0.7).double() @ x.double().mT).mT
            added = layer(x).double() - base.mT
        worst = max(worst, ((added - exact).norm() / (base.norm() + exact.norm())).item())
    assert worst < (2**-20 if dtype == torch.float32 else 2**-7), worst
    with a(model, 0.7):
        fast = logits(model, ids)
        try:
            FastMap.serves = lambda *args: False
            plain = logits(model, ids)
        finally: FastMap.serves = serves
    return f"a layer off by {worst:.1e} of its output; logits {near(fast, plain, dtype)}"


def an_optimizer_step_is_seen(device, dtype):
    model, ids = build(device, dtype), tokens(device)
    a = lora(model)
    with a(model, 1.0):
        y = logits(model, ids)
        with torch.no_grad():
            for p in a.parameters(): p.mul_(2)
        inside = logits(model, ids)
    with a(model, 1.0): assert torch.equal(logits(model, ids), inside) and not torch.equal(inside, y)
    return "seen"


def gradients_are_those_of_the_cpu(device, dtype):
    found = []
    for where in (device, "cpu"):
        model, ids = build(where, dtype), tokens(where)
        a = lora(model)
        with a(model, torch.tensor([1.0, -1.0, 0.5])): model(input_ids=ids, labels=ids).loss.backward()
        found.append(torch.cat([p.grad.flatten().cpu() for p in a.parameters()]))
    off = ((found[0] - found[1]).norm() / found[1].norm()).item()
    assert off < (1e-3 if dtype == torch.float32 else 0.1), off
    return f"off by {off:.1e} of their norm"


def compiled(device, dtype):
    "In bfloat16 on a card by Triton, elsewhere as a graph alone. Either may round; both are held against the same in float64."
    from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
    torch._dynamo.reset()
    model, ids, whole = build(device, dtype), tokens(device), build(device, dtype).double()
    real = torch.device(device).type == "cuda" and dtype == torch.bfloat16
    a, exact, counter = lora(model), lora(whole), CompileCounterWithBackend("inductor") if real else CompileCounter()
    f = torch.compile(model, backend=counter)
    with torch.no_grad():
        f(input_ids=ids)
        with a(model, 1.0):
            for c in (1.0, 0.5, -3.0):
                a.set_coeff(c)
                with exact(whole, c): wanted = logits(whole, ids)
                off = [away(y, wanted) for y in (f(input_ids=ids).logits, logits(model, ids))]
                assert off[0] <= 2 * off[1] + ABLE[torch.float32], f"c = {c}: off by {off[0]:.2g}, eager by {off[1]:.2g}"
        f(input_ids=ids)
    assert counter.frame_count == 2, f"{counter.frame_count} graphs for two states"
    return f"two graphs for two states; off by {off[0]:.1e}, eager by {off[1]:.1e}"


def static_cache(device, dtype):
    model, ids = build(device, torch.float32), tokens(device, 2, 5)
    a, made = lora(model), {}
    ask = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0, disable_compile=True)
    with a(model, 1.0):
        for kind in ("dynamic", "static"): made[kind] = model.generate(ids, cache_implementation=kind, **ask)
    assert torch.equal(made["dynamic"], made["static"])
    return "the same tokens"


def attention_kinds(device, dtype):
    "The kinds differ in their rounding without an adapter too."
    ids, bare, made = tokens(device), {}, {}
    flash = importlib.util.find_spec("flash_attn") is not None and dtype != torch.float32
    for kind in ("eager", "sdpa", *["flash_attention_2"] * flash):
        model = build(device, dtype)
        model.set_attn_implementation(kind)
        a, bare[kind] = lora(model), logits(model, ids)
        with a(model, torch.tensor([1.0, 0.0, -2.0])): made[kind] = logits(model, ids)
        assert torch.equal(made[kind][1], bare[kind][1]), f"{kind}: the row at c = 0 is not the base"
    times = 1 + 2 * max(away(y, bare["eager"]) for y in bare.values()) / ABLE[dtype]
    return "; ".join(f"{kind} {near(y, made['eager'], dtype, times)}" for kind, y in made.items() if kind != "eager")


def captured(device, dtype):
    "A captured CUDA graph follows set_coeff."
    if torch.device(device).type != "cuda": raise NotHere("a CUDA device")
    from rows_decode import Captured
    model, ids = build(device, dtype), tokens(device)
    a = lora(model)
    mask = torch.zeros(3, 1, 7, 7, device=device, dtype=dtype)
    step = lambda: model(input_ids=ids, use_cache=False, attention_mask=mask).logits
    with torch.no_grad(), a(model, 1.0):
        graph = Captured(step)
        for c in (1.0, -2.0, 0.5):
            a.set_coeff(c)
            got = graph().clone()
            said = near(got, step(), dtype)
    return f"at three doses, {said}"


def quantised(device, dtype):
    if importlib.util.find_spec("bitsandbytes") is None: raise NotHere("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    said = []
    with tempfile.TemporaryDirectory() as folder:
        build("cpu", dtype).save_pretrained(folder)
        for bits in (4, 8):
            how = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
            model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, device_map={"": device}, dtype=dtype)
            ids, a = tokens(device), lora(model)
            with a(model, 0.0): base = logits(model, ids)
            with a(model, 1.0): assert not torch.equal(logits(model, ids), base)
            with a(model, 1.0): model(input_ids=ids, labels=ids).loss.backward()
            assert all(p.grad.isfinite().all() for p in a.parameters())
            said.append(f"{bits} bits")
    return ", ".join(said)


def several_devices(device, dtype):
    "Half of the blocks elsewhere: on another card if there is one, else offloaded to the CPU."
    from accelerate import dispatch_model
    model, ids, cuda = build("cpu", dtype), tokens(device), torch.device(device).type == "cuda"
    main = 0 if cuda else "cpu"
    away = 1 if torch.cuda.device_count() > 1 else "cpu"
    a = lora(whole := build(device, dtype))
    with a(whole, 1.0): wanted = logits(whole, ids)
    places = {f"model.layers.{n}": main if n < 2 else away for n in range(4)}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), main)
    model = dispatch_model(model, places | rest, main_device=main, force_hooks=True)
    b = lora(model)
    with b(model, 1.0): return f"{main} and {away}: {near(logits(model, ids).to(device), wanted, dtype)}"


def training_and_curves(device, dtype):
    tok, words, runs = tiny_model()[1], "one two three four five six seven eight".split(), []
    samples = [dict(prompt=f"say {w}", completion=f" {w} {w}") for w in words]
    for _ in range(2):
        model = build(device, dtype)
        runs.append(heal(model, tok, samples, HealConfig(epochs=2, lr=1e-3, min_train=1, r=4)))
        curve = kl_curve(model, tok, runs[-1].adapter, samples, [-1.0, 0.0, 1.0], progress=False)
    log = [r.log.drop(columns=["grad_ratio"]).fillna(0) for r in runs]
    assert log[0].equals(log[1]), "two runs with one seed differ"
    assert abs(curve.kl_rev_mean[1]) < 1e-6 and curve.kl_rev_mean[2] > 0 and curve.notna().all().all()
    return f"KL at c = 1: {curve.kl_rev_mean[2]:.3g} nats; repeatable"


def a_copy_is_plain(device, dtype):
    model, ids = build(device, dtype), tokens(device)
    base, a = logits(model, ids), lora(model)
    with a(model, 1.0): twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids), base)
    return "plain"


CHECKS = [fresh_lora_is_no_op, zero_is_the_base, a_dose_per_row, hook_is_fold, two_forms_of_pissa, exact_restore,
          choices_are_those_of_the_cpu, files_across_devices, fast_is_plain, an_optimizer_step_is_seen,
          gradients_are_those_of_the_cpu, a_copy_is_plain, static_cache, attention_kinds, quantised, several_devices,
          training_and_curves, compiled, captured]
