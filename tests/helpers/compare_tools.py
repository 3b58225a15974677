"""A study on a toy dataset whose cells take a moment."""

import numpy as np
import pandas as pd
import yaml
from scipy import stats

from .cli_tools import TINY, write_toy

BASE = {
    "warm_start": {"train_on": "warm", "epochs": 1, "batch_size": 8, "dropout": 0.1},
    "selection": {
        "class_path": "minirec_pl.callbacks.MiniRec",
        "init_args": {"budget": 0.5, "rescore_fraction": 1.0, "curriculum": "shuffled"},
    },
    "model": {
        "class_path": "minirec_pl.GRPORecModule",
        "init_args": {
            "policy": {
                "class_path": "minirec_pl.policy.GenerativePolicy",
                "init_args": {"config": yaml.safe_load(TINY)},
            },
            "rewards": ["minirec_pl.rewards.hit"],
            "num_generations": 4,
            "scoring_generations": 0,
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.LinearLR", "init_args": {"total_iters": 5}},
        },
    },
    "data": {
        "class_path": "minirec_pl.RecDataModule",
        "init_args": {"dataset": "toy", "warm_fraction": 0.5, "history_window": 8, "batch_size": 16},
    },
    "trainer": {"accelerator": "cpu", "devices": 1, "gradient_clip_val": 1.0},
}
STUDY = {
    "datasets": [
        {"name": "toy", "window": "late", "path": "PATH", "overrides": {"data.path": "{path}", "data.window": [0.2, 1]}}
    ],
    "budgets": [0.5],
    "seeds": [1, 2],
    "epochs": 2,
    "overrides": {"model.lr_scheduler.total_iters": "{steps}"},
    "references": ["random", "full"],
    "methods": {
        "full": {"epochs": 1, "overrides": {"selection": None}},
        "random": {
            "overrides": {
                "selection.selector": {
                    "class_path": "minirec_pl.selection.RandomSelector",
                    "init_args": {"seed": "{seed}", "redraw": True},
                }
            }
        },
        "minirec": {
            "overrides": {
                "selection.selector": {
                    "class_path": "minirec_pl.selection.MiniRecSelector",
                    "init_args": {"difficulty": "pass_at_group", "gate": [0.0, 1.0], "on_short": "fill"},
                },
                "selection.curriculum": "minirec_pl.callbacks.EasyToHardCurriculum",
            }
        },
    },
}


def write_study(folder, **changes):
    """The study with some keys changed, and its data; returns the path of its file."""
    if not (folder / "data").exists():
        write_toy(folder / "data")
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    study = {"config": str(folder / "base.yaml"), **STUDY, **changes}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False).replace("PATH", str(folder / "data")))
    return path


VALIDATION = {"full": (0.1, 0.3, 0.2), "random": (0.1, 0.2, 0.2), "minirec": (0.1, 0.1, 0.4)}
TEST = {"full": (0.1, 0.5, 0.9), "random": (0.1, 0.2, 0.3), "minirec": (0.1, 0.3, 0.6)}


def raw(budgets, seeds=(1, 2, 3)):
    """A raw table in which seed s adds s thousandths to every figure."""
    rows = []
    for method, given in budgets.items():
        for budget in given:
            for seed in seeds:
                for epoch in range(3):
                    run = {"dataset": "one", "window": "", "method": method, "setting": "", "budget": budget}
                    spent = {"tokens": 100 + 50 * epoch, "tokens_warm_start": 100, "tokens_scoring": 0}
                    spent |= {"tokens_training": 50 * epoch, "rollouts": epoch, "seconds": float(epoch)}
                    for split, figures in (("validation", VALIDATION), ("test", TEST)):
                        ndcg = figures[method][epoch] + seed / 1000
                        figure = {"split": split, "epoch": epoch, "seed": seed, "ndcg@10": ndcg, "hit_rate@10": 0.5}
                        rows.append({**run, **spent, **figure})
    return pd.DataFrame(rows)


def chosen(frame, dataset, window, method, budget):
    """Test NDCG@10 by seed at the epoch with the best validation, by plain loops."""
    own = frame[(frame["dataset"] == dataset) & (frame["window"] == window) & (frame["method"] == method)]
    own = own[np.isclose(own["budget"], budget)]
    found = {}
    for seed, rows in own.groupby("seed"):
        validation = rows[rows["split"] == "validation"].sort_values("epoch")
        epoch = validation["epoch"].iloc[int(np.argmax(validation["ndcg@10"].to_numpy()))]
        found[seed] = rows[(rows["split"] == "test") & (rows["epoch"] == epoch)]["ndcg@10"].item()
    return found


def interval(values):
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return [np.mean(values), low, high]
