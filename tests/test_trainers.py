"""What `heal` and `contrast` share: plain words for mistakes, rates, resuming, the best epoch, files, checkpointing."""
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import build, changes, seeded, state
from torch.utils.checkpoint import checkpoint

import modlab.learn.loop as loop
from modlab import (
    ContrastConfig,
    HealConfig,
    HistoryBake,
    ModulatedLoRA,
    ModulatedPiSSA,
    contrast,
    gradient_cosine,
    heal,
    tiny_model,
)
from modlab.learn.recompute import without_dropout
from modlab.learn.runfile import RunFile
from modlab.learn.settings import _RATES, _rate_of

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = [dict(prompt=f"{n}?", cho="a" * (3 + n % 4), rej="b" * (2 + n % 3)) for n in range(12)]
SAMPLES = [dict(prompt=p["prompt"], completion=p["cho"]) for p in PAIRS]
DRAW = random.Random(0)
NOISE = [dict(prompt=f"{n}?", **{side: "".join(DRAW.choices("abcdefgh", k=8)) for side in ("cho", "rej")}) for n in range(12)]
CFG = dict(heal=HealConfig(min_train=8, r=4, epochs=2, lr=1e-2, batch_size=4, val_frac=1 / 4),
           contrast=ContrastConfig(epochs=2, lr=1e-2, batch_size=4, val_frac=1 / 4))
BOTH = pytest.mark.parametrize("kind", ["heal", "contrast"])


def lora(model, **kwargs): return ModulatedLoRA(model, r=4, generator=seeded(0), **kwargs)


def pissa(model, **kwargs):
    return ModulatedPiSSA(model, r=8, selection_score="s_only", init=(0.0, 0.0), **{"extract": False} | kwargs)


def go(kind, make=lora, model=None, history=(), resume=None, pairs=PAIRS, **changed):
    "A run of one of the trainers on a fresh tiny model."
    model, tok = model or tiny_model()[0], tiny_model()[1]
    samples = [dict(prompt=p["prompt"], completion=p["cho"]) for p in pairs]
    trainer, records = (heal, samples) if kind == "heal" else (contrast, pairs)
    return trainer(model, tok, make(model), records, replace(CFG[kind], **changed), history=history, resume=resume)


def numbers(run): return {name: p.detach().clone() for name, p in run.adapter.named_parameters()}


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.values(), b.values()))


def rows(run, split): return run.log[run.log.split == split]


# ---- mistakes ----

A, B = HealConfig(min_train=8), ContrastConfig()


