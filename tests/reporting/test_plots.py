import math
from itertools import combinations

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
from helpers.rival_pool import random_pool
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from minirec_pl.cli.select import plan_table
from minirec_pl.reporting.figures import quality
from minirec_pl.reporting.plots import draw_curriculum, draw_reliability, draw_selection
from minirec_pl.selection import EL2NSelector, GraNdSelector, MiniRecSelector, RandomSelector
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


def title_of(figure):
    return figure.texts[0].get_text()


def inside(figure):
    """Whether the picture holds all that is drawn, and no titles, labels and legends lie over each other."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    whole = figure.get_tightbbox(canvas.get_renderer())
    assert whole.x0 >= 0
    assert whole.y0 >= 0
    assert (whole.x1, whole.y1) <= tuple(figure.get_size_inches())
    texts = list(figure.texts)
    for axes in figure.axes:
        texts += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
    boxes = {text.get_text(): text.get_window_extent() for text in texts if text.get_text()}
    over = [(one, two) for one, two in combinations(boxes, 2) if boxes[one].overlaps(boxes[two])]
    assert over == []
    return True


def test_rewards_folds_and_mean_are_drawn(figures, tmp_path):
    rewards = [0.9, 0.5, 0.1, 0.8, 0.2]
    draw_curriculum(rewards, [0, 3], 7, tmp_path / "curriculum.png")
    (axes,) = figures[0].axes
    points, mean = axes.lines
    assert points.get_xdata().tolist() == [0, 1, 2, 3, 4]
    assert points.get_ydata().tolist() == rewards
    assert mean.get_ydata()[0] == pytest.approx(0.5)
    shades, starts = axes.collections
    assert [path.get_extents().intervalx.tolist() for path in shades.get_paths()] == [[3, 5]]
    assert [segment[0][0] for segment in starts.get_segments()] == [3]
    assert all(word in title_of(figures[0]) for word in ("epoch 8", "5 samples", "2 folds"))
    assert axes.get_xlabel() == "position in the epoch [samples]"
    assert axes.get_ylabel() == "mean reward\n(higher is easier)"
    picture = imread(tmp_path / "curriculum.png")
    assert picture.shape[0] > 300
    assert picture.std() > 0.01


@pytest.mark.parametrize("scale", [0.9, 1e-3, 1e-6, 0.0])
def test_the_axis_of_rewards_begins_at_0_and_no_text_is_cut_off(scale, figures, tmp_path):
    rewards = [scale * k / 500 for k in range(500)]
    measure = "solve probability or mean reward"
    draw_curriculum(rewards, [0, 100], 122, tmp_path / "curriculum.png", measure=measure)
    (axes,) = figures[0].axes
    bottom, top = axes.get_ylim()
    assert bottom == 0 < top <= max(1.2 * scale, float(scale == 0))
    assert axes.get_ylabel().startswith(measure)
    assert inside(figures[0])


def test_negative_rewards_stay_visible(figures, tmp_path):
    draw_curriculum([-3.0, -1.0, 0.5], [0], 0, tmp_path / "curriculum.png")
    bottom, top = figures[0].axes[0].get_ylim()
    assert bottom < -3 < 0.5 < top


@pytest.mark.parametrize("rewards", [[math.nan] * 4, [math.nan, 0.5, math.nan, 0.1], [0.5] * 4])
def test_unknown_and_equal_rewards(rewards, figures, tmp_path):
    draw_curriculum(rewards, [0], 0, tmp_path / "curriculum.png")
    (axes,) = figures[0].axes
    known = [reward for reward in rewards if not math.isnan(reward)]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(labels) == (2 if known else 1)
    if known:
        assert f"{np.mean(known):.3g}" in labels[1]
    assert "1 fold," in title_of(figures[0])


def test_without_folds_every_sample_is_drawn(figures, tmp_path):
    draw_curriculum([0.1, 0.2], [], 0, tmp_path / "curriculum.png")
    assert not figures[0].axes[0].collections[0].get_paths()
    assert "fold" not in title_of(figures[0])


def test_another_order_is_named_in_the_title(figures, tmp_path):
    draw_curriculum([0.1, 0.2], [], 3, tmp_path / "curriculum.png", "hard to easy")
    assert title_of(figures[0]) == "Plan of epoch 4: 2 samples, hard to easy"


def pool_with_some_rollouts(n=200):
    """A pool whose solve probabilities are exact and of which a few samples met rewards in training."""
    n_rollouts = np.where(np.arange(n) % 7, 0, 16)
    mean = np.where(n_rollouts, 0.0, np.nan)
    share = {"reward_mean": mean, "reward_std": mean, "n_rollouts": n_rollouts, "solve_share": mean}
    return random_pool(n=n, solve_probability=np.linspace(0.001, 0.2, n), **share)


def test_the_picture_of_a_selection_says_what_it_draws(figures, tmp_path):
    """The difficulty in use, and not mean rewards where there are rollouts beside difficulties where there are none."""
    signals = pool_with_some_rollouts()
    ledger = MiniRecSelector(difficulty="pass_at_group", num_generations=16).select(signals, 40)
    plan = plan_table(ledger, 4, 42)
    assert set(plan["measure"]) == {"solve probability of a group of 16"}
    assert plan["easiness"].tolist() == ledger.rows(plan["sample_id"].tolist())["difficulty"].tolist()
    draw_selection(signals, ledger, plan, tmp_path / "selection.png")
    left, right, _ = figures[0].axes
    assert left.get_xlabel() == "solve probability of a group of 16 (higher is easier)"
    assert left.get_ylabel() == "score, alpha L + beta R"
    drawn = np.sort(np.concatenate([line.get_xdata() for line in left.lines]))
    assert drawn == pytest.approx(np.sort(ledger.table["difficulty"]))
    assert right.get_ylabel() == "second principal component"
    assert inside(figures[0])


@pytest.mark.parametrize(
    ("selector", "x", "y"),
    [
        (MiniRecSelector(), "mean reward (higher is easier)", "score, alpha L + beta R"),
        (GraNdSelector(), "mean reward (higher is easier)", "value, by which the selector picks"),
        (EL2NSelector(), "solve probability (higher is easier)", "value, by which the selector picks"),
        (RandomSelector(), "mean reward (higher is easier)", "share of samples"),
    ],
)
def test_every_selector_has_its_axes_named(selector, x, y, figures, tmp_path):
    signals = random_pool()
    ledger = selector.select(signals, 12)
    draw_selection(signals, ledger, plan_table(ledger, None, 42), tmp_path / "selection.png")
    left = figures[0].axes[0]
    assert (left.get_xlabel(), left.get_ylabel()) == (x, y)
    assert inside(figures[0])


def test_a_selection_of_which_nothing_is_known_says_so(figures, tmp_path):
    unknown = np.full(60, np.nan)
    none = {"reward_mean": unknown, "reward_std": unknown, "n_rollouts": np.zeros(60, dtype=int), "solve_share": None}
    signals = random_pool(embedding=None, **none)
    ledger = RandomSelector().select(signals, 12)
    draw_selection(signals, ledger, plan_table(ledger, None, 42), tmp_path / "selection.png")
    texts = [axes.texts[0].get_text() for axes in figures[0].axes]
    assert texts == ["no rewards, solve probabilities or scores", "no embeddings"]


def quality_figure(monkeypatch, tables):
    saved = []
    monkeypatch.setattr("minirec_pl.reporting.figures._uri", lambda figure: saved.append(figure) or "data:")
    picture = quality(tables, "ndcg@10", "tokens", "tokens so far")
    return picture, saved[0].axes[0]


def test_quality_is_drawn_with_its_errors_and_noise_is_not_blown_up(monkeypatch):
    table = pd.DataFrame({"tokens": [100, 200], "ndcg@10": [0.0750, 0.0751], "ndcg@10_se_users": [0.004, 0.005]})
    picture, axes = quality_figure(monkeypatch, {"one": table, "two": table.assign(tokens=[50, 60])})
    bottom, top = axes.get_ylim()
    assert bottom <= 0.0751 - 2 * 0.005
    assert top >= 0.0751 + 2 * 0.005
    bars = [container[2][0].get_segments() for container in axes.containers]
    assert [[segment[1][1] - segment[0][1] for segment in of] for of in bars] == [pytest.approx([0.008, 0.01])] * 2
    assert "one standard error" in picture.caption
    assert axes.get_ylabel() == "NDCG@10 on validation"


def test_quality_without_errors_spans_a_part_of_its_value(monkeypatch):
    table = pd.DataFrame({"tokens": [100, 200], "ndcg@10": [0.0750, 0.0751]})
    picture, axes = quality_figure(monkeypatch, {"one": table})
    bottom, top = axes.get_ylim()
    assert top - bottom >= 0.2 * 0.075
    assert "No errors are stored" in picture.caption


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


@pytest.mark.parametrize("values", [([0.1, 0.4], [0.2, 0.3]), ([0.0], [0.0]), ([0.001] * 10, [0.0] * 9 + [1.0])])
def test_a_reliability_curve_is_drawn_to_its_own_scale(tmp_path, values):
    draw_reliability(*values, tmp_path / "calibration.png")
    picture = imread(tmp_path / "calibration.png")
    assert picture.shape[:2] == (630, 660)
    assert picture.std() > 0.01
