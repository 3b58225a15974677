"""Loss, gradient, advantages and masks equal those of TRL's own trainer on the same tensors."""

import inspect
import os

import pytest
import torch
from torch import Tensor

from minirec_pl.grpo.buffer import RolloutBatch, figures_of
from minirec_pl.grpo.loss import eos_mask, group_advantages, policy_loss
from minirec_pl.policy.language_models.generation import eos_token_ids
from minirec_pl.policy.language_models.tiny import build_tiny, item_tokenizer
from minirec_pl.rewards.calls import combine_rewards

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]
GROUPS, ROLLOUTS, PROMPT, LENGTH, LONGEST = 3, 4, 5, 6, 8
OPTIONS = {
    "defaults": {},
    "clip higher": {"epsilon": 0.1, "epsilon_high": 0.28},
    "two-sided": {"epsilon": 0.1, "delta": 1.3},
    "kl": {"beta": 0.3},
    "plain k3": {"beta": 0.3, "use_bias_correction_kl": False},
    "sequence": {"importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
    "all": {"importance_sampling_level": "sequence", "epsilon": 0.02, "delta": 1.1, "beta": 0.2},
}


@pytest.fixture(scope="module")
def make_trainer(tmp_path_factory):
    """A GRPOTrainer of TRL around a small Llama, by options of GRPOConfig."""
    pytest.importorskip("trl", reason="TRL is not installed: pip install 'minirec-pl[bench]'")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def make(rewards=lambda completions, **_: [0.0] * len(completions), **options):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = build_tiny(sizes, 15)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        model.config._name_or_path = str(folder)  # where TRL loads its reference from
        config = GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            num_generations=ROLLOUTS,
            per_device_train_batch_size=GROUPS * ROLLOUTS,
            max_completion_length=LONGEST,
            temperature=0.7,
            use_cpu=True,
            report_to=[],
            **options,
        )
        prompts = Dataset.from_dict({"prompt": ["<item:0>"] * 12})
        tokenizer = item_tokenizer([str(i) for i in range(12)])
        return GRPOTrainer(model, rewards, config, prompts, None, tokenizer)

    return make


def tensors() -> dict[str, Tensor]:
    """A generation batch as TRL holds it: prompts padded on the left, completions on the right."""
    generator = torch.Generator().manual_seed(3)
    rows = GROUPS * ROLLOUTS
    lengths = torch.randint(1, LENGTH + 1, (rows, 1), generator=generator)
    padding = torch.randint(0, PROMPT - 1, (rows, 1), generator=generator)
    return {
        "prompt_ids": torch.randint(3, 15, (rows, PROMPT), generator=generator),
        "prompt_mask": (torch.arange(PROMPT) >= padding).long(),
        "completion_ids": torch.randint(3, 15, (rows, LENGTH), generator=generator),
        "completion_mask": (torch.arange(LENGTH) < lengths).long(),
        "advantages": torch.randn(rows, generator=generator),
        "noise": 0.3 * torch.randn(2, rows, LENGTH, generator=generator),
    }


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_the_loss_is_that_of_trl(make_trainer, loss_type, options):
    trainer = make_trainer(loss_type=loss_type, **options)
    model, inputs = trainer.model.train().double(), tensors()
    noise, mask = inputs.pop("noise"), inputs["completion_mask"]
    inputs["num_items_in_batch"] = mask.sum()
    tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], mask], dim=1)
    with torch.no_grad():
        sampled, _, _ = trainer._get_per_token_logps_and_entropies(model, tokens, attention, LENGTH)
    inputs["old_per_token_logps"], inputs["ref_per_token_logps"] = sampled + noise[0], sampled + noise[1]
    trainer.current_gradient_accumulation_steps = 1
    theirs = trainer._compute_loss(model, inputs)
    their_gradient = torch.autograd.grad(theirs, list(model.parameters()))

    logps, _, _ = trainer._get_per_token_logps_and_entropies(model, tokens, attention, LENGTH)
    grouped = (GROUPS, ROLLOUTS, LENGTH)
    ours = policy_loss(
        logps.view(grouped),
        inputs["old_per_token_logps"].view(grouped),
        inputs["advantages"].view(grouped[:2]),
        mask.view(grouped),
        ref_logps=inputs["ref_per_token_logps"].view(grouped) if options.get("beta") else None,
        loss_type=loss_type,
        max_completion_length=LONGEST,
        **options,
    )
    assert float(ours.loss.detach()) == pytest.approx(float(theirs.detach()), abs=1e-5)
    our_gradient = torch.autograd.grad(ours.loss, list(model.parameters()))
    for mine, wanted in zip(our_gradient, their_gradient, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=0)
    assert max(float(gradient.abs().max()) for gradient in our_gradient) > 1e-2
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert float(ours.clip_low) == pytest.approx(metrics["clip_ratio/low_mean"], abs=1e-6)
    assert float(ours.clip_high) == pytest.approx(metrics["clip_ratio/high_mean"], abs=1e-6)
    if options.get("beta"):
        assert float(ours.kl) == pytest.approx(metrics["kl"], abs=1e-5)


