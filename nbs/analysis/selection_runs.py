"""The runs of `does_selection_help.ipynb`, one file per finished run, for a machine with a GPU or without one.

    python selection_runs.py --tier all --device cuda --jobs 12 --seconds 380 --out FOLDER

A run trains one adapter (an *arm*) on the pairs of one axis, finds the doses at which it costs a budget of mean KL on held-back
pairs, and reads the margin there on test pairs. Each arm's learning rate is chosen on held-back pairs first, with a seed that no
later run uses.
"""
import argparse
import json
import logging
import math
import os
import random
import sys
import time
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock

from modlab import (
    ContrastConfig,
    LoRAConfig,
    ModulatedLoRA,
    ModulatedPiSSA,
    NonFiniteLoss,
    PiSSAConfig,
    capture_activations,
    capture_gradients,
    collate,
    contrast,
    find_targets,
    kl_rev,
    load_model,
    load_pairs,
    selection_scores,
    thin_svd,
    tiny_model,
)
from modlab.adapters.adapter import Adapter
from modlab.adapters.hooks import Adder, Hooks
from modlab.maths.divergence import token_nll
from modlab.maths.scores import GRADIENT_SCORES, SCORES
from modlab.maths.statistics import project
from modlab.maths.steps import step_sizes
from modlab.measure.grid import grid
from modlab.model.loading import evaluating
from modlab.model.readout import Readout, answer_ids, answer_rows
from modlab.model.text import encode_side

logging.getLogger("modlab").setLevel(logging.ERROR)  # errors of runs are told by `Plan.go`
HERE = Path(__file__).resolve().parent
AXES = json.loads((HERE / "axes.json").read_text(encoding="utf-8"))  # axis -> its two personas
CHOICE_AXES, LAST_AXIS = ("knight", "poet"), "formal"  # choices are made on the first two; the third is run once, at the end
SEEDS, TUNING_SEED = (0, 1, 2), 100  # of training pairs, their order, random directions; of the runs that choose a rate
BAND, BUDGET, WRITERS = (0.3, 0.7), 0.2, ("o_proj", "down_proj")
OLDER = [mode for mode in SCORES if mode not in GRADIENT_SCORES]
FULL = dict(train=48, held_back=24, test=36, epochs=2, batch=4, r=64)
TINY = dict(train=4, held_back=2, test=2, epochs=1, batch=2, r=4)

# kind, score, power of the step (step_j = F_j ** -power), which layers, where the rank is shared out
ARMS = {
    "random": ("pissa", "random", 0.0, "all"), "wanda": ("pissa", "wanda", 0.0, "all"),
    "grad_fisher": ("pissa", "grad_fisher", 0.0, "all"),
    "random 1/√F": ("pissa", "random", 0.5, "all"), "grad_fisher 1/√F": ("pissa", "grad_fisher", 0.5, "all"),
    "random 1/F": ("pissa", "random", 1.0, "all"), "grad_fisher 1/F": ("pissa", "grad_fisher", 1.0, "all"),
    "s_only": ("pissa", "s_only", 0.0, "all"), "act_only": ("pissa", "act_only", 0.0, "all"),
    "cho_rej_min_std": ("pissa", "cho_rej_min_std", 0.0, "all"), "grad_abs": ("pissa", "grad_abs", 0.0, "all"),
    "grad_snr": ("pissa", "grad_snr", 0.0, "all"), "taylor": ("pissa", "taylor", 0.0, "all"),
    "random writers": ("pissa", "random", 0.0, "writers"), "grad_fisher writers": ("pissa", "grad_fisher", 0.0, "writers"),
    "grad_fisher shared": ("pissa", "grad_fisher", 0.0, "shared"), "full spectrum": ("pissa", "s_only", 0.0, "every"),
    "lora 5376": ("lora", 1, 2.0, "v_proj"), "lora r=16": ("lora", 16, 32.0, "all-linear"),
    "steering": ("steering", None, 0.0, "block"), "prompt": ("prompt", None, 0.0, "none"),
}
CORE = ("random", "wanda", "grad_fisher", "random 1/√F", "grad_fisher 1/√F")
WITNESSES = ("lora 5376", "lora r=16", "steering", "prompt")
MAIN = tuple(a for a in CORE + WITNESSES if a != "prompt")
WIDE = tuple(a for a in ARMS if a not in CORE + WITNESSES)
PISSA_RATES, LORA_RATES, BLOCKS = (0.03, 0.1, 0.3, 1.0, 3.0), (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), (8, 12, 16, 20, 24)
LORA16_RATES = (3e-4, 1e-3, 3e-3, 1e-2)


