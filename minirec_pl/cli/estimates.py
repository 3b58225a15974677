"""What a run will need, before it starts: bytes of a model that has no storage yet, rollouts and tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from minirec_pl.policy.language_models.model_config import text_config

_HIDDEN_VALUES, _FEED_FORWARD_VALUES = 10, 3  # kept of a token in a layer, in widths of the layer and of its MLP


@dataclass(frozen=True)
class Load:
    """The sizes of one run.

    Attributes:
        pool: samples that may be trained on.
        selected: samples per epoch.
        epochs: of GRPO.
        num_generations: G.
        scoring_generations: rollouts of a scored sample.
        rescored: samples that are scored again after an epoch.
        scored: samples that are scored before the first epoch.
        prompt: tokens of a prompt.
        completion: tokens of a completion at most.
        batch_size: prompts per training batch.
        generated_at_once: prompts that rollouts are made for at once.
        checkpointing: layers are recomputed in the backward pass.
        items: rows of the table of item vectors; 0 without one.
    """

    pool: int
    selected: int
    epochs: int
    num_generations: int
    scoring_generations: int
    rescored: int
    scored: int
    prompt: int
    completion: int
    batch_size: int
    generated_at_once: int
    checkpointing: bool
    items: int = 0

    def rollouts(self) -> dict[str, int]:
        """Bounds the rollouts by phase: `scoring` and `training`."""
        scored = self.scored + self.rescored * (self.epochs - 1)
        return {
            "scoring": scored * self.scoring_generations,
            "training": self.selected * self.epochs * self.num_generations,
        }

    def tokens(self) -> dict[str, int]:
        """Bounds the tokens that are `generated`, and that go `forward` and `backward` besides.

        A prompt goes through the model once for its group to generate and once more to train; every completion once to
        be trained on, and a generated token counts as generated only.
        """
        made = self.rollouts()
        prompts = self.selected * self.epochs
        scored = self.scored + self.rescored * (self.epochs - 1)
        trained = prompts * self.prompt + made["training"] * self.completion
        return {
            "generated": sum(made.values()) * self.completion,
            "forward": (scored + prompts) * self.prompt + trained,
            "backward": trained,
        }


class Memory(NamedTuple):
    """Bytes at the fullest moment, by what they hold."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    cache: int
    items: int


def memory_of(model: Any, load: Load, itemsize: int, reference: bool = False) -> Memory:
    """Estimates the memory of a run, to about a third; what is left out is small beside it or a matter of the device.

    With P parameters of which P_t are trained, layers l of width H and feed-forward width I, b bytes a value,
    T = batch_size (prompt + G completion) tokens of a training batch and S of the prompts that rollouts are made for at
    once:

    * weights: sum of all parameters' bytes, twice with a frozen reference;
    * gradients: bytes of the P_t; optimizer: twice these, the two moments of Adam;
    * activations: l T (10 H + 3 I) b, or with checkpointing l T H b + T (10 H + 3 I) b. Logits exist in tiles of a few
      megabytes and are not counted;
    * cache: 2 l K S b, K the width of all key-value heads; it is gone when activations are made, so that only the
      larger of the two is taken by `peak`;
    * items: a float32 vector of width H for each.

    Args:
        model: of transformers, also inside peft; on any device, the meta device too.
        load: of the run.
        itemsize: b.
        reference: whether a frozen copy of the policy is kept.
    """
    config = text_config(model)
    layers, width = config.num_hidden_layers, config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or width // heads
    key_values = (getattr(config, "num_key_value_heads", None) or heads) * head_width
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    group = load.prompt + load.num_generations * load.completion
    tokens = load.batch_size * group
    one_layer = tokens * (_HIDDEN_VALUES * width + _FEED_FORWARD_VALUES * inner) * itemsize
    kept = layers * tokens * width * itemsize + one_layer if load.checkpointing else layers * one_layer
    return Memory(
        weights=weights * (2 if reference else 1),
        gradients=trained,
        optimizer=2 * trained,
        activations=kept,
        cache=2 * layers * key_values * load.generated_at_once * group * itemsize,
        items=4 * width * load.items,
    )


def peak(memory: Memory) -> int:
    """Sums the bytes at the fullest moment: activations and cache are not there at once."""
    return sum(memory) - min(memory.activations, memory.cache)
