"""Files of rounds: they load in the order in which they were made, each once."""
import copy

import pytest
import torch
from models import KINDS, adapter_of, build, changes, logits, state, tokens

from modlab import load_adapter

pytestmark = pytest.mark.usefixtures("one_thread")


def saved_rounds(tmp_path, n=3):
    model, paths = build(), [tmp_path / f"round{k}" for k in range(n)]
    adapters = [adapter_of("pissa-extracted", model, seed=k, r=4) for k in range(n)]
    for a, path in zip(adapters, paths): a.save(path)  # all of them in force while saving
    return model, adapters, paths


def test_rounds_load_in_order_and_only_so(tmp_path):
    model, adapters, paths = saved_rounds(tmp_path)
    with adapters[0](model, 0.7), adapters[1](model, -1.0), adapters[2](model, 0.3): y = logits(model, tokens())
    other = build()
    for done in range(3):
        before = state(other)
        for wrong in (k for k in range(3) if k != done):
            with pytest.raises(RuntimeError, match=str(paths[wrong])): load_adapter(other, paths[wrong])
            with pytest.raises(RuntimeError, match="once" if wrong < done else "order"):
                load_adapter(other, paths[wrong], strict=False)
        assert not changes(before, other)
        if done == 2: break
        load_adapter(other, paths[done])
    loaded = [load_adapter(fresh, paths[0]) for fresh in [build()]]
    fresh = loaded[0].model
    loaded += [load_adapter(fresh, p) for p in paths[1:]]
    with loaded[0](fresh, 0.7), loaded[1](fresh, -1.0), loaded[2](fresh, 0.3): assert torch.equal(logits(fresh, tokens()), y)
    for a in reversed(loaded): a.restore_base_W()
    assert torch.equal(logits(fresh, tokens()), logits(build(), tokens()))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_made_on_an_extracted_model_needs_that_round(tmp_path, kind):
    model = build()
    first = adapter_of("pissa-extracted", model, r=4)
    second = adapter_of(kind, model, seed=7, r=4)
    first.save(tmp_path / "1"), second.save(tmp_path / "2")
    other = build()
    with pytest.raises(RuntimeError, match="order"): load_adapter(other, tmp_path / "2")
    a, b = load_adapter(other, tmp_path / "1"), load_adapter(other, tmp_path / "2")
    with first(model, 1.0), second(model, -1.0), a(other, 1.0), b(other, -1.0):
        assert torch.equal(logits(model, tokens()), logits(other, tokens()))


def test_an_unextracted_twin_does_not_extract_a_second_time(tmp_path):
    "Built alike, the two have one id; what is out of the weight is the other's all the same."
    model = build()
    twin, a = adapter_of("pissa-unextracted", model), adapter_of("pissa-extracted", model)
    a.save(tmp_path / "a")
    before = state(model)
    with pytest.raises(RuntimeError, match="once"): twin.load(tmp_path / "a")
    assert not changes(before, model)


def test_a_model_that_is_copied_takes_its_rounds_along(tmp_path):
    model = build()
    a = adapter_of("pissa-extracted", model)
    a.save(tmp_path / "a")
    with pytest.raises(RuntimeError, match="once"): load_adapter(copy.deepcopy(model), tmp_path / "a")


def test_strict_false_does_not_extract_twice_either(tmp_path):
    model = build()
    adapter_of("pissa-extracted", model).save(tmp_path / "a")
    before = state(model)
    with pytest.raises(RuntimeError, match="once"): load_adapter(model, tmp_path / "a", strict=False)
    assert not changes(before, model)
