"""Healing on tiny models: the loss against full logits, every way to cut or to kill a run, and what must not change."""
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from models import adapter_of, build, changes, logits, seeded, state
from torch.nn.functional import cross_entropy

import modlab.learn.loop as training
import modlab.learn.settings as settings
from modlab import (
    HealConfig,
    HistoryBake,
    ModulatedLoRA,
    NonFiniteLoss,
    PiSSAHistoryBake,
    aggregate,
    collate,
    encode,
    heal,
    kl_fwd,
    kl_rev,
    tiny_model,
)
from modlab.learn.heal import _encode_samples as encode_samples
from modlab.learn.heal import _Losses as Losses
from modlab.learn.heal import _postfix as postfix
from modlab.learn.trainer import reference_states
from modlab.model.readout import Readout

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLES = [dict(prompt=f"Q{n}?", completion="yes and no "[: 3 + n % 8] * (1 + n % 3)) for n in range(12)]
CFG = HealConfig(min_train=8, r=4, epochs=2, lr=1e-2, batch_size=2)


def run(cfg=CFG, history=(), samples=SAMPLES, model=None, **kw):
    return heal(model or tiny_model()[0], tiny_model()[1], samples, cfg, history=history, **kw)


def numbers(adapter): return {name: p.detach().clone() for name, p in adapter.named_parameters()}


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.values(), b.values()))


def close(a, b): return all(torch.allclose(x, y, atol=2e-5, rtol=1e-3) for x, y in zip(a.values(), b.values()))


def rows(run, split): return run.log[run.log.split == split]


def nll_by_hand(model, tok, samples):
    "The mean over samples of the mean over tokens, from the logits of all positions."
    parts = []
    for s in samples:
        ids, n = encode(tok, s["prompt"], s["completion"])
        parts.append(cross_entropy(logits(model, torch.tensor([ids]))[0, n - 1:-1], torch.tensor(ids[n:])).item())
    return sum(parts) / len(parts)


def test_defaults_are_those_of_the_specification():
    assert asdict(HealConfig()) == dict(
        r=32, alpha=64.0, layer_range=(0.2, 0.8), targets=("all-linear",), exclude=("vision_tower", "lm_head"), epochs=6, lr=None,
        betas=(0.9, 0.95), warmup_ratio=0.1, weight_decay=0.0, grad_clip=1.0, lam=1.0, tau=0.5, reg="kl_rev", kl_agg="mean",
        barrier_ref="base", val_frac=1 / 8, min_train=20, batch_size=1, grad_accum=1, max_len=1024, seed=42, log_every=None,
        keep="last", patience=None)


@pytest.mark.parametrize("reg, agg", [("kl_rev", "mean"), ("kl_rev", "p95"), ("kl_fwd", "rmse"), ("kl_fwd", "max")])
def test_losses_are_what_full_logits_give(tiny, reg, agg):
    model, tok = tiny
    cfg, a = replace(CFG, reg=reg, kl_agg=agg, tau=0.05, lam=3.0), adapter_of("lora", model)
    encoded = encode_samples(tok, SAMPLES[:5], replace(cfg, min_train=1))
    readout = Readout(model, collate(encoded), [a])
    reference = reference_states(readout, encoded, 0, size=2)
    with a(model, 1.0), torch.no_grad(): found = Losses(readout, encoded, reference, cfg, 0)([3, 0, 4])
    for k, n in enumerate((3, 0, 4)):
        ids, border = torch.tensor([encoded[n][0]]), encoded[n][1]
        with a(model, 1.0): y = logits(model, ids)[0, border - 1:-1]
        kl = aggregate(dict(kl_rev=kl_rev, kl_fwd=kl_fwd)[reg](y, logits(model, ids)[0, border - 1:-1]), agg).item()
        nll = cross_entropy(y, ids[0, border:]).item()
        assert kl > 0.05 and found["kl"][k].item() == pytest.approx(kl, rel=1e-3)
        assert found["loss"][k].item() == pytest.approx(nll + 3 * (kl - 0.05), rel=1e-3)


