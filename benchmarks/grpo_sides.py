"""One side of the comparison in a process of its own: trains a few steps, prints seconds and peak memory of each.

python benchmarks/grpo_sides.py '{"side": "ours", "model": "llama-20m", "prompts": 4, ...}'
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections import defaultdict

import torch
from grpo_models import MODELS, VOCABULARY, PeakMemory, prompts, rewards_of

LEARNING_RATE = 1e-5
MICRO_BATCH_TOKENS = 2048
"""Ours runs backward for so many tokens at a time, prompts and completions together; one prompt at least."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What one process does; the first step warms up and is not reported."""

    side: str
    model: str = "llama-20m"
    prompts: int = 4
    generations: int = 8
    prompt_length: int = 125
    completion_length: int = 32
    steps: int = 3
    threads: int = 2
    device: str = "cpu"


def ours(work):
    """GRPO as a plain loop of library functions; phases are timed on the way."""
    from minirec_pl.grpo.loss import group_advantages, policy_loss
    from minirec_pl.policy.language_models.generation import generate
    from minirec_pl.policy.language_models.logps import completion_logps

    model = MODELS[work.model]().to(work.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    memory, clock = PeakMemory(work.device), Clock(model)
    tokens_per_prompt = work.prompt_length + work.generations * work.completion_length
    micro_batch = max(1, MICRO_BATCH_TOKENS // tokens_per_prompt)
    random = torch.Generator(work.device).manual_seed(0)
    for batch in prompts(work, work.steps + 1):
        memory.start()
        clock.start()
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in batch], device=work.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=work.device)
        made = generate(model, ids, mask, work.generations, work.completion_length, generator=random)
        clock.lap("decode")
        rewards = torch.tensor(rewards_of(made.ids.flatten(0, 1).tolist()), device=work.device).view(work.prompts, -1)
        advantages, n_tokens = group_advantages(rewards), made.mask.sum()
        clock.lap("rewards")
        for start in range(0, work.prompts, micro_batch):
            rows = slice(start, start + micro_batch)
            logps, _ = completion_logps(model, ids[rows], mask[rows], made.ids[rows], made.mask[rows])
            given = {"loss_type": "dapo", "num_items": n_tokens}
            loss = policy_loss(logps, logps.detach(), advantages[rows], made.mask[rows], **given).loss
            clock.lap("log-probabilities")
            loss.backward()
            del logps, loss
            clock.lap("backward")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.lap("optimizer")
        yield clock.stop(), memory.stop(), clock.phases, made.mask.sum().item()


def now():
    """Seconds on a clock, once the GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """Seconds of a step by phase; forwards of more than one token without gradient are the prefill."""

    def __init__(self, model):
        body = model.base_model
        body.register_forward_pre_hook(self._before, with_kwargs=True)
        body.register_forward_hook(self._after, with_kwargs=True)

    def _before(self, module, args, kwargs):
        self.entered = now()

    def _after(self, module, args, kwargs, output):
        if not torch.is_grad_enabled() and kwargs["input_ids"].shape[1] > 1:
            seconds = now() - self.entered
            self.phases["prefill"] += seconds
            self.last += seconds

    def start(self):
        self.phases = defaultdict(float)
        self.first = self.last = now()

    def lap(self, phase):
        at = now()
        self.phases[phase] += at - self.last
        self.last = at

    def stop(self):
        return now() - self.first


def trl_config(folder, work, completion_length, cpu=True):
    """TRL's options for a step on `work.prompts` groups of `work.generations` completions."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=work.prompts * work.generations,
        num_generations=work.generations,
        max_completion_length=completion_length,
        max_steps=work.steps + 1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        loss_type="dapo",
        beta=0.0,
        temperature=1.0,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=cpu,
        shuffle_dataset=False,
        report_to=[],
        save_strategy="no",
        logging_steps=10**6,
        disable_tqdm=True,
    )


def trl(work):
    """TRL's GRPOTrainer on its transformers path, the same tokens, sizes and optimizer."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOTrainer

    # The end-of-sequence id lies beyond the model's vocabulary, so that no completion ends early.
    vocabulary = {f"t{token}": token for token in range(VOCABULARY)} | {"<eos>": VOCABULARY}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t0", eos_token="<eos>", padding_side="left", truncation_side="left"
    )
    texts = [" ".join(f"t{token}" for token in row) for batch in prompts(work, work.steps + 1) for row in batch]
    memory, found = PeakMemory(work.device), []

    class Steps(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            memory.start()
            self.first = now()

        def on_step_end(self, *args, **kwargs):
            found.append((now() - self.first, memory.stop()))

    lengths = []

    def reward(completion_ids, **kwargs):
        lengths.append(sum(map(len, completion_ids)))
        return rewards_of(completion_ids)

    with tempfile.TemporaryDirectory() as folder:
        config = trl_config(folder, work, work.completion_length, cpu=work.device == "cpu")
        GRPOTrainer(
            model=MODELS[work.model](),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            callbacks=[Steps()],
        ).train()
    for (seconds, peak), tokens in zip(found, lengths, strict=True):
        yield seconds, peak, {}, tokens


def main():
    work = Work(**json.loads(sys.argv[1]))
    torch.set_num_threads(work.threads)
    steps = []
    for seconds, peak, phases, tokens in {"ours": ours, "trl": trl}[work.side](work):
        full = work.prompts * work.generations * work.completion_length
        assert tokens == full, f"{tokens} tokens were generated and {full} expected: a completion ended early"
        steps.append({"seconds": seconds, "peak_mb": peak, "phases": phases})
    print(json.dumps(steps[1:]), file=os.fdopen(os.dup(1), "w"))


if __name__ == "__main__":
    main()