# ---- the model, the pairs, and what is computed once ----

def scratch() -> Path: return Path(os.environ["SELECTION_SCRATCH"])
def size(model:str) -> dict: return TINY if model == "tiny" else FULL

def once(name:str, make):
    "What `make` returns, from the file of this name if it is there; one process makes it."
    path = scratch() / f"{name}.pt"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            torch.save(make(), half := path.with_suffix(".half"))
            half.rename(path)
    return torch.load(path, map_location=os.environ["SELECTION_DEVICE"])

class Lab:
    "A model with the layers of the middle blocks and their singular directions, on the device."
    def __init__(self, name:str):
        model, self.tok = tiny_model() if name == "tiny" else load_model(dtype=torch.float32)
        self.name, self.size, self.device = name, size(name), os.environ["SELECTION_DEVICE"]
        self.model = model.to(self.device).requires_grad_(False)
        self.layers = find_targets(self.model, LoRAConfig(layer_range=BAND))
        self.basis = once(f"{name}-basis", lambda: {n: thin_svd(layer.weight) for n, layer in self.layers.items()})
        self.pad = self.tok.pad_token_id or 0

@cache
def lab(name:str) -> Lab: return Lab(name)

@cache
def parts(model:str, axis:str) -> dict[str, list]:
    "Held-back pairs (for every choice), the pool to train on, and the test pairs."
    n, pairs, test = size(model), load_pairs("train", axis=axis), load_pairs("test", axis=axis)
    pairs = random.Random(0).sample(pairs, len(pairs))
    return dict(held_back=pairs[:n["held_back"]], pool=pairs[n["held_back"]:], test=test[:n["test"]])

def training_pairs(model:str, axis:str, seed:int) -> list:
    return random.Random(seed).sample(parts(model, axis)["pool"], size(model)["train"])


# ---- scores ----

def gradient_scores(where:Lab, pairs:list) -> tuple[dict, dict]:
    "The four scores from gradients, mode -> layer -> (k,), and the Fisher diagonal, layer -> (k,)."
    stats = capture_gradients(where.model, where.tok, pairs, LoRAConfig(layer_range=BAND))
    scores = {mode: {n: selection_scores(where.basis[n][1], mode, st, n) for n, st in stats.items()} for mode in GRADIENT_SCORES}
    return scores, {n: st.fisher for n, st in stats.items()}

def activation_scores(where:Lab, pairs:list) -> dict:
    "The four older scores; mode -> layer -> (k,)."
    X = capture_activations(where.model, where.tok, pairs, LoRAConfig(layer_range=BAND))
    scores = {mode: {} for mode in OLDER}
    for n, (_, S, Vh) in where.basis.items():
        stats = {side: project(x, Vh, n) for side, x in X[n].items()}
        for mode in OLDER: scores[mode][n] = selection_scores(S, mode, stats, n)
    return scores

@cache
def captured(model:str, axis:str, seed:int) -> dict: # scores: mode -> layer -> (k,); fisher: layer -> (k,)
    def make():
        pairs = training_pairs(model, axis, seed)
        scores, fisher = gradient_scores(lab(model), pairs)
        return dict(scores=scores | activation_scores(lab(model), pairs), fisher=fisher)
    return once(f"{model}-{axis}-{seed}", make)


