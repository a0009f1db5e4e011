"""The whole path, model -> captured activations -> chosen directions, against a plain computation in NumPy float64."""
import numpy as np
import pytest
import torch
from models import build

from modlab import ModulatedPiSSA, capture_activations
from modlab.model.loading import _byte_tokenizer
from modlab.model.targets import find_targets

RANK = 8
PAIRS = [dict(prompt=f"{q}? ", cho=a, rej=b) for q, a, b in (
    ("How is the sea", "Arr, it be wild and salty, matey!", "It is calm today, Sir; quite calm."),
    ("Tea", "Grog, ye lubber!", "Earl Grey, if I may suggest."),
    ("Where to", "To the ends of the earth!", "To the drawing room."),
    ("Who goes there", "A pirate, arr.", "Your butler, Madam, with the post."))]
MODES = {"s_only": lambda S, cho, rej: S, "wanda": lambda S, cho, rej: S * np.abs(np.concatenate([cho, rej])).mean(0),
         "act_only": lambda S, cho, rej: np.abs(np.concatenate([cho, rej])).mean(0),
         "cho_rej_min_std": lambda S, cho, rej: np.minimum(cho.std(0, ddof=1), rej.std(0, ddof=1))}


@pytest.fixture(scope="module")
def setting():
    "A model, its activations from modlab, and the same read off by hand: one record at a time, no padding, no batch."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, tok = build(), _byte_tokenizer()
    by_hand = {name: {"cho": [], "rej": []} for name in find_targets(model)}
    for side in ("cho", "rej"):
        for record in PAIRS:
            prompt, answer = tok(record["prompt"]).input_ids, tok(record[side], add_special_tokens=False).input_ids
            seen, handles = {}, []
            for name, layer in find_targets(model).items():
                def note(m, args, name=name, seen=seen): seen[name] = args[0]
                handles.append(layer.register_forward_pre_hook(note))
            with torch.no_grad(): model(input_ids=torch.tensor([prompt + answer]))
            for h in handles: h.remove()
            for name, x in seen.items(): by_hand[name][side].append(x[0, len(prompt):].double().numpy())
    by_hand = {n: {s: np.concatenate(x) for s, x in of.items()} for n, of in by_hand.items()}
    weights = {n: layer.weight.detach().double().numpy() for n, layer in find_targets(model).items()}
    svds = {n: np.linalg.svd(W, full_matrices=False) for n, W in weights.items()}
    yield model, capture_activations(model, tok, PAIRS), by_hand, svds
    torch.set_num_threads(threads)


def test_captured_activations(setting):
    _, X, by_hand, _ = setting
    assert X.keys() == by_hand.keys()
    for name, of in by_hand.items():
        for side, x in of.items():
            assert X[name][side].dtype == torch.float32 and X[name][side].shape == x.shape
            assert np.abs(X[name][side].numpy() - x).max() < 1e-5 * np.abs(x).max(), "float32, in another batch"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("extract", [True, False])
def test_chosen_directions(setting, mode, extract):
    model, X, by_hand, svds = setting
    a = ModulatedPiSSA(model, r=RANK, selection_score=mode, calibration_activations=X, extract=extract)
    if extract: a.restore_base_W()
    for name, (U, S, Vh) in svds.items():
        score = MODES[mode](S, by_hand[name]["cho"] @ Vh.T, by_hand[name]["rej"] @ Vh.T)
        order = np.argsort(-score, kind="stable")
        margin = (score[order[RANK - 1]] - score[order[RANK]]) / score[order[0]]
        assert margin > 1e-5, "the last chosen and the first left out are too close for float32 to tell; take another seed"
        chosen = np.sort(order[:RANK])
        assert a.chosen_idx[name].tolist() == chosen.tolist(), name
        for ours, theirs in ((a.Vh[name].double().numpy(), Vh[chosen]), (a.U[name].double().numpy().T, U.T[chosen])):
            apart = (ours.T @ ours) - (theirs.T @ theirs)  # projectors: the sign of a direction is arbitrary
            assert np.abs(apart).max() < 1e-3, "float32 vectors of values that lie as close as 1e-3 of the largest"
        assert np.abs(a.S[name].double().numpy() - S[chosen]).max() < 1e-6 * S[0]
