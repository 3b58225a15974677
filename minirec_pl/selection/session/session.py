"""The session of a run: its signals, ledger, plan and sampler, shared by the callbacks of one Trainer."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch.utils.data import DataLoader

from minirec_pl.data.foreign_loader import ForeignLoader
from minirec_pl.data.train_loader import TrainLoader, foresee
from minirec_pl.selection.curriculum import shuffled_curriculum
from minirec_pl.selection.diagnostics import easiness_of
from minirec_pl.selection.fingerprints import fingerprints_of
from minirec_pl.selection.group_sizes import GroupSizer, GroupSizes, met_chance
from minirec_pl.selection.ledger import SelectionLedger
from minirec_pl.selection.predicted import PredictedDifficulty
from minirec_pl.selection.session.identity import RunIdentity, allowed, of_signals
from minirec_pl.selection.session.resume import Running, epoch_is_done
from minirec_pl.selection.session.scorers import Probe
from minirec_pl.selection.session.scoring import measure
from minirec_pl.selection.session.signal_files import SignalFiles, read_vectors
from minirec_pl.selection.signals import SampleSignals, gather_signals
from minirec_pl.selection.store import SignalStore
from minirec_pl.utils.checkpoints import weights_digest
from minirec_pl.utils.cost import Cost
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.ranks import agree, gather_states, on_any, world
from minirec_pl.utils.run_folder import run_folder
from minirec_pl.utils.seeds import isolated_random_state, random_state, restore_random_state

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from minirec_pl.data.sampler import CurriculumSampler

Step: TypeAlias = "Callable[[SelectionSession, Trainer, LightningModule, int], None]"
Phase = Literal["record", "rescore", "select", "order"]
PHASES: tuple[Phase, ...] = ("record", "rescore", "select", "order")
_KEPT = ("selected", "plan", "plan_epoch", "fold_starts", "plan_easiness", "scored", "trained", "target_difficulty")
_ADDED = ("plan_measure", "told", "forecasts", "reliability", "group_sizes")  # kept too; not in checkpoints of 0.1
CHECKPOINT_KEY = "minirec_pl.SelectionSession"
_WHY = {  # fills in the batch size, the number of ranks and limit_train_batches
    "incomplete_batch": "since drop_last=True drops a batch of less than {0}: set drop_last=False, or a budget that is "
    "a multiple of {0} times {1}, the number of ranks",
    "limit": "since limit_train_batches is {2}: leave it out, or lower the budget",
}
_ATTRIBUTE = "_minirec_session"


def session_of(trainer: Trainer) -> SelectionSession:
    """Returns the session of a Trainer, which keeps it as an attribute; made at the first call."""
    session: SelectionSession | None = getattr(trainer, _ATTRIBUTE, None)
    if session is None:
        session = SelectionSession()
        setattr(trainer, _ATTRIBUTE, session)
    return session


def nothing_trained() -> dict[str, float]:
    """Returns empty sums over what was met in training: samples, their mean rewards, groups, and how many are mixed."""
    return {"samples": 0, "reward": 0.0, "groups": 0, "mixed": 0}


class SelectionSession:
    """State of the selection in one run.

    Callbacks register a function for a phase. Before the first epoch and after every epoch the session runs the
    phases in the order record, rescore, select, order, whatever the order of the callbacks, then gives the plan to
    the sampler.

    Attributes:
        store: what is known of every sample of the pool.
        ledger: the last selection, or None before the first.
        selected: sample_ids to train on in the coming epoch, best first; None for the whole pool.
        plan: the order of sample_ids of the coming epoch; None for the sampler's own shuffle.
        epoch: the current epoch.
        plan_epoch: the epoch that `plan` is for; -1 before the first.
        fold_starts: positions in the plan at which a fold starts; empty without folds.
        plan_easiness: what each sample of the plan was ordered by, see `easiness`; empty without an order.
        plan_measure: what that is, in words.
        told: keys of the warnings that were given, see `warn_once`.
        from_ledger: True where a ledger of an earlier selection is trained on.
        asked: options of `sample_signals` that the selector asks for, see `signal_options`.
        probe: how a module is scored; None asks its `sample_signals`.
        predictor: model of the solve probability that the selector goes by; None for none.
        discount: of the store, see `SignalStore`.
        forecasts: float64 [n, 3] of each batch met since the last plan: solve probabilities as predicted before, and
            the rollouts that hit and missed. Only with a predictor.
        reliability: mean predictions of the bins of the last reliability curve, and the shares that hit.
        active: False in a run with `overfit_batches`, in which nothing is selected.
        scored: True once the pool has been scored, or the part of it that was asked for.
        trained: what was met in training since the last plan, see `nothing_trained`.
        trained_reward: mean reward met in training between the last two plans, without rollouts the mean solve
            probability; None where none was.
        target_difficulty: target of a `MovingTargetCurriculum`, in [0, 1]; None before its first plan.
        cost: what the run spent; that of the module where it has one.
        running: what the run is in the middle of, shared with our modules.
        identity: what the run's checkpoints are made for, shared with our modules.
        sizer: gives the samples groups of unequal size; None where all are of one size.
        group_sizes: rollouts of each sample of the pool in the coming epoch, int64 [N], see `GroupSizer.sizes`; None
            without a sizer, and until `groups` is first asked for.
        placed: the run folder; None for none, and before `folder` is first asked.
        written: when files were last written there, by `time.monotonic`; at first when the session was made.
    """

    store: SignalStore
    sampler: CurriculumSampler

    def __init__(self) -> None:
        self.ledger: SelectionLedger | None = None
        self.selected: list[int] | None = None
        self.plan: list[int] | None = None
        self.plan_epoch = -1
        self.epoch = 0
        self.fold_starts: list[int] = []
        self.plan_easiness: list[float] = []
        self.plan_measure = "mean reward"
        self.told: list[str] = []
        self.from_ledger = False
        self.asked: dict[str, str] = {}
        self.probe: Probe | None = None
        self.predictor: PredictedDifficulty | None = None
        self.discount = 0.5
        self.forecasts: list[torch.Tensor] = []
        self.reliability: list[list[float]] = []
        self.scored = False
        self.trained = nothing_trained()
        self.trained_reward: float | None = None
        self.target_difficulty: float | None = None
        self.cost = Cost()
        self.running = Running()
        self.identity = RunIdentity()
        self.sizer: GroupSizer | None = None
        self.group_sizes: torch.Tensor | None = None
        self._unsized: int | None = None
        self._steps: dict[Phase, Step] = {}
        self._restored: Mapping[str, Any] | None = None
        self._restored_step = 0
        self._own: Mapping[str, Any] | None = None
        self._files = SignalFiles()
        self.written = time.monotonic()
        self._expected: tuple[int, Callable[[int], int] | None] = (0, None)
        self.placed: Path | None = None
        self._placed = self._prepared = self._finished = False
        self._first: tuple[str, Mapping[str, Any]] | None = None
        self._batch, self._ended = (-1, -1), -1
        self._no_loss = 0
        self.active = True

    def register(self, phase: Phase, step: Step, trainer: Trainer) -> None:
        """Registers a callback's function for one phase, called as step(session, trainer, module, epoch).

        Raises:
            InputError: if another callback has the phase already.
        """
        if phase in self._steps and self._steps[phase] != step:
            raise InputError(
                f"two callbacks of one Trainer are responsible for the phase '{phase}': use either MiniRec or the "
                "single callbacks, and each of those once"
            )
        self._steps[phase] = step
        self._prepared = False
        foresee(trainer, *self._expected)

    def expect(self, warmup_epochs: int, count: Callable[[int], int] | None) -> None:
        """Announces how many samples the plans will hold, before they are made; see `foresee`."""
        self._expected = (warmup_epochs, count)

    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        """Finds loader and sampler, resumes from a checkpoint and plans the first epoch; called in `on_fit_start`."""
        if self._prepared:
            return
        self._prepared, self._finished = True, False
        self.active = trainer.overfit_batches == 0  # type: ignore[attr-defined]
        if not self.active:
            text = (
                "overfit_batches trains on the same few batches every epoch, so nothing is selected in this run: use "
                "limit_train_batches to select among all samples"
            )
            self.warn_once(trainer, text, text)
            return
        self.cost = getattr(module, "cost", self.cost)
        self._placed = False
        self.folder(trainer)
        self._train = TrainLoader(trainer)
        self.sampler = self._train.sampler
        self.identity.check_loader(trainer, self._train.loader)
        self._begin()
        epoch, new = trainer.current_epoch, self._restored is None
        if self._restored is not None:
            epoch = self._take_up(self._restored, trainer)
            self._restored = None
        self.epoch = epoch
        if self.plan_epoch == epoch or trainer.should_stop or self._is_over(trainer, epoch, self._restored_step):
            self.sampler.set_plan(self.plan)
            return
        with isolated_random_state():
            if (saved := self.running.random) is not None:  # scoring has the numbers that it would have had
                restore_random_state(saved)
            start = random_state()
            self._run(trainer, module, epoch)
        if new and self.scored:
            self._first = _weights(module), start

    def _begin(self) -> None:
        self.store = SignalStore(self.sampler.sample_ids)
        self.store.discount = self.discount
        self.forecasts, self.reliability = [], []
        self.ledger = self.selected = self.plan = None
        self.plan_epoch, self.scored, self.fold_starts, self.plan_easiness = -1, False, [], []
        self.trained, self.trained_reward, self.target_difficulty = nothing_trained(), None, None
        self.told, self.group_sizes = [], None
        self._first, self._batch, self._ended, self._no_loss = None, (-1, -1), -1, 0

    def keep_selection(self) -> None:
        """Keeps the first selection, whatever weights are put in before training begins."""
        self._first = None

    def _check_weights(self, trainer: Trainer, module: LightningModule) -> None:
        """Scores and plans the first epoch again if training begins with other weights than were scored."""
        if self._first is None:
            return
        (scored_with, start), self._first = self._first, None
        if not on_any(_weights(module) != scored_with, trainer.strategy.root_device):
            return
        text = (
            "the pool was scored before the weights were set that are trained, so it is scored again: set them before "
            "fit() or in configure_model, not in on_fit_start or on_train_start, to have it scored once"
        )
        self.warn_once(trainer, text, text)
        self._begin()
        if callable(replaced := getattr(module, "weights_replaced", None)):
            replaced()
        with isolated_random_state():
            restore_random_state(start)
            self._run(trainer, module, self.epoch)
        with isolated_random_state():
            self._train.ask_again(trainer)

    def advance(self, trainer: Trainer, module: LightningModule) -> None:
        """Plans the next epoch, once, if there is one; called in `on_train_epoch_end`."""
        self._end_epoch(trainer)
        epoch = trainer.current_epoch + 1
        over = self._is_over(trainer, epoch, trainer.global_step)
        if self.plan_epoch != epoch and not over and not trainer.should_stop:
            self._run(trainer, module, epoch)

    @staticmethod
    def _is_over(trainer: Trainer, epoch: int, step: int) -> bool:
        """Says whether there is no such epoch, or no step after this one."""
        over = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epoch
        return over or 0 <= trainer.max_steps <= step

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Checks that the Trainer draws from the session's sampler; called in `on_train_epoch_start`.

        The first time, other weights than those that the pool was scored with have it scored and planned again.
        """
        self.epoch = trainer.current_epoch
        self._check_weights(trainer, module)
        self._train.check(trainer)

    def end_batch(self, trainer: Trainer, outputs: Any, batch_idx: int) -> None:
        """Counts the samples of a batch that made no loss; called in `on_train_batch_end`."""
        batch = trainer.current_epoch, batch_idx
        if batch != self._batch and not outputs:
            self._no_loss += self._train.rows_of(batch_idx)
        self._batch = batch

    def _end_epoch(self, trainer: Trainer) -> None:
        if self._ended == trainer.current_epoch:
            return
        self._ended = trainer.current_epoch
        self._log_dropped(trainer, {"early_stop": self._train.missed(trainer, begun=True), "no_loss": self._no_loss})
        self._no_loss = 0

    def end_training(self, trainer: Trainer) -> None:
        """Counts the samples of an epoch that was planned and never began; called in `on_train_end`."""
        if self.plan_epoch > self._ended:
            self._ended = self.plan_epoch
            self._log_dropped(trainer, {"early_stop": self._train.missed(trainer, begun=False)})

    def _log_dropped(self, trainer: Trainer, dropped: Mapping[str, int]) -> None:
        """Logs how many samples of a plan are not trained on, by reason, and warns once of those that it never will."""
        counts = {reason: count for reason, count in dropped.items() if count}
        if counts:
            self.log(trainer, {f"selection/dropped_{reason}": float(count) for reason, count in counts.items()})
        if self.plan is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for reason in sorted(counts.keys() & _WHY.keys()):
            made = self._train.loader.batch_size, self.sampler.num_replicas, trainer.limit_train_batches
            text = (
                f"{counts[reason]} of the {len(self.plan)} samples planned for epoch {self.plan_epoch + 1} are not "
                f"trained on, {_WHY[reason].format(*made)}"
            )
            self.warn_once(trainer, text, reason)

    def _run(self, trainer: Trainer, module: LightningModule, epoch: int) -> None:
        self.plan = None
        self.group_sizes, self._unsized = None, epoch
        self.fold_starts, self.plan_easiness = [], []
        if self.ledger is None:
            self.selected = None
        error: Exception | None = None
        try:
            for phase in PHASES:
                if phase in self._steps:
                    self._steps[phase](self, trainer, module, epoch)
                if phase == "select" and (groups := self.groups) is not None and self.selected is None:
                    pool = shuffled_curriculum(self.store.sample_ids, seed=f"{self.sampler.seed}-{epoch}")
                    self.selected = groups.within_budget(pool, len(pool))
            if self.plan is None and self.selected is not None and len(self.selected) < len(self.store):
                self.plan = shuffled_curriculum(self.selected, seed=f"{self.sampler.seed}-{epoch}")
        except Exception as raised:
            error = raised
        sizes: list[int] = [] if self.group_sizes is None else self.group_sizes.tolist()
        self._log_sizes(trainer)
        agree(error, trainer.strategy.root_device, [*(self.plan or ()), *sizes])
        self.plan_epoch = epoch
        self.sampler.set_plan(self.plan)
        self._train.renew(trainer, epoch)
        if self.sampler.ragged_count:
            self.log(trainer, {f"selection/ragged_{self.sampler.ragged}": float(self.sampler.ragged_count)})
        self._log_dropped(trainer, self._train.dropped(trainer))

    def has(self, phase: Phase) -> bool:
        """Whether a callback is responsible for a phase."""
        return phase in self._steps

    def _size_groups(self, sizer: GroupSizer, epoch: int) -> torch.Tensor:
        """Sizes the groups by what is known of the samples: the posterior where it is predicted."""
        if self.predictor is not None and self.store.has_outcomes:
            chance = self.store.posterior_mean(self.store.sample_ids)
        else:
            signals = self.store.read(self.store.sample_ids, vectors=False)
            chance = met_chance(signals, by_target=sizer.by_target)
        return sizer.sizes(chance, self.sampler.seed, epoch)

    def _log_sizes(self, trainer: Trainer) -> None:
        if self.group_sizes is None:
            return
        drawn = self.group_sizes[self.group_sizes > 0]
        values = {"selection/left_out": float(len(self.group_sizes) - len(drawn))}
        self.log(trainer, values | ({"selection/mean_generations": float(drawn.double().mean())} if len(drawn) else {}))

    @property
    def groups(self) -> GroupSizes | None:
        """The sizes of the groups of the present plan; None where all are of one size.

        They are made when first asked for while a plan is made, in the phase `select`, once the prediction is refitted.
        """
        if self.sizer is None:
            return None
        if self.group_sizes is None and self._unsized is not None:
            self.group_sizes = self._size_groups(self.sizer, self._unsized)
        if self.group_sizes is None:
            return None
        return GroupSizes(self.store.sample_ids, self.group_sizes, self.sizer)

    def score(self, trainer: Trainer, module: LightningModule, sample_ids: Sequence[int], epoch: int) -> None:
        """Measures rewards, gradient signals and embeddings of samples in one pass and stores them.

        Neither the module's mode nor any random number generator of the run is disturbed.

        Raises:
            InputError: if there is no probe and the module has no `sample_signals(batch)`.
        """
        data = getattr(trainer, "datamodule", None)
        if not self.scored:
            known = of_signals(self.identity.of_data(trainer, self._train.loader), module)
            self.store.fingerprints = known | fingerprints_of(module, data, self.store.sample_ids, self.asked)
        n_ranks, rank = world()
        error, parts = None, []
        with self.cost.timed("scoring"):
            try:
                own_ids = sorted(sample_ids)[rank::n_ranks]
                parts = measure(trainer, module, self._train.loader, own_ids, self.probe, self.asked)
            except Exception as raised:
                error = raised
            agree(error, trainer.strategy.root_device)
            own = SampleSignals.cat(parts) if parts else None
            signals = gather_signals(own, trainer.strategy.root_device)
            assert signals is not None
            self.store.update(signals, epoch=epoch, step=self.step(trainer), source="score")

    def batch_ids(self, batch_idx: int) -> torch.Tensor | None:
        """Returns the sample_ids of a training batch of a foreign loader, in the order drawn; of other loaders None."""
        loader = self._train.loader
        if not isinstance(loader, ForeignLoader):
            return None
        size = loader.batch_size or 1
        return torch.tensor(loader.foreign_sampler.drawn[batch_idx * size : (batch_idx + 1) * size])

    def easiness(self, sample_ids: Sequence[int]) -> torch.Tensor:
        """Returns the mean reward of samples, or their exact solve probability unless the whole pool has rollouts.

        Where nothing was scored and the solve probability is predicted, it is that. Where nothing was measured in this
        run, the values of the ledger that it trains on count.

        Args:
            sample_ids: [n], in the pool.

        Returns:
            float64 [n], NaN where nothing is known.
        """
        return self.easiness_in_words(sample_ids)[0]

    def easiness_in_words(self, sample_ids: Sequence[int]) -> tuple[torch.Tensor, str]:
        """Returns `easiness`, and what it is in words; arguments as there."""
        if not self.scored and self.store.has_prior:
            return self.store.posterior_mean(sample_ids), "predicted solve probability"
        view = self.store.read(sample_ids, vectors=False)
        if self.ledger is not None and not self.scored and bool((view.n_rollouts == 0).all()):
            ease = easiness_of(self.ledger)
            return torch.from_numpy(ease.loc[list(sample_ids)].to_numpy(dtype="float64", copy=True)), str(ease.name)
        exact = view.solve_probability
        if exact is None or bool((self.store.clock("reward_epoch") >= 0).all()):
            return view.reward_mean, "mean reward"
        mixed = " or mean reward" if bool((exact.isnan() & ~view.reward_mean.isnan()).any()) else ""
        return exact.where(~exact.isnan(), view.reward_mean), f"solve probability{mixed}"

    def step(self, trainer: Trainer) -> int:
        """Returns the optimizer steps so far, also while a resumed Trainer still counts from 0."""
        return max(trainer.global_step, self._restored_step)

    def log(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        """Sends figures to every logger at the current step."""
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=self.step(trainer))

    @property
    def loader(self) -> DataLoader[Any]:
        """The training loader; once the run has been prepared."""
        return self._train.loader

    @property
    def ready(self) -> bool:
        """Whether the run has been prepared, so that there is a state to save."""
        return self._prepared and self.active

    def folder(self, trainer: Trainer) -> Path | None:
        """Returns the run folder, None for none, see `run_folder`; all ranks ask at once."""
        if not self._placed:
            self.placed, self._placed = run_folder(trainer), True
        return self.placed

    def state_dict(self, trainer: Trainer) -> dict[str, Any]:
        """Returns tensors and primitives for a checkpoint, and writes the file of vectors that it names.

        Without a run folder the vectors are in the checkpoint itself.
        """
        folder, vectors = self.folder(trainer), None
        if folder is not None and trainer.is_global_zero:
            vectors = self._files.save(self.store, folder / "signals")
        self.prune(trainer)
        embedding = self.store.vectors().get("embedding")
        own = {"loader": self._train.loader.state_dict() if isinstance(self._train.loader, ForeignLoader) else None}
        return {
            **{name: getattr(self, name) for name in _KEPT + _ADDED},
            "store": self.store.state_dict(vectors=folder is None),
            "vectors": vectors,
            "run": None if folder is None else str(folder.absolute()),
            "ledger": None if self.ledger is None else self.ledger.state_dict(embedding=embedding),
            "next_epoch": self.epoch + int(epoch_is_done(trainer)),
            "step": trainer.global_step,
            "ranks": gather_states(own, trainer.strategy.root_device),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Keeps a checkpoint's state until `prepare`, when the pool is known."""
        self._restored = state

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        """Restores random numbers and gradients of a resumed run; called in `on_train_start`."""
        if self._own is not None:
            if isinstance(self._train.loader, ForeignLoader) and self._own["loader"] is not None:
                self._train.loader.load_generators(self._own["loader"])  # Lightning has given all ranks those of one
            self._own = None
        self.running.start(trainer, module)

    def ends(self) -> bool:
        """Whether a prepared run ends now: at the first call, when a fit ends or fails."""
        if not self.ready or self._finished:
            return False
        self._finished = True
        return True

    def warn_once(self, trainer: Trainer, text: str, key: str) -> None:
        """Warns on the first rank, once a run of each key, resumed or not; numbers in a key do not count."""
        key = re.sub(r"\d[\d.,]*", "#", key)
        if key not in self.told:
            self.told = [*self.told, key]
            if trainer.is_global_zero:
                warnings.warn(text, stacklevel=3)

    def prune(self, trainer: Trainer) -> None:
        """Deletes files of vectors that no checkpoint names."""
        if self.placed is not None and trainer.is_global_zero:
            callbacks = [Path(found) for c in trainer.checkpoint_callbacks if (found := getattr(c, "dirpath", None))]
            self._files.prune(self.placed / "signals", [self.placed, *callbacks])

    def _take_up(self, state: Mapping[str, Any], trainer: Trainer) -> int:
        self._restored_step = int(state["step"])
        if allowed(trainer) and not torch.equal(state["store"]["sample_ids"], self.store.sample_ids):
            warnings.warn("the pool has other samples, so the selection starts anew", stacklevel=2)
            return int(state["next_epoch"])
        vectors = {}
        if state["vectors"] is not None:
            places = [Path(folder) / "signals" for folder in (state["run"], self.placed) if folder is not None]
            vectors = read_vectors(state["vectors"], str(trainer.ckpt_path), places)
        self.store.load_state_dict({**state["store"], **vectors})
        if state["ledger"] is not None:
            embedding = self.store.pool_view(0).embedding
            self.ledger = SelectionLedger.from_state_dict(state["ledger"], embedding=embedding)
        for name in _KEPT:
            setattr(self, name, state[name])
        self.trained = {"samples": self.trained["groups"], **self.trained}  # checkpoints of 0.1 count groups alone
        for name in _ADDED:
            setattr(self, name, state.get(name, getattr(self, name)))
        self._own = state["ranks"][world()[1] % len(state["ranks"])]
        if isinstance(self._train.loader, ForeignLoader) and self._own["loader"] is not None:
            self._train.loader.load_state_dict(self._own["loader"])  # Lightning does so inside an epoch only
        return int(state["next_epoch"])


def _weights(module: LightningModule) -> str:
    return weights_digest(dict(module.named_parameters()))