@pytest.mark.parametrize("f, match", [
    (lambda m, t, a: heal(m, t, SAMPLES, [(a, 1.0)], A), "history=.*heal"),
    (lambda m, t, a: heal(m, t, SAMPLES, ()), "history="),
    (lambda m, t, a: heal(m, t, SAMPLES, (), A), "history="),
    (lambda m, t, a: heal(m, t, a, SAMPLES, [(a, 1.0)]), "history="),
    (lambda m, t, a: contrast(m, t, a, PAIRS, [(a, 1.0)]), "history="),
    (lambda m, t, a: contrast(m, t, a, PAIRS, B, [(a, 1.0)]), "history="),
    (lambda m, t, a: heal(m, t, a, SAMPLES, A, [(a, 1.0)]), "history="),
    (lambda m, t, a: heal(m, t, SAMPLES, history=A), "history .* HealConfig.*cfg="),
    (lambda m, t, a: heal(m, t, SAMPLES, A, history=a), "history is a list"),
    (lambda m, t, a: contrast(m, t, a, PAIRS, B, history=B), "history .* ContrastConfig.*cfg="),
    (lambda m, t, a: heal(m, t, SAMPLES, dict(lr=1e-3)), r"cfg is a dict.*HealConfig\(\*\*"),
    (lambda m, t, a: heal(m, t, a, SAMPLES, dict(lr=1e-3)), r"cfg is a dict.*HealConfig\(\*\*"),
    (lambda m, t, a: contrast(m, t, a, PAIRS, dict(lr=1e-3)), r"cfg is a dict.*ContrastConfig\(\*\*"),
    (lambda m, t, a: contrast(m, t, a, PAIRS, A), "HealConfig.*ContrastConfig"),
    (lambda m, t, a: heal(m, t, SAMPLES, HealConfig), r"the class HealConfig itself; make it HealConfig\(\)"),
    (lambda m, t, a: heal(m, t, SAMPLES, A, history=[()]), r"history\[0\]"),
    (lambda m, t, a: heal(m, t, SAMPLES, cfg=B), "ContrastConfig.*HealConfig"),
    (lambda m, t, a: contrast(m, t, PAIRS, B), "list in the place of the adapter.*contrast\\(model, tok, adapter, pairs"),
    (lambda m, t, a: contrast(m, t, PAIRS, a, B), "in the place of the adapter"),
    (lambda m, t, a: contrast(m, t, a, B), "ContrastConfig in the place of the pairs"),
    (lambda m, t, a: heal(m, t, SAMPLES, a, A), "ModulatedLoRA in the place of cfg|in the place of the samples"),
    (lambda m, t, a: heal(m, t, A), "HealConfig in the place of the samples"),
    (lambda m, t, a: heal(m, t, A, SAMPLES), "HealConfig in the place of the samples"),
    (lambda m, t, a: heal(m, t, a), "no samples"),
    (lambda m, t, a: heal(m, t, a, A), "HealConfig in the place of the samples"),
    (lambda m, t, a: heal(m, t), "no samples"),
    (lambda m, t, a: contrast(m, t, a), "no pairs"),
    (lambda m, t, a: contrast(m, t, a, "pairs.jsonl"), "str in the place of the pairs"),
    (lambda m, t, a: heal(m, t, PAIRS, A), "sample 0 is a pair"),
    (lambda m, t, a: contrast(m, t, a, SAMPLES, B), "expected pairs"),
    (lambda m, t, a: gradient_cosine(m, t, PAIRS, a), "list in the place of the adapter.*gradient_cosine"),
    (lambda m, t, a: heal(m, t, build(), SAMPLES, A), "LlamaForCausalLM in the place of the adapter"),
])
def test_a_mistake_is_told_in_plain_words(tiny, f, match):
    model, tok = tiny
    a, before = lora(model), state(model)
    with pytest.raises(ValueError, match=match): f(model, tok, a)
    assert not changes(before, model) and not a.attached


def test_heal_takes_an_adapter_or_makes_one(tiny):
    model, tok = tiny
    cfg = replace(CFG["heal"], layer_range=(0.0, 1.0), alpha=8.0)
    mine = ModulatedLoRA(model, r=4, alpha=8.0, generator=seeded(cfg.seed))
    given, made = heal(model, tok, mine, SAMPLES, cfg), heal(model, tok, SAMPLES, cfg)
    named = heal(model, tok, samples=SAMPLES, cfg=cfg)
    assert given.adapter is mine and made.adapter is not mine and given.log.equals(made.log)
    assert same(numbers(given), numbers(made)) and same(numbers(named), numbers(made))
    other = heal(model, tok, lora(model, alpha=8.0), samples=SAMPLES, cfg=cfg)
    assert not same(numbers(given), numbers(other)), "drawn with another seed"


@pytest.mark.parametrize("extract", [False, True])
def test_heal_trains_a_pissa_too(tiny, extract):
    model, tok = tiny
    a = pissa(model, extract=extract)
    before = state(model)
    run = heal(model, tok, a, SAMPLES, replace(CFG["heal"], lr=None, epochs=4))
    assert run.log.kl.iloc[0] < 1e-6 < rows(run, "val").kl.iloc[-1] and rows(run, "val").nll.iloc[-1] < run.log.nll.iloc[0] - 0.1
    assert not changes(before, model) and not a.attached


# ---- rates ----

@BOTH
def test_a_rate_that_is_not_given_is_that_of_the_kind(kind):
    for make, name in ((lora, "lora"), (pissa, "pissa")):
        run = go(kind, make, lr=None, epochs=1)
        assert run.cfg.lr == _RATES[name][kind] and rows(run, "train").lr.max() == pytest.approx(run.cfg.lr)
        assert f"lr {run.cfg.lr:g}" in repr(run)
    assert _RATES == dict(lora=dict(heal=1e-4, contrast=2e-4), pissa=dict(heal=0.1, contrast=0.1))
    assert go(kind, lr=0.03, epochs=1).cfg.lr == 0.03


