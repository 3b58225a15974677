"""A study on a toy dataset whose cells take a moment."""

import yaml

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
