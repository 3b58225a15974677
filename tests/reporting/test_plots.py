import math

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.image import imread

from minirec_pl.reporting.plots import draw_curriculum
from minirec_pl.utils.errors import InputError


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    saved = []
    save = matplotlib.figure.Figure.savefig

    def keep(figure, *args, **kwargs):
        saved.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return saved


def test_rewards_folds_and_mean_are_drawn(figures, tmp_path):
    rewards = [0.9, 0.5, 0.1, 0.8, 0.2]
    draw_curriculum(rewards, [0, 3], 7, tmp_path / "curriculum.png")
    (axes,) = figures[0].axes
    points, mean = axes.lines[-2:]
    assert points.get_xdata().tolist() == [0, 1, 2, 3, 4]
    assert points.get_ydata().tolist() == rewards
    assert mean.get_ydata()[0] == pytest.approx(0.5)
    assert [line.get_xdata()[0] for line in axes.lines[:-2]] == [3]
    shade = axes.patches[0].get_bbox()
    assert (shade.x0, shade.x1) == (3, 5)
    title = axes.get_title(loc="left")
    assert all(word in title for word in ("epoch 7", "5 samples", "2 folds"))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("position in the epoch", "mean reward")
    picture = imread(tmp_path / "curriculum.png")
    assert picture.shape[0] > 300
    assert picture.std() > 0.01


@pytest.mark.parametrize("rewards", [[math.nan] * 4, [math.nan, 0.5, math.nan, 0.1], [0.5] * 4])
def test_unknown_and_equal_rewards(rewards, figures, tmp_path):
    draw_curriculum(rewards, [0], 0, tmp_path / "curriculum.png")
    (axes,) = figures[0].axes
    known = [reward for reward in rewards if not math.isnan(reward)]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(labels) == (2 if known else 1)
    if known:
        assert f"{np.mean(known):.3f}" in labels[1]
    assert "1 fold," in axes.get_title(loc="left")


def test_without_folds_every_sample_is_drawn(figures, tmp_path):
    draw_curriculum([0.1, 0.2], [], 0, tmp_path / "curriculum.png")
    assert not figures[0].axes[0].patches
    assert "fold" not in figures[0].axes[0].get_title(loc="left")


def test_another_order_is_named_in_the_title(figures, tmp_path):
    draw_curriculum([0.1, 0.2], [], 3, tmp_path / "curriculum.png", "hard to easy")
    assert figures[0].axes[0].get_title(loc="left") == "Plan of epoch 3: 2 samples, hard to easy"


def test_an_older_picture_survives_a_failure(tmp_path, monkeypatch):
    path = tmp_path / "curriculum.png"
    draw_curriculum([0.1, 0.2], [0], 0, path)
    before = path.read_bytes()

    def fail(figure, target, **kwargs):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fail)
    with pytest.raises(InputError, match=r"curriculum\.png.*No space left"):
        draw_curriculum([0.3], [0], 0, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["curriculum.png"]