def test_a_new_kind_states_its_own_rate_and_without_one_it_is_asked_for(monkeypatch):
    class Other(ModulatedLoRA): kind = "other"
    class Stranger: kind = "stranger"
    model = tiny_model()[0]
    assert _rate_of(Other(model, r=2), "heal") == 1e-4, "that of the kind it comes from"
    monkeypatch.setitem(_RATES, "other", dict(heal=0.5))
    assert _rate_of(Other(model, r=2), "heal") == 0.5
    with pytest.raises(ValueError, match="stranger.*lr="): _rate_of(Stranger(), "heal")
    with pytest.raises(ValueError, match="other.*lr="): _rate_of(Other(model, r=2), "contrast")


def test_the_default_rate_of_a_pissa_does_something():
    make = lambda model: ModulatedPiSSA(model, r=32, selection_score="s_only", init=(0.0, 0.0), extract=False)
    rise = lambda run: rows(run, "val").margin_plus.iloc[-1] - rows(run, "val").margin_plus.iloc[0]
    assert rise(go("contrast", make, lr=None, epochs=3)) > 2 > 0.05 > rise(go("contrast", make, lr=2e-4, epochs=3))


# ---- resuming, the best epoch, stopping early ----

def broken_off(kind, at, path, monkeypatch, **changed):
    "Start a run that is broken off at its `at`-th gradient, with a file written at every step."
    seen, plain = [], loop.gradients
    def breaks(*args):
        seen.append(args)
        if len(seen) == at: raise KeyboardInterrupt
        return plain(*args)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_SAVE_EVERY", 0.0)
        patch.setattr(loop, "gradients", breaks)
        with pytest.raises(KeyboardInterrupt): go(kind, resume=path, **changed)


BEST = {kind: dict(epochs=5, lr=lr, pairs=NOISE) for kind, lr in (("heal", 0.1), ("contrast", 0.03))}  # it soon learns by heart


@pytest.mark.parametrize("at", [2, 3, 4, 6])
@BOTH
def test_interrupted_and_resumed_is_the_same_run(kind, at, tmp_path, monkeypatch):
    how = dict(keep="best", patience=2, **BEST[kind])
    broken_off(kind, at, tmp_path / "run.pt", monkeypatch, **how)
    resumed, whole = go(kind, resume=tmp_path / "run.pt", **how), go(kind, **how)
    assert same(numbers(resumed), numbers(whole)) and resumed.log.equals(whole.log) and repr(resumed) == repr(whole)
    again = go(kind, resume=tmp_path / "run.pt", **how)
    assert same(numbers(again), numbers(whole)) and again.log.equals(whole.log) and os.listdir(tmp_path) == ["run.pt"]


def test_contrast_refuses_the_file_of_another_run(tmp_path):
    file = tmp_path / "run.pt"
    go("contrast", epochs=1, resume=file)
    model = tiny_model()[0]
    for what, other in {"C is 1.0 there and 2.0 here": dict(C=2.0), "adapter is": dict(make=lambda m: lora(m, alpha=9.0)),
                        "history is": dict(model=model, history=[(ModulatedLoRA(model, r=2), 1.0)])}.items():
        with pytest.raises(ValueError, match=f"another run's file: {what}"): go("contrast", epochs=1, resume=file, **other)
    with pytest.raises(ValueError, match="another run's file"): go("heal", epochs=1, resume=file)


def watched(kind, monkeypatch, **changed):
    "A run, and its parameters after each validation."
    kept, plain = [], loop._one_validation
    def remembers(run, epoch):
        plain(run, epoch)
        kept.append({name: p.detach().clone() for name, p in run.adapter.named_parameters()})
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_one_validation", remembers)
        return go(kind, **changed), kept