def test_the_log_and_what_was_learned(tiny):
    model, tok = tiny
    before, rng = state(model), torch.get_rng_state()
    done = run(replace(CFG, epochs=4, log_every=4), model=model)
    train, val = rows(done, "train"), rows(done, "val")
    assert list(done.log)[:8] == ["step", "epoch", "split", "nll", "kl", "barrier", "loss", "lr"]
    assert train.step.tolist() == list(range(1, 25)) and train.epoch.tolist() == [n // 6 for n in range(24)]
    assert val.epoch.tolist() == [-1, 0, 1, 2, 3] and val.step.tolist() == [0, 6, 12, 18, 24]
    assert train.nll[-4:].mean() < 0.8 * train.nll[:4].mean() and val.kl.iloc[0] < 1e-6 < val.kl.iloc[-1]
    assert train.lr.iloc[0] == 0 and train.lr.max() == CFG.lr and train.lr.iloc[-1] < CFG.lr / 50
    assert train[train.grad_nll.notna()].step.tolist() == [1, 5, 9, 13, 17, 21]
    last = train[train.grad_nll.notna()].iloc[-1]
    assert last.grad_ratio == last.grad_barrier / last.grad_nll and (train.loss - train.nll - train.barrier).abs().max() < 1e-6
    held_out = [SAMPLES[n] for n in settings.split(len(SAMPLES), CFG)[1]]
    assert val.nll.iloc[0] == pytest.approx(nll_by_hand(model, tok, held_out), rel=1e-4)
    with done.adapter(model, 1.0): assert val.nll.iloc[-1] == pytest.approx(nll_by_hand(model, tok, held_out), rel=1e-4)
    assert torch.equal(torch.get_rng_state(), rng) and [c for c in changes(before, model) if not c.startswith("trains")] == []
    assert not done.adapter.attached and "24 steps in 4 epochs" in repr(done)


def test_the_barrier_holds_and_tau_is_the_room_it_leaves():
    cfg = replace(CFG, epochs=8)
    ends = {}
    for tau, lam in ((0.05, 20.0), (0.3, 20.0), (0.3, 0.2), (0.3, 0.0)):
        log = rows(run(replace(cfg, tau=tau, lam=lam)), "train")
        ends[tau, lam] = log.kl[-6:].mean()
    assert ends[0.05, 20.0] < 0.1 < 0.2 < ends[0.3, 20.0] < 0.4 < ends[0.3, 0.2] < ends[0.3, 0.0], ends
    assert (log.loss == log.nll).all() and log.barrier.max() > 0.1, "the last one's barrier costs nothing"
    measured = log[log.grad_nll.notna()]
    assert len(measured) > 10 and (measured.grad_ratio == 0).all() and (measured.grad_nll > 0).all(), "and is inert"


def test_kinds_of_regularisation():
    plain, free = run(replace(CFG, reg="nll")), run(replace(CFG, lam=0.0))
    assert same(numbers(plain.adapter), numbers(free.adapter)), "a divergence that is measured and costs nothing changes nothing"
    assert plain.log.kl.isna().all() and plain.log.barrier.isna().all() and (plain.log.loss == plain.log.nll).all()
    assert free.log.kl.notna().all()
    decay, weight = run(replace(CFG, reg="wd", lam=5.0)), run(replace(CFG, reg="nll", weight_decay=5.0))
    size = lambda r: sum(A.norm().item() for A in r.adapter.A.values())
    assert same(numbers(decay.adapter), numbers(weight.adapter)) and size(decay) < 0.9 * size(plain) and decay.log.kl.isna().all()


def test_few_samples_are_all_trained_on():
    few = run(replace(CFG, min_train=1), samples=SAMPLES[:7])
    assert rows(few, "val").empty and len(rows(few, "train")) == 8
    assert len(rows(run(replace(CFG, val_frac=0.5)), "train")) == 6


@pytest.mark.parametrize("kind", ["lora", "pissa-unextracted", "pissa-extracted"])
def test_on_top_of_a_history(tiny, kind):
    model, tok = tiny
    history = [(adapter_of(kind, model), 0.4), (adapter_of("lora", model, seed=5), -0.2)]
    before, bake = state(model), PiSSAHistoryBake if kind.endswith("-extracted") else HistoryBake
    held_out = [SAMPLES[n] for n in settings.split(len(SAMPLES), CFG)[1]]
    prev = run(replace(CFG, barrier_ref="prev"), history, model=model)
    assert not changes(before, model)
    with bake(model, history): assert prev.log.nll.iloc[0] == pytest.approx(nll_by_hand(model, tok, held_out), rel=1e-4)
    with bake(model, history), prev.adapter(model, 1.0):
        assert rows(prev, "val").nll.iloc[-1] == pytest.approx(nll_by_hand(model, tok, held_out), rel=1e-4)
    assert prev.log.kl.iloc[0] < 1e-6
    if bake is PiSSAHistoryBake:
        with pytest.raises(ValueError, match="barrier_ref='prev'"): run(CFG, history, model=model)
        with pytest.raises(RuntimeError, match="not in the history"): run(CFG, history[1:], model=model)
        assert run(replace(CFG, reg="nll", epochs=1), history, model=model).log.nll.iloc[0] == prev.log.nll.iloc[0]
    else:
        base = run(CFG, history, model=model)
        assert base.log.kl.iloc[0] > 1e-3 and base.log.nll.iloc[0] == prev.log.nll.iloc[0]
    assert not changes(before, model)


def test_a_history_on_the_head_does_not_reach_the_kept_reference(tiny):
    model, tok = tiny
    head = adapter_of("lora", model, targets="lm_head", exclude=())
    first = run(CFG, [(head, 1.0)], model=model).log.iloc[0]
    kl = []
    for s in (SAMPLES[n] for n in settings.split(len(SAMPLES), CFG)[1]):
        ids, n = encode(tok, s["prompt"], s["completion"])
        with head(model, 1.0): y = logits(model, torch.tensor([ids]))[0, n - 1:-1]
        kl.append(kl_rev(y, logits(model, torch.tensor([ids]))[0, n - 1:-1]).mean().item())
    assert first.kl == pytest.approx(sum(kl) / len(kl), rel=1e-3) and first.kl > 1e-3


def test_a_batch_may_be_cut_in_any_way():
    cfg = replace(CFG, lam=5.0, tau=0.0)
    whole = run(replace(cfg, batch_size=4))
    for size, accum in ((2, 2), (1, 4)):
        cut = run(replace(cfg, batch_size=size, grad_accum=accum))
        assert close(numbers(whole.adapter), numbers(cut.adapter)) and (whole.log.loss - cut.log.loss).abs().max() < 1e-4
    assert not close(numbers(whole.adapter), numbers(run(replace(cfg, batch_size=2)).adapter)), "another effective batch"


KILLED = dict(epochs=8, batch_size=1)  # 88 steps
SCRIPT = """
import pathlib, sys, torch
torch.set_num_threads(1)
sys.path[:0] = {paths!r}
import modlab.learn.loop
modlab.learn.loop._SAVE_EVERY = 0.0
from test_heal import CFG, SAMPLES, replace, run
folder, cfg = pathlib.Path({folder!r}), replace(CFG, **{changes!r})
done = run(cfg, resume=folder / "run.pt")
"""
TWO = SCRIPT + """
rank = modlab.learn.batch.processes(torch.device("cpu"))[0]
if rank == 0:
    done.adapter.save(folder / "a.safetensors")
    done.log.to_pickle(folder / "log")
try: run(cfg, resume=folder / ("run.pt" if rank == 0 else "elsewhere.pt"))
except OSError as e: (folder / f"refused{{rank}}").write_text(str(e))
try: run(cfg, resume=folder / "nowhere" / "run.pt" if rank == 0 else folder / "run.pt")
except OSError as e: (folder / f"missing{{rank}}").write_text(str(e))
torch.distributed.destroy_process_group()
"""


def script(folder, text, **changed):
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    (folder / "train.py").write_text(text.format(paths=paths, changes=changed, folder=str(folder)))
    return str(folder / "train.py")


def test_two_processes_take_the_same_steps_as_one(tmp_path):
    cfg = dict(lam=5.0, tau=0.0, epochs=2)  # an odd batch at the end of an epoch: 11 samples
    env = os.environ | dict(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    subprocess.run([*launch, "--master-port", str(20000 + os.getpid() % 20000), script(tmp_path, TWO, batch_size=1, **cfg)],
                   env=env, check=True, capture_output=True, timeout=120)
    one, model = run(replace(CFG, batch_size=2, **cfg)), tiny_model()[0]
    assert close(numbers(one.adapter), numbers(ModulatedLoRA.from_checkpoint(model, tmp_path / "a.safetensors")))
    log = pd.read_pickle(tmp_path / "log")
    assert log[["step", "epoch", "split"]].equals(one.log[["step", "epoch", "split"]]) and list(log) == list(one.log)
    numeric = log.columns.drop("split")
    assert log[numeric].notna().equals(one.log[numeric].notna()) and (log[numeric] - one.log[numeric]).abs().max().max() < 2e-3
    with pytest.raises(ValueError, match="processes is 2 there and 1 here"):
        run(replace(CFG, batch_size=1, **cfg), resume=tmp_path / "run.pt")
    for rank in (0, 1):
        assert "not all processes find the same file" in (tmp_path / f"refused{rank}").read_text()
        assert "nowhere does not exist" in (tmp_path / f"missing{rank}").read_text(), "what the first cannot write, all are told"


def test_killed_and_resumed_is_bit_identical(tmp_path):
    file = tmp_path / "run.pt"
    child = subprocess.Popen([sys.executable, script(tmp_path, SCRIPT, **KILLED)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not file.exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(random.SystemRandom().uniform(0, 0.5))  # anywhere: in a forward, in a step, in the middle of a write
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and 1 <= torch.load(file)["step"] < 88
    resumed, whole = (run(replace(CFG, **KILLED), resume=f) for f in (file, None))
    assert same(numbers(resumed.adapter), numbers(whole.adapter)) and resumed.log.equals(whole.log)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.pt", "train.py"], "a half-written file is written over"


@pytest.mark.parametrize("at", [1, 6, 7, 9])  # the first step, an epoch's last, its validation, the middle of the next
def test_broken_off_anywhere_and_resumed(tmp_path, monkeypatch, tiny, at):
    monkeypatch.setattr(training, "_SAVE_EVERY", 0.0)
    calls, call, before = [], Losses.__call__, state(tiny[0])
    def breaks(self, indices):
        calls.append(indices)
        if len(calls) == at + 1: raise KeyboardInterrupt
        return call(self, indices)
    monkeypatch.setattr(Losses, "__call__", breaks)
    with pytest.raises(KeyboardInterrupt): run(model=tiny[0], resume=tmp_path / "run.pt")
    assert [c for c in changes(before, tiny[0]) if not c.startswith("trains")] == []
    resumed, whole = run(resume=tmp_path / "run.pt"), run()
    assert same(numbers(resumed.adapter), numbers(whole.adapter)) and resumed.log.equals(whole.log)
    calls.clear()
    assert run(resume=tmp_path / "run.pt").log.equals(whole.log) and not calls, "a finished run has nothing left to do"


def test_the_file_of_another_run_is_refused(tmp_path):
    file = tmp_path / "run.pt"
    run(replace(CFG, epochs=1), resume=file)
    other = [dict(SAMPLES[0], completion="something else"), *SAMPLES[1:]]
    model = tiny_model()[0]
    for what, go in {"tau is 0.5 there and 0.7 here": lambda: run(replace(CFG, epochs=1, tau=0.7), resume=file),
                     "samples is": lambda: run(replace(CFG, epochs=1), samples=other, resume=file),
                     "base is": lambda: run(replace(CFG, epochs=1), model=tiny_model(seed=1)[0], resume=file),
                     "history is": lambda: run(replace(CFG, epochs=1), [(adapter_of("lora", model), 1.0)], model=model,
                                               resume=file)}.items():
        with pytest.raises(ValueError, match=f"another run's file: {what}"): go()
    few, kept = replace(CFG, epochs=1), ModulatedLoRA(model, r=4, alpha=8.0, generator=seeded(1))
    run(few, [(kept, 0.5)], model=model, resume=tmp_path / "kept.pt")
    stronger = ModulatedLoRA(model, r=4, alpha=9.0, generator=seeded(1))  # the same tables
    for history in ([(kept, 0.6)], [(stronger, 0.5)], [(kept, 0.5), (kept, 0.0)], ()):
        with pytest.raises(ValueError, match="history is"): run(few, history, model=model, resume=tmp_path / "kept.pt")
    for content in (b"", b"not a file of a run", file.read_bytes()[:5000]):
        file.write_bytes(content)
        with pytest.raises(OSError, match="run.pt: not the file of a training run"): run(replace(CFG, epochs=1), resume=file)
    with pytest.raises(OSError, match="does not exist"): run(resume=tmp_path / "nowhere" / "run.pt")


def test_a_loss_that_is_no_number_stops_with_the_last_good_state(monkeypatch, tiny, tmp_path):
    call, before, training_idx = Losses.__call__, state(tiny[0]), settings.split(len(SAMPLES), CFG)[0]
    bad = settings.epoch_order(training_idx, CFG, 1)[5]  # in the third step of the second epoch
    def spoilt(self, indices):
        found = call(self, indices)
        again = torch.is_grad_enabled() and spoilt.seen.count(bad) == 1
        spoilt.seen += indices if torch.is_grad_enabled() else []
        return found | dict(loss=found["loss"] * torch.tensor([math.nan if again and n == bad else 1 for n in indices]))
    spoilt.seen = []
    monkeypatch.setattr(Losses, "__call__", spoilt)
    with pytest.raises(NonFiniteLoss, match=rf"step 9 \(epoch 1\) for samples \[{bad}\]") as e:
        run(model=tiny[0], resume=tmp_path / "r")
    assert (e.value.step, e.value.epoch, e.value.samples) == (9, 1, [bad]) and not e.value.adapter.attached
    assert e.value.log.step.max() == 8 and list(e.value.log) == list(run().log)
    assert all(torch.equal(p, torch.load(tmp_path / "r")["adapter"][n]) for n, p in e.value.adapter.named_parameters())
    assert all(p.isfinite().all() for p in e.value.adapter.parameters()) and torch.load(tmp_path / "r")["step"] == 8
    assert [c for c in changes(before, tiny[0]) if not c.startswith("trains")] == []


def test_a_held_out_loss_that_is_no_number_is_named(monkeypatch, tiny):
    call, held_out, before = Losses.__call__, settings.split(len(SAMPLES), replace(CFG, val_frac=0.5))[1], state(tiny[0])
    def spoilt(self, indices): return {k: v * torch.tensor([math.nan if n == held_out[2] else 1 for n in indices])
                                       for k, v in call(self, indices).items()}
    monkeypatch.setattr(Losses, "__call__", spoilt)
    with pytest.raises(NonFiniteLoss, match=rf"validation loss .* step 0 \(epoch -1\) for samples \[{held_out[2]}\]") as e:
        run(replace(CFG, val_frac=0.5), model=tiny[0])
    assert e.value.log.empty and "grad_ratio" in e.value.log
    assert [c for c in changes(before, tiny[0]) if not c.startswith("trains")] == []


def test_numbers_from_numpy_and_lists_can_be_resumed(tmp_path):
    exact = dict(epochs=1, lr=1e-2, lam=2.0, betas=(0.9, 0.95), layer_range=(0.0, 1.0), targets=("q_proj",))
    loose = dict(epochs=1, lr=np.float64(1e-2), lam=np.float64(2), betas=tuple(np.array([0.9, 0.95])),
                 layer_range=tuple(np.array([0.0, 1.0])), targets=["q_proj"])
    first = run(replace(CFG, **loose), resume=tmp_path / "run.pt")
    for given in (loose, exact): assert run(replace(CFG, **given), resume=tmp_path / "run.pt").log.equals(first.log)
    assert same(numbers(first.adapter), numbers(run(replace(CFG, **exact)).adapter))


@pytest.mark.parametrize("changed", [dict(grad_accum=100), dict(batch_size=100), dict(warmup_ratio=0.9, batch_size=6)])
def test_however_few_steps_there_are_one_of_them_counts(changed):
    done = run(replace(CFG, epochs=1, **changed))
    train = rows(done, "train")
    assert len(train) == (2 if "warmup_ratio" in changed else 1) and train.lr.iloc[-1] > 0
    assert sum(B.abs().sum() for B in done.adapter.B.values()) > 0 and len(rows(done, "val")) == 2


def test_a_batch_that_is_not_full_counts_as_what_it_is():
    full, open_ended = (run(replace(CFG, epochs=1, batch_size=size)).log for size in (11, 100))
    assert open_ended.equals(full) and full.grad_norm.notna().any()


def test_equal_samples_are_samples_of_their_own():
    done = run(replace(CFG, epochs=2), samples=SAMPLES[3:4] * 9)
    assert len(rows(done, "train")) == 2 * 4 and done.log.nll.iloc[0] == pytest.approx(done.log.nll.iloc[1], rel=1e-5)
    one = run(replace(CFG, min_train=1), samples=SAMPLES[3:4])
    assert len(one.log) == 2 and one.log.nll.iloc[0] == pytest.approx(done.log.nll.iloc[0], rel=1e-5)


def test_the_bar_says_what_the_barrier_costs():
    assert postfix(dict(nll=1.0, kl=2.0, barrier=1.5, loss=4.0)) == dict(nll="1.000", kl="2.000", barrier="75%")
    assert postfix(dict(nll=0.0, kl=0.0, barrier=0.0, loss=0.0))["barrier"] == "0%"
    assert postfix(dict(nll=1.0)) == dict(nll="1.000")


@pytest.mark.parametrize("sample, match", [
    (dict(prompt="Q", completion=""), "sample 12: no token of the completion is left"),
    (dict(prompt="Q" * 90, completion="yes"), "sample 12: .*the prompt fills max_len=64"),
    (dict(prompt="Q", completion=None), "sample 12: completion is None"),
    (dict(prompt=7, completion="yes"), "sample 12: prompt is 7"),
    (dict(prompt="Q", cho="yes", rej="no"), "record 12 has the keys"),
    (dict(prompt=[dict(role="user", content="Q")], completion="yes"), "sample 12: .*has no chat template")])
def test_bad_samples_are_named_before_anything_is_built(tiny, sample, match):
    model, tok = tiny
    tok.chat_template, before, rng = None, state(model), torch.get_rng_state()
    with pytest.raises(ValueError, match=match): heal(model, tok, [*SAMPLES, sample], replace(CFG, max_len=64))
    with pytest.raises(ValueError, match="12 samples are fewer than min_train=13"): run(replace(CFG, min_train=13), model=model)
    pairs = [dict(prompt="Q", cho="a", rej="b")] * 20
    with pytest.raises(ValueError, match="sample 0 is a pair"): run(samples=pairs, model=model)
    assert not changes(before, model) and torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("field, value, match", [
    ("reg", "l2", "nll, kl_rev, kl_fwd, wd"), ("kl_agg", "median", "mean, rmse, p95, max"), ("barrier_ref", "next", "base, prev"),
    ("tau", -0.1, "at least 0"), ("lam", math.nan, "finite"), ("lr", 0.0, "lr must be positive"), ("epochs", 0, "at least 1"),
    ("val_frac", 1.0, "val_frac must be in"), ("betas", (0.9, 1.0), "betas"), ("r", 0, "rank"), ("min_train", 0, "at least 1")])
def test_settings_check_themselves(field, value, match):
    with pytest.raises(ValueError, match=match): HealConfig(**{field: value})


def test_dropout_is_off_and_the_mode_is_kept(tiny_tok):
    model = build("gpt2").train()
    model.resize_token_embeddings(len(tiny_tok), mean_resizing=False)
    model.transformer.h[1].eval()
    modes, rng = {n: m.training for n, m in model.named_modules()}, torch.get_rng_state()
    done = heal(model, tiny_tok, SAMPLES, replace(CFG, max_len=64, layer_range=(0.0, 1.0)))
    assert done.log.kl.iloc[0] < 1e-6 and modes == {n: m.training for n, m in model.named_modules()}
    assert torch.equal(torch.get_rng_state(), rng) and {True, False} == set(modes.values())


def test_other_dtypes_and_no_pad_token(tiny):
    model, tok = tiny
    tok.pad_token = None
    with torch.no_grad(): done = heal(model.to(torch.bfloat16), tok, SAMPLES, replace(CFG, epochs=4, batch_size=3))
    assert rows(done, "train").nll.iloc[-1] < rows(done, "train").nll.iloc[0] and done.log.kl.iloc[0] < 0.01
    assert all(p.dtype == torch.float32 for p in done.adapter.parameters()) and all(B.any() for B in done.adapter.B.values())