def first(completions, **columns):
    return [None, 1.0, 0.0, 0.5, 0.25, 0.25, 0.25, 0.25, 1.0, None, 0.0, 2.0]


def second(completions, **columns):
    return [None, None, 0.5, 1.0, None, None, None, None, 0.0, 3.0, None, 1.0]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("mask_truncated", [False, True])
def test_advantages_figures_and_masks_are_those_of_trl(make_trainer, scale, mask_truncated):
    """Also where a reward applies to some completions only, and where none applies to one."""
    weights = [1.0, -0.5]
    options = {"scale_rewards": scale, "mask_truncated_completions": mask_truncated, "reward_weights": weights}
    trainer = make_trainer([first, second], **options)
    (end,) = eos_token_ids(trainer.model)
    assert end in trainer.eos_token_ids
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(end + 1, 15, (GROUPS * ROLLOUTS, LONGEST), generator=generator)
    drawn[::3, 4], drawn[1::3, LONGEST - 1], drawn[6, 0] = end, end, end
    known = eos_mask(drawn, end)
    completions = [row[real].tolist() for row, real in zip(drawn, known, strict=True)]
    rows = len(completions)
    trainer._generate = lambda prompts: ([[3]] * rows, completions, None, ["-"] * rows, None, {}, None, None)
    theirs = trainer._generate_and_score_completions([{"prompt": "<item:0>"}] * rows)

    with pytest.warns(UserWarning, match="no reward of first, second applies to some completions"):
        total, by_name = combine_rewards([first, second], weights, ["-"] * rows, {})
    grouped = (GROUPS, ROLLOUTS)
    rewards, applies = total.nan_to_num(nan=0.0).view(grouped), ~total.isnan().view(grouped)
    ours = group_advantages(rewards, scale_rewards=scale, applies=applies)
    torch.testing.assert_close(ours.flatten(), theirs["advantages"], atol=1e-5, rtol=0)
    mask = eos_mask(drawn, end, mask_truncated_completions=mask_truncated)
    assert torch.equal(mask, theirs["completion_mask"].bool())
    assert int(mask.sum()) == int(theirs["num_items_in_batch"])
    assert bool((mask.sum(dim=1) == 0).any()) == mask_truncated

    batch = RolloutBatch(
        batch={},
        items=torch.zeros(grouped, dtype=torch.int64),
        rewards=rewards,
        applies=applies,
        rewards_by_name={name: values.view(grouped) for name, values in by_name.items()},
        mask=mask.view(*grouped, LONGEST),
        entropy=torch.zeros(*grouped, LONGEST),
        advantages=ours,
        learns=torch.ones(GROUPS, dtype=torch.bool),
        pairs=torch.zeros(GROUPS, dtype=torch.bool),
        texts=drawn.masked_fill(~known, -1).view(*grouped, LONGEST),
        **dict.fromkeys(("target_logps", "target_mask", "old_logps", "ref_logps")),
    )
    figures = figures_of([batch])
    compared = ["reward", "rewards/first/mean", "rewards/second/mean"]
    if scale == "group":
        compared.append("frac_reward_zero_std")
    for name in compared:
        assert float(figures[name]) == pytest.approx(trainer._metrics["train"][name][-1], abs=1e-6), name
    lengths = [len(completion) for completion in completions]
    assert float(figures["completions/mean_length"]) == pytest.approx(sum(lengths) / rows)


def test_options_and_defaults_are_named_as_in_trl(make_trainer):
    from trl import GRPOConfig

    theirs = {name: field.default for name, field in GRPOConfig.__dataclass_fields__.items()}
    for name, parameter in inspect.signature(policy_loss).parameters.items():
        if name in theirs and name != "max_completion_length":
            assert parameter.default == theirs[name], name