@BOTH
def test_the_best_epoch_is_kept(kind, monkeypatch):
    (last, by_epoch), (best, _) = (watched(kind, monkeypatch, keep=keep, **BEST[kind]) for keep in ("last", "best"))
    val = rows(best, "val")
    lowest = val.epoch[val.loss.idxmin()]
    assert best.log.equals(last.log) and -1 <= lowest < 4, "the run must overshoot for this test"
    assert same(numbers(last), by_epoch[-1]) and last.kept_epoch == 4
    assert same(numbers(best), by_epoch[lowest + 1]) and best.kept_epoch == lowest
    assert f"kept epoch {lowest}" in repr(best) and "kept" not in repr(last)


@BOTH
def test_patience_stops_early(kind):
    whole, early = go(kind, **BEST[kind]), go(kind, patience=1, **BEST[kind])
    loss = rows(whole, "val").loss.tolist()
    stop = next(n for n in range(1, len(loss)) if loss[n] >= min(loss[:n]))
    assert stop < len(loss) - 1 and early.log.equals(whole.log[whole.log.epoch < stop])
    assert f"{stop} of 5 epochs" in repr(early)


@BOTH
def test_without_validation_there_is_no_best_epoch(kind, tiny):
    before = state(tiny[0])
    for changed in (dict(keep="best"), dict(patience=1), dict(keep="best", val_frac=0.01)):
        with pytest.raises(ValueError, match="no validation samples.*val_frac"):
            go(kind, model=tiny[0], **{"val_frac": 0.0} | changed)
    assert [c for c in changes(before, tiny[0]) if not c.startswith("trains")] == []
    for field, value in dict(keep="worst", patience=0).items():
        with pytest.raises(ValueError, match=field): replace(CFG[kind], **{field: value})


# ---- on top of a history ----

def test_contrast_on_top_of_a_history(tiny):
    model, tok = tiny
    kept = lora(model)
    for p in kept.B.values(): p.data.normal_(std=0.1, generator=seeded(3))
    before, plain = state(model), go("contrast", model=model, epochs=1)
    on_top = go("contrast", model=model, epochs=1, history=[(kept, 0.7)])
    assert on_top.log.kl.iloc[0] < 1e-6 and abs(on_top.log.nll_cho.iloc[0] - plain.log.nll_cho.iloc[0]) > 1e-3
    assert not changes(before, model) and not kept.attached
    extracted = pissa(model, extract=True)
    with pytest.raises(RuntimeError, match="not in the history"): go("contrast", model=model, history=[(kept, 0.7)])
    assert go("contrast", model=model, epochs=1, history=[(extracted, 0.7)]).log.kl.iloc[0] < 1e-6
    both = [(kept, 1.0), (extracted, 1.0)]
    with pytest.raises(RuntimeError, match="count twice"): contrast(model, tok, kept, PAIRS, CFG["contrast"], history=both)
    extracted.restore_base_W()
    assert not changes(before, model)


# ---- what a run says ----

@BOTH
@pytest.mark.parametrize("changed", [{}, dict(val_frac=0.0), dict(keep="best")])
def test_the_headline_is_the_mean_of_an_epoch(kind, changed):
    run = go(kind, **changed)
    column = "nll" if kind == "heal" else "margin_plus"
    for split, of in run.log.groupby("split"):
        mean = of[of.epoch == run.kept_epoch][column].mean()
        assert f"{mean:.3f}" in repr(run).splitlines()[0], (split, repr(run))
    last = rows(run, "train")[column].iloc[-1]
    assert f"{last:.3f}" not in repr(run) and "nan" not in repr(run) and "<table" in run._repr_html_()


@BOTH
@pytest.mark.parametrize("val_frac", [0.25, 0.0])
def test_a_run_draws_its_curves(kind, val_frac):
    from matplotlib import pyplot as plt
    run, (_, ax) = go(kind, val_frac=val_frac), plt.subplots()
    assert run.plot(ax) is ax and run.plot() is not None
    drawn = [line.get_ydata() for line in ax.lines]
    column = lambda t: t.nll if kind == "heal" else (t.margin_plus - t.margin_minus) / 2
    assert any(len(y) == len(rows(run, "train")) and (y == column(rows(run, "train"))).all() for y in drawn)
    assert any(len(y) == len(rows(run, "val")) and (y == column(rows(run, "val"))).all() for y in drawn) == bool(val_frac)
    assert ("margin" if kind == "contrast" else "nll") in ax.get_ylabel().lower()
    plt.close("all")