# ---- arms ----

def chosen(where:Lab, score:str, layers:str, r:int, axis:str, seed:int) -> dict[str, torch.Tensor]: # layer -> ascending indices
    k = {n: len(S) for n, (_, S, _) in where.basis.items()}
    if layers == "every": return {n: torch.arange(size) for n, size in k.items()}
    if score == "random":
        g = torch.Generator().manual_seed(seed)
        scores = {n: torch.rand(size, generator=g) for n, size in k.items()}
    else: scores = {n: s.cpu() for n, s in captured(where.name, axis, seed)["scores"][score].items()}
    total = r * len(k)
    if layers == "shared":
        least = torch.cat(list(scores.values())).topk(total).values[-1]
        found = {n: (s >= least).nonzero()[:, 0] for n, s in scores.items()}
        return {n: idx for n, idx in found.items() if len(idx)}
    if layers == "writers":
        scores = {n: s for n, s in scores.items() if n.rpartition(".")[2] in WRITERS}
        r = total // len(scores)
    return {n: s.topk(min(r, len(s))).indices.sort().values for n, s in scores.items()}

def pissa(where:Lab, idx:dict, power:float, axis:str, seed:int) -> ModulatedPiSSA:
    "An adapter on these directions, from the decomposition that is there; `delta_s` starts at 0."
    tables = {t: {} for t in ("U", "S", "Vh", "delta_s", "chosen_idx", "spectrum")}
    for n, i in idx.items():
        U, S, Vh = where.basis[n]
        at = i.to(U.device)
        made = dict(U=U[:, at], S=S[at], Vh=Vh[at], delta_s=torch.zeros(len(i)), chosen_idx=i, spectrum=S)
        for t, value in made.items(): tables[t][n] = value
    if power:
        fisher = captured(where.name, axis, seed)["fisher"]
        tables["step"] = step_sizes({n: fisher[n].cpu()[i] for n, i in idx.items()}, power)
    cfg = PiSSAConfig(r=max(map(len, idx.values())), layer_range=BAND, extract=False, init=(0.0, 0.0), step=power or "plain")
    adapter = ModulatedPiSSA.__new__(ModulatedPiSSA)
    adapter.setup(where.model, cfg, {n: where.layers[n] for n in idx}, tables)
    return adapter

class Shift(Adder):
    "Adds `c` times a vector."
    def __init__(self, name, layer, hooks, vector):
        self.vector = vector
        super().__init__(name, layer, hooks)
    def bind(self): self.cell = self.hooks.cell(self.vector.device, self.vector.dtype)
    def add(self, x, y):
        c = self.cell.dose.c
        return y + (c[:, None, None] if c.ndim else c) * self.vector

class Steering(Adapter):
    "`c` times a vector, added to the output of a block."
    def __init__(self, block, vector):
        self.vector, self.layers = vector, {"block": block}
        self.hooks = Hooks(self.layers, lambda name, layer, hooks: Shift(name, layer, hooks, vector))

@torch.no_grad()
def mean_output(where:Lab, layer, side:str, pairs:list) -> torch.Tensor: # of a block, over the tokens of answers
    seen, batch = [], collate([encode_side(where.tok, p, side, 512) for p in pairs], where.pad)
    hook = layer.register_forward_hook(lambda layer, args, y: seen.append(y))
    try: where.model.base_model(**batch.inputs(where.device), use_cache=False)
    finally: hook.remove()
    return seen[0][batch.is_target.to(where.device)].mean(0)

def steering(where:Lab, block:int, pairs:list) -> Steering:
    "The mean difference of a block's output on the tokens of chosen and of rejected answers."
    layer = where.model.model.layers[block]
    return Steering(layer, mean_output(where, layer, "cho", pairs) - mean_output(where, layer, "rej", pairs))

