"""Which releases of Lightning the callbacks run in: both ends of the range, and the sentence of what is below it."""

import os
import re
import subprocess
import sys
import types

import lightning
import pytest
from helpers.paths import REPOSITORY

from minirec_pl.callbacks import (
    CompletionsTable,
    EasyToHardCurriculum,
    MiniRec,
    RescoreSamples,
    RewardHistory,
    SelectionDashboard,
    SelectSamples,
)
from minirec_pl.utils.errors import InputError

CALLBACKS = (
    CompletionsTable,
    EasyToHardCurriculum,
    MiniRec,
    RescoreSamples,
    RewardHistory,
    SelectionDashboard,
    SelectSamples,
)


def imported(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("pytorch_lightning")
    module.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pytorch_lightning", module)


@pytest.mark.parametrize("make", CALLBACKS)
@pytest.mark.parametrize("version", ["2.5.6", "2.5.0.post0", "1.9.5", "2.0.0rc1"])
def test_an_older_pytorch_lightning_is_one_sentence_with_both_versions(
    make: type, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported(version, monkeypatch)
    with pytest.raises(InputError) as raised:
        make()
    said = str(raised.value)
    assert f"pytorch_lightning {version} is imported" in said
    assert f"lightning {lightning.__version__}," in said
    assert "pip install 'pytorch-lightning>=2.6,<3'" in said
    assert "\n" not in said


@pytest.mark.parametrize("version", ["2.6.0", "2.6.6", "2.10.1", "3.0.0"])
def test_others_are_not_in_the_way(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    imported(version, monkeypatch)
    for make in CALLBACKS:
        make()
    monkeypatch.delitem(sys.modules, "pytorch_lightning")
    for make in CALLBACKS:
        make()


def test_the_sentence_names_the_range_of_pyproject() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'"((?:pytorch-)?lightning[^"]*)"', text) == ["lightning>=2.6,<3", "pytorch-lightning>=2.6,<3"]


FIT = """
import torch, pytorch_lightning as pl
from minirec_pl.callbacks import MiniRec
from minirec_pl.probes import HeadProbe


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


data = torch.utils.data.TensorDataset(torch.randn(40, 4), torch.randint(0, 3, (40,)))
quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
minirec = MiniRec(budget=0.5, probe=HeadProbe("head"))
trainer = pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[minirec], **quiet)
trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=4, shuffle=True))
print("steps", trainer.global_step, "on", pl.__version__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2.5.6", "2.6.0", None])
def test_both_ends_of_the_range_train_and_the_release_below_says_so(version: str | None, tmp_path: object) -> None:
    """`pytorch_lightning` as it was released, beside the installed `lightning`; None for the installed one."""
    places = [str(REPOSITORY)]
    if version is not None:
        options = ["--disable-pip-version-check", "--quiet", "--no-deps", "--target", str(tmp_path)]
        pip = [sys.executable, "-m", "pip", "install", *options, f"pytorch-lightning=={version}"]
        if subprocess.run(pip, check=False, capture_output=True, timeout=300).returncode:
            pytest.skip("no package index")
        places.insert(0, str(tmp_path))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run(
        [sys.executable, "-c", FIT], env=environment, cwd=str(tmp_path), capture_output=True, text=True, check=False
    )
    if version == "2.5.6":
        assert done.returncode == 1
        assert "InputError: pytorch_lightning 2.5.6 is imported, and its Trainer cannot run" in done.stderr
        assert "Expected a parent" not in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert f"steps 10 on {version or lightning.__version__}" in done.stdout
