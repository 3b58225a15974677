"""Plans that get shorter and longer between epochs: no batch is cut or skipped, and every validation runs."""

import pytest
from helpers.foreign import Classifier, Points, loader_of
from torch.utils.data import DataLoader

from minirec_pl.callbacks import MiniRec
from minirec_pl.data.sampler import CurriculumSampler
from minirec_pl.selection import RandomSelector

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = (20, 44, 9, 60, 33)


class Varying(RandomSelector):
    """Picks another number of samples each epoch."""

    def select(self, signals, k, *, epoch=0):
        return super().select(signals, SIZES[epoch], epoch=epoch)


class Count(Classifier):
    """Notes after how many batches of which epoch each validation came."""

    def __init__(self, **options):
        super().__init__(**options)
        self.validations = []

    def on_validation_start(self):
        epoch = self.current_epoch
        self.validations.append((epoch, len(self.seen.get(epoch, []))))


def batches(n):
    return [8] * (n // 8) + ([n % 8] if n % 8 else [])


def due(every, interval):
    """When Lightning validates, said again."""
    expected, done = [], 0
    for epoch, n in enumerate(map(len, map(batches, SIZES))):
        step = interval if isinstance(interval, int) else max(1, int(n * interval))
        for batch in range(1, n + 1):
            done += 1
            counted = done if every is None else batch
            if counted % step == 0 and (every is None or (epoch + 1) % every == 0):
                expected.append((epoch, batch))
    return expected


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("reload", [0, 2])
@pytest.mark.parametrize(("every", "interval"), [(1, 1.0), (2, 1.0), (1, 0.5), (2, 0.5), (1, 2), (None, 5), (None, 11)])
def test_every_batch_is_trained_on_and_every_validation_runs(make_trainer, ours, reload, every, interval):
    sampler = CurriculumSampler(range(60))

    def loader():
        return DataLoader(Points(), batch_size=8, sampler=sampler) if ours else loader_of(shuffle=True)

    module = Count(loader=loader)
    trainer = make_trainer(
        callbacks=[MiniRec(60, selector=Varying(redraw=True), curriculum="shuffled")],
        max_epochs=len(SIZES),
        reload_dataloaders_every_n_epochs=reload,
        check_val_every_n_epoch=every,
        val_check_interval=interval,
        limit_val_batches=1,
    )
    trainer.fit(module, val_dataloaders=loader_of())
    for epoch, n in enumerate(SIZES):
        assert [len(batch) for batch in module.seen[epoch]] == batches(n)
        assert len(set(module.rows(epoch))) == n
    assert module.validations == due(every, interval)
    assert trainer.global_step == sum(len(batches(n)) for n in SIZES)


def test_a_validation_interval_longer_than_a_plan_is_refused_by_lightning(make_trainer):
    trainer = make_trainer(
        callbacks=[MiniRec(60, selector=Varying(redraw=True), curriculum="shuffled")],
        max_epochs=len(SIZES),
        val_check_interval=3,
        limit_val_batches=1,
    )
    with pytest.raises(ValueError, match=r"`val_check_interval` \(3\) must be less than or equal .* \(2\)"):
        trainer.fit(Count(), loader_of(), loader_of())