def build(where:Lab, arm:str, axis:str, seed:int, lr:float, r:int, chosen_on:str) -> Adapter:
    kind, score, power, layers = ARMS[arm]
    if kind == "steering": return steering(where, int(lr), training_pairs(where.name, axis, seed))
    if kind == "lora":
        band = (0.4, 0.634) if layers == "v_proj" else BAND  # seven blocks: as many parameters as PiSSA
        return ModulatedLoRA(where.model, r=score, alpha=power, targets=layers, layer_range=band,
                             generator=torch.Generator().manual_seed(seed))
    idx = chosen(where, score, layers, r, chosen_on, seed)
    return pissa(where, idx, power, axis, seed)


# ---- what a dose costs and what it buys ----

class Probe:
    "Both answers of some pairs as token ids, with what the base makes of them."
    def __init__(self, where:Lab, pairs:list):
        self.where, self.n = where, len(pairs)
        self.rows = [encode_side(where.tok, p, side, 512) for side in ("cho", "rej") for p in pairs]  # all chosen come first
        self.readout = Readout(where.model, collate(self.rows[:1], where.pad))
        with torch.no_grad(): self.base = [self.readout.states(collate([row], where.pad)) for row in self.rows]

    @torch.no_grad()
    def read(self, rows:list[int], prepare, personas=None) -> torch.Tensor: # (row, [KL, NLL, 1]): sums over its answer tokens
        "`prepare(part)` sets the doses of a part of the rows; `personas`: other token ids of the same answers."
        encoded, total = personas or self.rows, torch.zeros(len(rows), 3, dtype=torch.float64)
        order = sorted(range(len(rows)), key=lambda n: len(encoded[rows[n]][0]))
        for k in range(0, len(order), 48):
            part = order[k:k + 48]
            batch, base = collate([encoded[rows[n]] for n in part], self.where.pad), torch.cat([self.base[rows[n]] for n in part])
            prepare(part)
            h, ids = self.readout.states(batch), answer_ids(batch).to(base.device)
            at = torch.tensor(part)[answer_rows(batch)]
            for tokens in torch.arange(len(ids)).split(768):
                logits, reference = self.readout.logits(h[tokens]), self.readout.logits(base[tokens])
                kl, nll = kl_rev(logits, reference), token_nll(logits, ids[tokens])
                values = torch.stack([kl, nll, torch.ones_like(kl)], 1)
                total.index_add_(0, at[tokens], values.double().cpu())
        return total

    def at(self, adapter:Adapter, rows:list[int], doses:list[float]) -> torch.Tensor:
        "The same for rows at doses of their own. The adapter is attached."
        c = torch.tensor(doses)
        return self.read(rows, lambda part: adapter.set_coeff(c[part]))

@cache
def probe(model:str, axis:str, which:str) -> Probe: return Probe(lab(model), parts(model, axis)[which])

def doses_for(probe:Probe, adapter:Adapter, budgets:list[float], tol:float=0.03, rounds:int=16) -> dict:
    "(budget, sign) -> c, or NaN: the dose whose mean KL on the chosen answers meets the budget. All are searched at once."
    goals = [(b, sign) for b in budgets for sign in (1, -1)]
    c, seen, found = {g: (g[0] / BUDGET) ** 0.5 for g in goals}, {g: [] for g in goals}, {}
    for _ in range(rounds):
        open_ = [g for g in goals if g not in found]
        if not open_: break
        total = probe.at(adapter, [*range(probe.n)] * len(open_), [g[1] * c[g] for g in open_ for _ in range(probe.n)])
        for g, part in zip(open_, total.view(len(open_), probe.n, 3).sum(1)):
            seen[g].append((c[g], max((part[0] / part[2]).item(), 1e-12)))
            c[g], done = next_dose(seen[g], g[0], tol)
            if done: found[g] = g[1] * c[g]
    return {g: found.get(g, math.nan) for g in goals}