# ---- a run is never lost because a file could not be written ----

@contextmanager
def small_files(size):
    "No file may grow beyond `size` bytes: a disk that is full."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def never_trained(monkeypatch):
    def gradients(*args): raise AssertionError("it trained")
    monkeypatch.setattr(loop, "gradients", gradients)


@BOTH
def test_a_path_that_cannot_be_written_is_told_before_training(kind, tmp_path, never_trained):
    for path in (tmp_path / "nowhere" / "run.pt", tmp_path, f"{tmp_path}/nowhere/run.pt"):
        with pytest.raises(OSError, match=str(path)): go(kind, resume=path)
    with small_files(60_000), pytest.raises(OSError, match=r"run\.pt.*(too large|space)"): go(kind, resume=tmp_path / "run.pt")
    assert not os.listdir(tmp_path), "nothing is left behind"


def test_a_folder_that_is_read_only_is_told():
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        if root: os.seteuid(65534)
        try:
            with pytest.raises(OSError, match=r"run\.pt.*[Pp]ermission denied"), RunFile(Path(folder) / "run.pt"): pass
        finally:
            if root: os.seteuid(0)


@BOTH
def test_a_second_run_on_the_same_path_is_refused(kind, tmp_path, never_trained):
    with RunFile(tmp_path / "run.pt"), pytest.raises(OSError, match=r"run\.pt: another run writes there"):
        go(kind, resume=tmp_path / "run.pt")
    code = "import sys\nfrom modlab.learn.runfile import RunFile\nwith RunFile(sys.argv[1]): print(flush=True), sys.stdin.read()"
    command = [sys.executable, "-c", code, tmp_path / "run.pt"]
    env = os.environ | dict(PYTHONPATH=str(Path(__file__).parent.parent))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as other:
        assert other.stdout.readline() == b"\n"
        with pytest.raises(OSError, match=r"run\.pt: another run writes there"): go(kind, resume=tmp_path / "run.pt")
        other.kill()
    with RunFile(tmp_path / "run.pt"): pass  # the lock of a killed run is no lock
    assert not os.listdir(tmp_path)


@BOTH
def test_a_later_failure_warns_and_training_goes_on(kind, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loop, "_SAVE_EVERY", 0.0)
    folder, calls, plain = tmp_path / "there", [], loop.gradients
    folder.mkdir()
    def watching(*args):
        calls.append(args)
        if len(calls) == 2: shutil.rmtree(folder)
        if len(calls) == 4: folder.mkdir()
        return plain(*args)
    monkeypatch.setattr(loop, "gradients", watching)
    run = go(kind, resume=folder / "run.pt")
    monkeypatch.undo()
    assert same(numbers(run), numbers(go(kind))) and caplog.text.count("could not be written") == 1 and "run.pt" in caplog.text
    assert same(numbers(run), torch.load(folder / "run.pt")["adapter"]), "and it is written again once that can be done"


@BOTH
def test_what_a_killed_write_left_is_overwritten(kind, tmp_path):
    (tmp_path / ".run.pt.part").write_bytes(b"half")
    go(kind, epochs=1, resume=tmp_path / "run.pt")
    assert os.listdir(tmp_path) == ["run.pt"]


# ---- checkpointing ----

def forwards(model, calls):
    "Count how often each block of the model runs."
    block = (model.model.layers if hasattr(model.model, "layers") else model.model.decoder.layers)[1]
    return block.self_attn.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))


def dropping(arch, tok):
    "A model that drops half of everything wherever it believes to train."
    if arch == "llama":
        model = tiny_model()[0]
        for block in model.model.layers: block.self_attn.attention_dropout = 0.5
        return model
    model = build(arch)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tok), mean_resizing=False)
    for block in model.model.decoder.layers: block.dropout = block.self_attn.dropout = 0.5
    return model


