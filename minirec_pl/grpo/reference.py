"""The reference policy of the KL term: a LoRA adapter switched off, or a frozen copy."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from minirec_pl.policy.interface import Policy
from minirec_pl.utils.errors import InputError, check_whole


def frozen_copy(policy: Policy) -> Policy:
    """A copy in evaluation mode that is never trained."""
    return copy.deepcopy(policy).requires_grad_(False).eval()


def is_fresh_lora(policy: nn.Module) -> bool:
    """Whether switching the adapters off gives the policy as it is, so that no copy is needed to come back to it.

    It does where LoRA factors are all that is trained and the second of each pair is still 0, as peft starts them.
    """
    second = [p for name, p in policy.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    return bool(second) and all("lora_" in name for name in trained) and not any(bool(p.any()) for p in second)


@contextmanager
def adapters_off(policy: nn.Module) -> Iterator[None]:
    """The policy without its adapters, which are on again, and trained as before, afterwards."""
    layers: list[Any] = []
    if "peft" in sys.modules:
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [module for module in policy.modules() if isinstance(module, BaseTunerLayer)]
    trained = {parameter: parameter.requires_grad for parameter in policy.parameters()}
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, before in trained.items():
            parameter.requires_grad_(before)


@torch.no_grad()
def mix_into(reference: nn.Module, policy: nn.Module, alpha: float) -> None:
    """Sets every parameter to alpha * policy + (1 - alpha) * reference (TR-DPO, arXiv 2404.09656).

    Args:
        reference: a frozen copy.
        policy: what it is a copy of.
        alpha: share of the policy, from 0 to 1.
    """
    for old, new in zip(reference.parameters(), policy.parameters(), strict=True):
        old.lerp_(new.to(old.dtype), alpha)


def check_sync(beta: float, sync_ref_model: bool, steps: int, alpha: float) -> None:
    """Refuses options of the sync that are out of range.

    Raises:
        InputError: naming the option.
    """
    if sync_ref_model and beta == 0:
        raise InputError("sync_ref_model moves the reference, but beta is 0 and there is none: set beta above 0")
    check_whole(ref_model_sync_steps=steps)
    if steps < 1:
        raise InputError(f"ref_model_sync_steps is {steps}: give a number of optimizer steps of at least 1")
    if not 0 <= alpha <= 1:
        raise InputError(f"ref_model_mixup_alpha is {alpha}: it is the policy's share, from 0 to 1")
