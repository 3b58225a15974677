"""What every recommender module shares: the policy, full-ranking evaluation, prediction and cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import MetricCollection

from minirec_pl.data.train_loader import keep_columns
from minirec_pl.grpo.buffer import take_rows
from minirec_pl.metrics.ranking import MRR, NDCG, Coverage, HitRate, SampleRanks, target_rank, top_items
from minirec_pl.policy.interface import Policy
from minirec_pl.policy.returned import item_logps
from minirec_pl.selection.session.identity import allowed
from minirec_pl.selection.session.resume import RUNNING_KEY
from minirec_pl.selection.session.session import session_of
from minirec_pl.trainers.policy_data import data_of_policy, tell_of_other_data
from minirec_pl.utils.checkpoints import (
    keep_frozen,
    leave_out_copies,
    put_back_copies,
    weights_digest,
    weights_under_adapters,
)
from minirec_pl.utils.cost import Cost, Phase
from minirec_pl.utils.errors import InputError, check_whole
from minirec_pl.utils.identity import Identity
from minirec_pl.utils.protocols import what_it_lacks

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

    from minirec_pl.data.samples import Catalogue

EVALUATION_K = 10
_SCORES = 2**24  # at a time


class RecModule(LightningModule):
    """What both stages share: the policy, full-ranking evaluation with the user's history masked, and cost.

    Args:
        policy: the recommender; bound to the DataModule's catalogue before the first step.
        optimizer: makes the optimizer from the trainable parameters.
        lr_scheduler: makes a scheduler, stepped once per optimizer step; None keeps the rate constant.
        predict_k: length of the lists of `predict`, at least 1.

    Attributes:
        val_ranks: int64 [n, 2], sample_id and rank of the target of each sample of the last validation.
        test_ranks: int64 [n, 2], of the last test.
        mask_seen: leave what the user knows out of the lists of `predict`.
        candidates: bool [n_items], what may be in the lists of `predict`; None for all items.
        keep_reasoning: let `predict` return the text that a recommendation rests on.
    """

    training_phase: Phase
    val_ranks: Tensor
    test_ranks: Tensor

    def __init__(
        self,
        policy: Policy,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        predict_k: int = EVALUATION_K,
    ) -> None:
        super().__init__()
        if isinstance(policy, type):
            raise InputError(f"policy is the class {policy.__name__}: give an object of it, {policy.__name__}(...)")
        if (wrong := what_it_lacks(type(policy), type(policy).__name__, Policy)) is not None:
            raise InputError(f"policy: {wrong}")
        check_whole(predict_k=predict_k)
        if predict_k < 1:
            raise InputError(f"predict_k is {predict_k}: a list of recommendations has at least one item")
        self.policy = policy
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.predict_k = predict_k
        self.mask_seen = True
        self.candidates: Tensor | None = None
        self.keep_reasoning = False
        self.cost = Cost()
        self.cost.include(policy.training_cost)
        self._adapted_digest = ""
        self._clock = time.perf_counter()

    @property
    def identity(self) -> Identity:
        """What its checkpoints are made for besides the data."""
        return Identity.of([Identity({"module": type(self).__name__}), self.policy.identity])

    def _keep_frozen(self) -> None:
        keep_frozen(self.trainer.callbacks, self)  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        """Binds the policy to the catalogue of the DataModule, builds the metrics and keeps batches unrounded."""
        if self._trainer is not None:
            keep_columns(self.trainer)
        catalogue: Catalogue | None = getattr(getattr(self._trainer, "datamodule", None), "catalogue", None)
        if catalogue is not None:
            self.policy.bind(catalogue)
            if self.policy.catalogue is None:
                raise InputError(f"{type(self.policy).__name__}.bind left `catalogue` None: set self.catalogue in it")
            tell_of_other_data(self.trainer, self.policy, self.trainer.datamodule)  # type: ignore[attr-defined]
        if self.policy.catalogue is None:
            raise InputError(
                "the policy has no catalogue: fit with a RecDataModule, or call policy.bind(catalogue) first"
            )
        if not hasattr(self, "metrics"):
            self.metrics = MetricCollection(
                {
                    f"hit_rate@{EVALUATION_K}": HitRate(EVALUATION_K),
                    f"ndcg@{EVALUATION_K}": NDCG(EVALUATION_K),
                    "mrr": MRR(),
                }
            )
            self.sample_ranks = SampleRanks()
            self.coverage = Coverage(EVALUATION_K, len(self.policy.catalogue))
            self.item_ids = np.asarray(self.policy.catalogue.item_ids, dtype=object)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, and the scheduler if there is one, stepped per optimizer step."""
        optimizer = self.optimizer([p for p in self.policy.parameters() if p.requires_grad])
        if self.lr_scheduler is None:
            return optimizer
        scheduler: Any = {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _evaluate(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The rank of each target, int64 [B]."""
        ranks = []
        for part in self._portions(batch):
            scores = item_logps(self.policy, part)
            ranks.append(target_rank(scores, part["target"], part["seen"]))
            self.coverage.update(top_items(scores, EVALUATION_K, part["seen"]))
        self.metrics.update(torch.cat(ranks), batch["sample_id"])
        return torch.cat(ranks)

    def _portions(self, batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Parts of a batch whose scores of the whole catalogue stay below 64 MiB."""
        size = max(1, _SCORES // len(self.item_ids))
        for rows in torch.split(torch.arange(len(batch["sample_id"]), device=batch["sample_id"].device), size):
            yield take_rows(batch, rows)

    def _log_evaluation(self, stage: str) -> Tensor:
        """Logs the figures of a part and returns the rank of each sample."""
        values = {**self.metrics.compute(), f"coverage@{EVALUATION_K}": self.coverage.compute()}
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, prog_bar=stage == "val")
        ranks: Tensor = self.sample_ranks.compute().cpu()
        # States made in inference mode could not be updated by a later fit, which validates without it.
        with torch.inference_mode(False):
            self.metrics.reset()
            self.coverage.reset()
            self.sample_ranks.reset()
        return ranks

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Ranks the whole catalogue for each sample."""
        self.sample_ranks.update(self._evaluate(batch), batch["sample_id"])

    def on_validation_epoch_end(self) -> None:
        """Logs `val/ndcg@10`, `val/hit_rate@10`, `val/mrr` and `val/coverage@10`, and keeps `val_ranks`."""
        self.val_ranks = self._log_evaluation("val")

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Ranks the whole catalogue for each sample."""
        self.sample_ranks.update(self._evaluate(batch), batch["sample_id"])

    def on_test_epoch_end(self) -> None:
        """Logs the same metrics as validation, with the prefix `test/`, and keeps `test_ranks`."""
        self.test_ranks = self._log_evaluation("test")

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """The best `predict_k` items of each sample, see `mask_seen` and `candidates`.

        Returns:
            `sample_id` [B], `user` [B], `items` [B, k] item index, -1 where none is left, and `scores` [B, k]; with
            `keep_reasoning`, `reasoning`, a list of B texts.
        """
        if not self.mask_seen:
            batch = {**batch, "seen": batch["seen"].new_full((len(batch["seen"]), 1), -1)}
        parts = [self._recommend(part) for part in self._portions(batch)]
        found: dict[str, Any] = {name: torch.cat([part[name] for part in parts]) for name in ("items", "scores")}
        if self.keep_reasoning:
            found["reasoning"] = [text for part in parts for text in part["reasoning"]]
        return {"sample_id": batch["sample_id"], "user": batch["user"], **found}

    def _recommend(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.keep_reasoning:
            scores, found["reasoning"] = self.policy.reasoned_item_logps(batch)
        else:
            scores = item_logps(self.policy, batch)
        if self.candidates is not None:
            scores = scores.masked_fill(~self.candidates.to(scores.device), -torch.inf)
        items = top_items(scores, self.predict_k, batch["seen"])
        return {**found, "items": items, "scores": scores.gather(1, items.clamp(min=0))}

    def on_train_start(self) -> None:
        """Puts back what a checkpoint was taken in the middle of, and starts the clock of the training phase."""
        session_of(self.trainer).identity.check_loader(self.trainer, self.trainer.train_dataloader)
        self.policy.made_for = data_of_policy(self.trainer, self.policy)
        running = session_of(self.trainer).running
        running.start(self.trainer, self)
        if running.validation_left_out:
            self._pass_over_validation()
            running.validation_left_out = False
        self._clock = time.perf_counter()

    def _pass_over_validation(self) -> None:
        """Has the policy do what it would have done in a validation that the resumed run leaves out."""
        averaged = any(isinstance(c, WeightAveraging) for c in self.trainer.callbacks)  # type: ignore[attr-defined]
        if not averaged:  # a validation leaves other weights' items alone
            self.policy.refresh_items()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """The first batch of a resumed run starts with the random numbers it would have had."""
        session_of(self.trainer).running.begin_batch(self.trainer)

    def on_before_backward(self, loss: Tensor) -> None:
        """Keeps what a checkpoint taken during the backward pass needs."""
        session_of(self.trainer).running.before_backward(self.trainer, self)

    def on_train_epoch_start(self) -> None:
        """Starts the clock of the training phase."""
        self._clock = time.perf_counter()

    def on_validation_start(self) -> None:
        """Books the training time so far, so that validation is not counted as training; see `on_train_epoch_end`."""
        session_of(self.trainer).running.begin_validation(self.trainer)
        self._keep_frozen()
        self._book_training_time()

    def on_validation_end(self) -> None:
        """Restarts the clock of the training phase."""
        self._clock = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Books the time since the last batch, waiting for data included."""
        session_of(self.trainer).running.end_batch()
        self._book_training_time()

    def on_train_epoch_end(self) -> None:
        """Sees to it that an average of the weights leaves frozen ones as they are."""
        self._keep_frozen()

    def _book_training_time(self) -> None:
        now = time.perf_counter()
        if self._trainer is not None and not self.trainer.sanity_checking and self.trainer.state.fn == "fit":
            self.cost.add(self.training_phase, seconds=now - self._clock)
        self._clock = now

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the cost so far, so that a resumed run states the sum, and which catalogue the weights belong to.

        Random numbers and the gradients of an accumulation come along, so that a resumed run ends as one that was
        never stopped, wherever the checkpoint was taken.

        Weights under LoRA adapters are left out, unless a strategy spreads them over ranks; a digest tells whether a
        model has the same. So are their copies in what callbacks have put into the checkpoint, or in a reference.
        """
        checkpoint["cost"] = self.cost.state_dict()
        session_of(self.trainer).running.save(self.trainer, self, checkpoint)
        session_of(self.trainer).identity.save(self.trainer, self, checkpoint)
        fixed = weights_under_adapters(self.policy)
        if fixed and {f"policy.{name}" for name in fixed} <= checkpoint["state_dict"].keys():
            self._keep_frozen()
            checkpoint["under_adapters"] = self._adapted_digest = self._adapted_digest or self._digest(fixed)
            checkpoint["copies_left_out"] = leave_out_copies(checkpoint, fixed)
        if self.policy.catalogue is not None:
            checkpoint["catalogue"] = self.policy.catalogue.fingerprint

    @staticmethod
    def _digest(fixed: Mapping[str, Tensor]) -> str:
        return weights_digest({f"policy.{name}": value for name, value in fixed.items()})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint fits policy and catalogue, then restores the cost.

        Raises:
            InputError: if it has weights of other names, shapes or dtypes than the module, adapters of another model,
                or if it was made for other data, and `allow_changed_data` of the Trainer is not set.
        """
        if self._trainer is not None:
            session_of(self.trainer).identity.load(self.trainer, self, checkpoint)
        if "under_adapters" in checkpoint:
            fixed = weights_under_adapters(self.policy)
            self._adapted_digest = self._digest(fixed)
            if checkpoint["under_adapters"] != self._adapted_digest:
                raise InputError(
                    "the checkpoint has adapters for a model with other weights: use the model and dtype it was "
                    "trained with"
                )
            in_policy = [{"at": ["state_dict"], "names": {f"policy.{name}": name for name in fixed}}]
            put_back_copies(checkpoint, fixed, checkpoint.get("copies_left_out", in_policy))
        own, stored = self.state_dict(), checkpoint["state_dict"]
        for name in sorted(own.keys() ^ stored.keys()) if self.strict_loading else ():
            raise InputError(
                f"the checkpoint does not fit: '{name}' is only {'in the checkpoint' if name in stored else 'here'}; "
                "use the adapters, the model and the beta it was trained with"
            )
        for name, value in stored.items():
            mine = own.get(name, value)
            if mine.shape != value.shape or mine.dtype != value.dtype:
                there, here = (f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (value, mine))
                raise InputError(
                    f"the checkpoint does not fit: '{name}' is {there} there and {here} here; it was trained for "
                    "another catalogue, model or dtype, so use the data and config it was trained with"
                )
        catalogue = None if self._trainer is not None and allowed(self.trainer) else self.policy.catalogue
        if catalogue is not None and checkpoint.get("catalogue", catalogue.fingerprint) != catalogue.fingerprint:
            raise InputError(
                "the checkpoint was trained on another catalogue with as many items, or on the same items in another "
                "order: use the data it was trained with"
            )
        if RUNNING_KEY in checkpoint and self._trainer is not None and self.trainer.state.fn == "fit":
            session_of(self.trainer).running.load(checkpoint[RUNNING_KEY])
        if "cost" in checkpoint:
            self.cost.load_state_dict(checkpoint["cost"])