def next_dose(seen:list[tuple], budget:float, tol:float) -> tuple[float, bool]: # (dose, is it the one)
    "From the doses tried so far and their KL: the secant of log KL over log c, kept within the bracket."
    c, kl = seen[-1]
    if abs(math.log(kl / budget)) < tol: return c, True
    below, above = [s[0] for s in seen if s[1] <= budget], [s[0] for s in seen if s[1] > budget]
    slope = 2.0
    if len(seen) > 1 and seen[-2][0] != c: slope = math.log(seen[-2][1] / kl) / math.log(seen[-2][0] / c)
    new = c * min(max((budget / kl) ** (1 / min(max(slope, 0.5), 4.0)), 0.1), 10.0)
    if below and above and not max(below) < new < min(above): new = (max(below) * min(above)) ** 0.5
    return new, False

def effect(total:torch.Tensor, n:int) -> dict: # of rows: chosen at +, rejected at +, chosen at −, rejected at −
    kl, nll, tokens = total.view(4, n, 3).sum(1).T
    margin = [(nll[k + 1] / tokens[k + 1] - nll[k] / tokens[k]).item() for k in (0, 2)]
    return dict(effect=margin[0] - margin[1], margin_plus=margin[0], margin_minus=margin[1], kl_plus=(kl[0] / tokens[0]).item(),
                kl_minus=(kl[2] / tokens[2]).item(), nll_cho=(nll[0] / tokens[0]).item(), nll_rej=(nll[3] / tokens[3]).item())

def measured(where:Lab, adapter:Adapter, axis:str, budgets:list[float], on:str) -> list[dict]:
    "Doses from held-back pairs, effects on the pairs of `on`; one row per budget."
    held_back, test, rows = probe(where.name, axis, "held_back"), probe(where.name, axis, on), []  # of the base: nothing attached
    with evaluating(where.model), adapter(where.model, 0.0):
        found = doses_for(held_back, adapter, budgets)
        for b in budgets:
            plus, minus = found[b, 1], found[b, -1]
            row = dict(budget=b, c_plus=plus, c_minus=minus)
            if math.isfinite(plus) and math.isfinite(minus):
                both = [*range(2 * test.n)]
                row |= effect(test.at(adapter, both * 2, [plus] * len(both) + [minus] * len(both)), test.n)
                row["equal"] = row["effect"] * (2 * b / (row["kl_plus"] + row["kl_minus"])) ** 0.5
            rows.append(row)
    return rows

def in_time() -> None:
    if time.time() > float(os.environ.get("SELECTION_DEADLINE", "inf")): raise TimeoutError("the time of these runs is over")


# ---- runs: functions that `grid` calls ----

def run(model:str, axis:str, arm:str, lr:float, seed:int, epochs:int, r:int, budgets:list, on:str, chosen_on:str) -> pd.DataFrame:
    "Train one adapter and measure it. `lr` is the block for `steering`."
    in_time()
    start, where = time.time(), lab(model)
    adapter = build(where, arm, axis, seed, lr, r, chosen_on)
    count, loss = 0, math.nan
    if ARMS[arm][0] != "steering":
        count = sum(p.numel() for p in adapter.parameters())
        cfg = ContrastConfig(lr=lr, epochs=epochs, batch_size=where.size["batch"], val_frac=0.0, seed=seed)
        try: log = contrast(where.model, where.tok, adapter, training_pairs(model, axis, seed), cfg).log
        except NonFiniteLoss as e: return pd.DataFrame([dict(budget=b, n_parameters=count, ended=str(e)[:80]) for b in budgets])
        loss = log[log.epoch == epochs - 1].loss.mean()
    rows = measured(where, adapter, axis, budgets, on)
    return pd.DataFrame(rows).assign(n_parameters=count, loss=loss, seconds=time.time() - start)

