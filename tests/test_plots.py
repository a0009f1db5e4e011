"""Plots as tables of lines: what stands in the legend is what was drawn."""
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from modlab import plot_nll


def run_log(steps: int, epochs: int = 0) -> pd.DataFrame:
    train = pd.DataFrame(dict(step=range(steps), split="train", nll=2 - np.arange(steps) / 100, kl=0.1))
    val = pd.DataFrame(dict(step=range(epochs), split="val", nll=2.0, kl=0.2))
    return pd.concat([train, val], ignore_index=True)


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


@pytest.mark.parametrize("steps, epochs, labels", [
    (1, 0, ["train"]), (29, 3, ["train", "validation"]), (30, 1, ["train, per step", "train, smoothed", "validation"]),
    (0, 2, ["validation"])])
def test_a_log_too_short_to_be_smoothed_has_one_line(ax, steps, epochs, labels):
    plot_nll(run_log(steps, epochs), ax)
    assert [line.get_label() for line in ax.lines] == labels
    assert len({tuple(line.get_ydata()) for line in ax.lines}) == len(labels), "no line is another one under a second name"


def test_another_column_is_drawn_by_name(ax):
    assert plot_nll(run_log(40, 2), column="kl", ax=ax) is ax and ax.get_ylabel() == "KL (nats per token)"
    with pytest.raises(ValueError, match=r"\['margin'\]"): plot_nll(run_log(3), ax, "margin")
