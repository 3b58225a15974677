"""One side of `grpo_step.py --case items` in a process of its own: a few steps of training a generator of item ids.

python benchmarks/item_sides.py '{"side": "expected", "id_tokens": 4, ...}'
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from grpo_models import PeakMemory
from grpo_sides import LEARNING_RATE, now, trl_config

N_ITEMS, CODES, HISTORY = 10_000, 32, 20
SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
SPREAD = {1: 0.2, 4: 0.17}  # of the first weights: about a third of the groups hold a hit and a miss
FIRST = 3  # token of an item id, after those for padding, start and end
ITEM_SIDES = ("expected", "supervised", "sample", "trl")


@dataclasses.dataclass(frozen=True)
class ItemWork:
    """What one process does; the first step warms up and is not reported."""

    side: str
    id_tokens: int
    prompts: int = 32
    generations: int = 16
    steps: int = 5
    threads: int = 2


def item_tokens(work):
    """The ids of the catalogue, int64 [n_items, L]: one token each, or codes of L levels."""
    if work.id_tokens == 1:
        return torch.arange(N_ITEMS)[:, None] + FIRST
    random = torch.Generator().manual_seed(0)
    chosen = torch.randperm(CODES**work.id_tokens, generator=random)[:N_ITEMS]
    levels = [chosen // CODES**level % CODES + FIRST + CODES * level for level in range(work.id_tokens)]
    return torch.stack(levels, dim=1)


def language_model(work):
    """A small Llama whose vocabulary is that of the ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    vocabulary = int(item_tokens(work).max()) + 1
    return LlamaForCausalLM(
        LlamaConfig(
            **SIZES,
            **special,
            initializer_range=SPREAD[work.id_tokens],
            vocab_size=vocabulary,
            tie_word_embeddings=True,
        )
    )


def policy_of(work):
    """The same model as a policy of ours."""
    from minirec_pl.data.samples import Catalogue
    from minirec_pl.policy import GenerativePolicy
    from minirec_pl.policy.folder import StoredPolicy, write_policy

    with tempfile.TemporaryDirectory() as folder:
        stored = StoredPolicy(language_model(work), Catalogue([str(i) for i in range(N_ITEMS)]), item_tokens(work), {})
        stored.model.config.eos_token_id = 2
        write_policy(Path(folder) / "policy", stored)
        return GenerativePolicy(pretrained=f"{folder}/policy")


def batches(work, policy):
    """Batches of each step; a target is what the policy itself recommends, so that groups find theirs now and then."""
    random = torch.Generator().manual_seed(1)
    for _ in range(work.steps + 1):
        histories = [torch.randperm(N_ITEMS, generator=random)[:HISTORY] for _ in range(work.prompts)]
        batch = {"history": torch.stack(histories), "sample_id": torch.arange(work.prompts)}
        batch["seen"] = batch["history"]
        yield {**batch, "target": policy.generate(batch, 1, generator=random).items[:, 0]}


def ours(work):
    """A step of `GRPORecModule` with `rollouts` expected or sample, or of the warm start on the same samples."""
    from minirec_pl import GRPORecModule

    policy = policy_of(work)
    kind = "sample" if work.side == "sample" else "expected"
    module = GRPORecModule(policy, num_generations=work.generations, rollouts=kind)
    module.configure_model()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, fused=True)
    memory, random = PeakMemory(), torch.Generator().manual_seed(0)
    for batch in list(batches(work, policy)):
        memory.start()
        first = now()
        loss, mixed = step_of(module, policy, work, batch, random)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield now() - first, memory.stop(), mixed


def step_of(module, policy, work, batch, random):
    """The loss of one step, and of rollouts the share of groups that hold a hit and a miss."""
    if work.side == "supervised":
        return policy.supervised_loss(batch)[0], None
    groups = torch.tensor(float(work.prompts))
    if work.side == "expected":
        return module.expectation.update(policy, None, batch, groups, 1.0).loss, None
    rollouts = module.sampler.roll_out(batch, random, keep_logps=False)
    module.objective.set_advantages([rollouts])
    shares = torch.tensor([float(rollouts.mask.sum()), float(rollouts.items.numel()), float(work.prompts)])
    return module.objective.update(policy, rollouts, shares, 1.0).loss, float((~rollouts.flat).float().mean())


def trl(work):
    """TRL's GRPOTrainer, whose generation is held to the catalogue; its update is not."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOTrainer

    ids, model = item_tokens(work), language_model(work)
    vocabulary = {f"t{token}": token for token in range(model.config.vocab_size)} | {"<eos>": model.config.vocab_size}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="<eos>", padding_side="left")
    following = {}
    for row in ids.tolist():
        for depth, token in enumerate(row):
            following.setdefault(tuple(row[:depth]), {})[token] = None
    following = {prefix: list(tokens) for prefix, tokens in following.items()}
    length = 1 + HISTORY * work.id_tokens
    generate = model.generate

    def allowed(row, tokens):
        return following[tuple(tokens[length:].tolist())]

    model.generate = lambda *args, **kwargs: generate(*args, prefix_allowed_tokens_fn=allowed, **kwargs)
    rows = [
        {"prompt": " ".join(f"t{token}" for token in [1, *ids[own].flatten().tolist()]), "target": ids[item].tolist()}
        for batch in batches(work, policy_of(work))
        for own, item in zip(batch["history"], batch["target"].tolist(), strict=True)
    ]
    memory, found, hits = PeakMemory(), [], []

    class Steps(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            memory.start()
            self.first = now()

        def on_step_end(self, *args, **kwargs):
            found.append((now() - self.first, memory.stop(), None))

    known = set(map(tuple, ids.tolist()))

    def reward(completion_ids, target, **kwargs):
        assert all(tuple(made) in known for made in completion_ids), "a completion is no item"
        hits.extend(float(list(made) == list(wanted)) for made, wanted in zip(completion_ids, target, strict=True))
        return hits[-len(completion_ids) :]

    with tempfile.TemporaryDirectory() as folder:
        config = trl_config(folder, work, work.id_tokens)
        GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Steps()],
        ).train()
    assert len(hits) == work.prompts * work.generations * (work.steps + 1)
    yield from found


def main():
    work = ItemWork(**json.loads(sys.argv[1]))
    torch.set_num_threads(work.threads)
    made = trl(work) if work.side == "trl" else ours(work)
    steps = [
        {"seconds": seconds, "peak_mb": peak, "mixed": mixed}
        for seconds, peak, mixed in itertools.islice(made, 1, None)
    ]
    print(json.dumps(steps), file=os.fdopen(os.dup(1), "w"))


if __name__ == "__main__":
    main()