def run_prompt(model:str, axis:str, on:str) -> dict:
    "The two personas as system prompts: what they cost and buy. They have no dose."
    in_time()
    where, pairs, test = lab(model), parts(model, axis)[on], probe(model, axis, on)
    total = []
    for side in ("cho", "rej"):
        persona = {"role": "system", "content": AXES[axis][side]}
        rows = [encode_side(where.tok, p | dict(prompt=[persona, *p["prompt"]]), s, 512) for s in ("cho", "rej") for p in pairs]
        with evaluating(where.model): total.append(test.read([*range(2 * test.n)], lambda part: None, rows))
    return effect(torch.cat(total), test.n)

def run_where(model:str, axis:str, arm:str, lr:float, seed:int) -> pd.DataFrame:
    "One trained adapter at its dose, with the directions of a role or of a third of the blocks alone: what each costs and buys."
    in_time()
    where, n = lab(model), size(model)
    adapter = build(where, arm, axis, seed, lr, n["r"], axis)
    cfg = ContrastConfig(lr=lr, epochs=n["epochs"], batch_size=n["batch"], val_frac=0.0, seed=seed)
    contrast(where.model, where.tok, adapter, training_pairs(model, axis, seed), cfg)
    whole = measured(where, adapter, axis, [BUDGET], "test")[0]
    blocks = sorted({block_number(name) for name in adapter.layers})
    thirds = [b for b in (blocks[k * len(blocks) // 3:(k + 1) * len(blocks) // 3] for k in range(3)) if b]
    roles = dict.fromkeys(name.rpartition(".")[2] for name in adapter.layers)
    groups = {role: [name for name in adapter.layers if name.endswith(role)] for role in roles}
    groups |= {f"blocks {b[0]}-{b[-1]}": [name for name in adapter.layers if block_number(name) in b] for b in thirds}
    trained, rows = {n: p.detach().clone() for n, p in adapter.theta.items()}, [dict(part="whole") | whole]
    for part, kept in groups.items():
        with torch.no_grad():
            for name, p in adapter.theta.items(): p.copy_(trained[name] if name in kept else torch.zeros_like(p))
        test = probe(model, axis, "test")
        both = [*range(2 * test.n)]
        doses = [whole["c_plus"]] * len(both) + [whole["c_minus"]] * len(both)
        with evaluating(where.model), adapter(where.model, 0.0): total = test.at(adapter, both * 2, doses)
        rows.append(dict(part=part, directions=sum(len(trained[name]) for name in kept)) | effect(total, test.n))
    return pd.DataFrame(rows)

def block_number(name:str) -> int: return int(name.split(".layers.")[1].partition(".")[0])

def run_overlap(model:str, axis:str, score:str) -> dict:
    "How much of the choice two disjoint halves of the pool share, and two axes; 1 is the same choice, r/k is chance."
    in_time()
    where, r = lab(model), size(model)["r"]
    pool, found = parts(model, axis)["pool"], []
    for half in (pool[::2], pool[1::2]):
        scores = gradient_scores(where, half)[0] if score in GRADIENT_SCORES else activation_scores(where, half)
        found.append({n: set(s.topk(min(r, len(s))).indices.tolist()) for n, s in scores[score].items()})
    other = next(a for a in CHOICE_AXES if a != axis)
    there = chosen(where, score, "all", r, other, 0)
    here = chosen(where, score, "all", r, axis, 0)
    share = lambda a, b: sum(len(set(a[n]) & set(b[n])) for n in a) / sum(len(a[n]) for n in a)
    as_sets = [{n: set(i.tolist()) for n, i in x.items()} for x in (here, there)]
    sizes = [(min(r, len(S)), len(S)) for _, S, _ in where.basis.values()]
    chance = sum(n * n / k for n, k in sizes) / sum(n for n, _ in sizes)
    return dict(halves=share(*found), axes=share(*as_sets), chance=chance, pairs_per_half=len(pool) // 2)


# ---- tiers ----

def rates(arm:str) -> tuple:
    known = {"lora 5376": LORA_RATES, "lora r=16": LORA16_RATES, "steering": BLOCKS}
    return known.get(arm, PISSA_RATES if arm in CORE else PISSA_RATES[1:4])

def setting(model:str, axis:str, arm:str, lr:float, seed:int, **other) -> dict:
    n = size(model)
    usual = dict(epochs=n["epochs"], r=n["r"], budgets=[BUDGET], on="test", chosen_on=axis)
    return dict(model=model, axis=axis, arm=arm, lr=float(lr), seed=seed) | usual | other

def tuning(model:str, arms) -> list[dict]:
    "The runs that choose a rate: one seed of their own, read on held-back pairs, on both choice axes."
    trained = [arm for arm in arms if arm != "prompt"]
    grid_of = [(arm, axis, lr) for arm in trained for axis in CHOICE_AXES for lr in rates(arm)]
    return [setting(model, axis, arm, lr, TUNING_SEED, on="held_back") for arm, axis, lr in grid_of]

def best_rates(table:pd.DataFrame) -> pd.Series: # arm -> rate
    "The rate with the largest effect, as a mean over the axes; a rate that failed on one axis is out."
    mean = table.groupby(["arm", "lr"]).equal.agg(lambda e: e.mean(skipna=False)).dropna().reset_index()
    return mean.loc[mean.groupby("arm").equal.idxmax()].set_index("arm").lr.astype(object)

def beyond(table:pd.DataFrame) -> list[tuple]: # (arm, rate) that are next to a best rate at the edge of those tried
    more = []
    for arm, best in best_rates(table).items():
        tried = sorted(map(float, table[table.arm == arm].lr.unique()))
        if arm == "steering" or len(tried) < 2: continue
        if best == tried[-1]: more.append((arm, float(f"{best * tried[-1] / tried[-2]:.2g}")))
        if best == tried[0]: more.append((arm, float(f"{best * tried[0] / tried[1]:.2g}")))
    return more

class Plan:
    "Runs tier after tier into one folder, as long as there is time."
    def __init__(self, model:str, folder:Path, jobs:int):
        self.model, self.folder, self.jobs, self.tuned = model, folder, jobs, []  # tuned: settings of runs that choose a rate

    def go(self, f, settings:list[dict]) -> pd.DataFrame:
        start = time.time()
        table = grid(f, settings, self.folder, n_jobs=self.jobs, progress=False)
        done = table.error.isna().sum()
        print(f"{time.strftime('%H:%M:%S')} {f.__name__}: {done} of {len(table)} rows in {time.time() - start:.0f} s", flush=True)
        for error in table.error.dropna().unique()[:2]: print("   ", error[:300], flush=True)
        return table

    def tune(self, arms) -> pd.Series:
        "The best rate of each arm; where it lies at the edge, the grid goes on (twice at most)."
        self.tuned += [s for s in tuning(self.model, arms) if s not in self.tuned]
        table = self.go(run, self.tuned)
        for _ in range(2):
            axes = dict.fromkeys(s["axis"] for s in self.tuned)
            edges = beyond(table[table.error.isna()])
            more = [setting(self.model, axis, arm, lr, TUNING_SEED, on="held_back") for arm, lr in edges for axis in axes]
            more = [s for s in more if s not in self.tuned]
            if not more: break
            self.tuned += more
            table = self.go(run, self.tuned)
        return best_rates(table[table.error.isna()])

    def seeds(self, arms, best, axes=CHOICE_AXES, seeds=SEEDS, **other) -> None:
        runs = [(seed, axis, arm) for seed in seeds for axis in axes for arm in arms if arm in best]
        self.go(run, [setting(self.model, axis, arm, best[arm], seed, **other) for seed, axis, arm in runs])

    def core(self) -> None: self.seeds(CORE, self.tune(CORE))

    def witnesses(self) -> None:
        self.go(run_prompt, [dict(model=self.model, axis=axis, on=on) for axis in AXES for on in ("held_back", "test")])
        trained = [arm for arm in WITNESSES if arm != "prompt"]
        self.seeds(trained, self.tune(trained))

    def held_out(self) -> None: self.seeds(MAIN, self.tune(MAIN), [LAST_AXIS])
    def wide(self) -> None:
        best = self.tune(WIDE)
        self.seeds(WIDE, best)

    def curve(self) -> None:
        "Effect against steps, on held-back pairs, and against the number of directions."
        best, arms = self.tune(MAIN), ("random", "grad_fisher", "grad_fisher 1/√F", "lora 5376", "lora r=16")
        self.go(run, [setting(self.model, axis, arm, best[arm], TUNING_SEED, epochs=e, on="held_back")
                      for e in (1, 4, 8) for axis in CHOICE_AXES[:1] for arm in arms if arm in best])
        self.go(run, [setting(self.model, axis, arm, best[arm], 0, r=r) for r in (1, 4, 16, 256) for axis in CHOICE_AXES
                      for arm in ("random", "grad_fisher") if arm in best])

    def price(self) -> None:
        own = self.go(run_prompt, [dict(model=self.model, axis=axis, on="held_back") for axis in CHOICE_AXES]).set_index("axis")
        for axis in CHOICE_AXES:
            cost = round(float(own.loc[axis, ["kl_plus", "kl_minus"]].mean()), 4)
            self.seeds(MAIN, self.tune(MAIN), [axis], SEEDS[:2], budgets=[0.05, 0.5, cost])

    def stable(self) -> None:
        best = self.tune(MAIN)
        pairs = [(axis, score) for axis in CHOICE_AXES for score in ("grad_fisher", "wanda")]
        self.go(run_overlap, [dict(model=self.model, axis=axis, score=score) for axis, score in pairs])
        for axis, other in (CHOICE_AXES, CHOICE_AXES[::-1]): self.seeds(["grad_fisher"], best, [axis], chosen_on=other)
        pairs = [(axis, arm) for axis in CHOICE_AXES for arm in ("grad_fisher", "random")]
        self.go(run_where, [dict(model=self.model, axis=axis, arm=arm, lr=best[arm], seed=0) for axis, arm in pairs])

    def more_seeds(self) -> None: self.seeds(MAIN, self.tune(MAIN), CHOICE_AXES, (3, 4))

TIERS = ("core", "witnesses", "held_out", "curve", "stable", "wide", "price", "more_seeds")

def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--tier", nargs="+", default=["all"], choices=("all", *TIERS))
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--jobs", type=int, default=1)
    p.add_argument("--out", default=HERE / "results" / "selection", type=Path)
    p.add_argument("--scratch", default=None, type=Path, help="for decompositions and scores; beside --out if not given")
    p.add_argument("--seconds", type=float, default=math.inf, help="no run starts after so many")
    p.add_argument("--tiny", action="store_true", help="a tiny random model, to try the whole")
    args = p.parse_args()
    scratch = (args.scratch or args.out.parent / "scratch").absolute()
    scratch.mkdir(parents=True, exist_ok=True)
    deadline = str(time.time() + args.seconds)
    os.environ |= dict(SELECTION_SCRATCH=str(scratch), SELECTION_DEVICE=args.device, SELECTION_DEADLINE=deadline,
                       TQDM_DISABLE="1", OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"), MALLOC_MMAP_THRESHOLD_="1000000",
                       PYTHONPATH=os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    model = "tiny" if args.tiny else "SmolLM2-135M-Instruct"
    plan = Plan(model, args.out, args.jobs)
    for tier in TIERS if "all" in args.tier else args.tier:
        if time.time() > float(os.environ["SELECTION_DEADLINE"]): break
        print(f"{time.strftime('%H:%M:%S')} tier {tier}", flush=True)
        getattr(plan, tier)()

if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    import selection_runs  # under its own name, so that the functions can be found by the workers
    selection_runs.main()
