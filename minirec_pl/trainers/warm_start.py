"""The supervised stage: next-item training of the proxy policy that GRPO starts from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from minirec_pl.policy.interface import Policy, SupervisedLoss
from minirec_pl.policy.returned import returned
from minirec_pl.trainers.recommender import EVALUATION_K, RecModule
from minirec_pl.utils.errors import InputError


class WarmStartModule(RecModule):
    """Supervised next-item training, every position of a sequence at once: the proxy policy that GRPO starts from.

    Takes the batches of `RecDataModule(train_on="warm")`, or single samples, as a RetrievalPolicy does. Logs
    `train/loss`, the mean negative log-likelihood in nats.

    Args:
        policy: the recommender to train.
        dropout: probability of dropping a value of the input embeddings and of the last hidden states, in training
            only; for ids of one token.
        optimizer: makes the optimizer from the trainable parameters.
        lr_scheduler: makes a scheduler, stepped once per optimizer step; None keeps the rate constant.
        predict_k: length of the lists of `predict`, at least 1.

    Raises:
        InputError: if `dropout` is outside [0, 1).
    """

    training_phase = "warm_start"

    def __init__(
        self,
        policy: Policy,
        dropout: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        predict_k: int = EVALUATION_K,
    ) -> None:
        super().__init__(policy, optimizer, lr_scheduler, predict_k)
        if not 0.0 <= dropout < 1.0:
            raise InputError(f"dropout is {dropout}: it is a probability, from 0 to below 1")
        self.dropout = dropout

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of the next item: at every position that has one, or of each sample's target."""
        found = self.policy.warm_start_loss(batch, self.dropout, self.trainer.global_step)
        loss, tokens, forward = returned(found, SupervisedLoss, self.policy, "warm_start_loss", loss=())
        self.cost.add(self.training_phase, forward=tokens + forward, backward=tokens)
        self.log("train/loss", loss, on_step=True, on_epoch=False, batch_size=len(batch["target"]))
        return loss