@pytest.mark.parametrize("arch", ["llama", "opt"])
@pytest.mark.parametrize("reentrant", [False, True])
@BOTH
def test_checkpointing_stays_on_and_changes_nothing(kind, reentrant, arch):
    runs, counts, tok = [], [], tiny_model()[1]
    for on in (False, True):
        model, calls = dropping(arch, tok).train(), []
        if on: model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        hook, functions = forwards(model, calls), [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
        runs.append(go(kind, model=model, max_len=64, epochs=1, log_every=1))
        hook.remove()
        counts.append(sum(calls))
        assert all(m.training for m in model.modules()) and model.is_gradient_checkpointing == on
        assert functions == [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    plain, checked = runs
    assert counts[1] >= 2 * counts[0] > 0, "every block of a step runs a second time"
    assert (plain.log.drop(columns="split") - checked.log.drop(columns="split")).abs().max().max() < 1e-6
    for name, p in numbers(plain).items(): torch.testing.assert_close(numbers(checked)[name], p, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@BOTH
def test_checkpointing_beside_a_history_in_force_trains_and_leaves_nothing(kind, reentrant):
    runs = []
    for on in (False, True):
        model = tiny_model()[0]
        if on: model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        functions, kept = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()], lora(model)
        for B in kept.B.values(): B.data.normal_(std=0.1, generator=seeded(1))
        with HistoryBake(model, [(kept, 1.0)]): runs.append(go(kind, model=model, max_len=64, epochs=1))
        assert functions == [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    plain, checked = map(numbers, runs)
    assert any(p.abs().max() > 0 for name, p in checked.items() if name.startswith("B."))
    for name, p in plain.items(): torch.testing.assert_close(checked[name], p, atol=1e-6, rtol=1e-5)


def test_gradients_under_checkpointing_are_those_without(tiny):
    model, tok = dropping("llama", tiny[1]), tiny[1]
    a, ids = lora(model), torch.tensor([tok("the quick brown fox").input_ids])
    for B in a.B.values(): B.data.normal_(std=0.1, generator=seeded(1))
    def gradient():
        with without_dropout(model), a(model, 0.7):
            return torch.autograd.grad(model(ids, labels=ids, use_cache=False).loss, list(a.parameters()))
    plain = gradient()
    model.gradient_checkpointing_enable()
    for g, h in zip(plain, gradient()): torch.testing.assert_close(g, h, atol=1e-6, rtol=0)
    model.train()
    with a(model, 0.7):
        loose = torch.autograd.grad(model(ids, labels=ids, use_cache=False).loss, list(a.parameters()))
    assert max((g - h).abs().max() for g, h in zip(plain, loose)) > 1e-3, "the dropout would be seen"


def test_checkpointing_of_the_older_kind(tiny):
    "A model that asks in its own forward, as those that come with their weights do."
    class Old(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.gradient_checkpointing, self.calls = torch.nn.Linear(4, 4), True, 0
            self._gradient_checkpointing_func = checkpoint
        def block(self, x):
            self.calls += 1
            return torch.nn.functional.dropout(self.layer(x).tanh(), 0.5, self.layer.training)
        def forward(self, x):
            if self.gradient_checkpointing and self.training: return self._gradient_checkpointing_func(self.block, x)
            return self.block(x)
    model, x = Old().eval(), torch.ones(1, 4)
    with without_dropout(model): (g,) = torch.autograd.grad(model(x).sum(), [model.layer.weight])
    assert model.calls == 2 and not model.training and model._gradient_checkpointing_func is checkpoint
    model.gradient_checkpointing = False
    torch.testing.assert_close(g, torch.autograd.grad(model(x).sum(), [model.layer.weight])[0])


@pytest.mark.parametrize("kind, label", [("heal", "NLL (nats per token)"), ("contrast", "margin (nats per token)")])
def test_a_run_draws_itself_with_a_legend(kind, label):
    ax = go(kind, epochs=1).plot()
    assert ax.get_ylabel() == label and {"validation"} < {t.get_text() for t in ax.get_legend().get_texts()}
