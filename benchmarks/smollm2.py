"""What a retrieval policy on SmolLM2-135M-Instruct in bfloat16 costs: encoding all items once, and a step of RecPO.

    minirec fetch ml-100k
    minirec fetch smollm2-135m
    python benchmarks/smollm2.py --json smollm2.json

MovieLens-100K; 4 prompts x 4 rollouts x 32 tokens a step, LoRA of rank 8. The first step is left out. Memory is the
most that the process had resident, model and data included.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from measuring import GIB, machine, peak_memory

from minirec_pl import GRPORecModule, RecDataModule
from minirec_pl.policy import LanguageModel, Lora, RetrievalPolicy


class StepSeconds(Callback):
    """The time from the start of each step, its rollouts included, to its end."""

    def __init__(self):
        self.seconds, self.prompt_tokens = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seconds.append(time.perf_counter() - self.start)
        self.prompt_tokens += pl_module.policy.encode(batch).mask.sum(dim=1).tolist()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file to write the figures to")
    parser.add_argument("--data", default="data", help="folder of `minirec fetch ml-100k`")
    parser.add_argument("--model", default="models/smollm2-135m", help="folder of `minirec fetch smollm2-135m`")
    parser.add_argument("--steps", type=int, default=4, help="steps, the first of which is left out")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    seed_everything(42)
    found = {"machine": machine(), "threads": options.threads}
    data = RecDataModule(path=options.data, history_window=8, batch_size=4, pool_samples=4 * options.steps)
    policy = RetrievalPolicy(
        LanguageModel(options.model, "bfloat16", Lora(r=8, alpha=16, dropout=0.0)), max_completion_length=32
    )
    data.prepare_data()
    data.setup("fit")
    policy.bind(data.catalogue)
    start = time.perf_counter()
    found["encoded_tokens"] = policy.refresh_items()
    found |= {"items": len(data.catalogue), "encoding_seconds": round(time.perf_counter() - start, 2)}
    module = GRPORecModule(policy, num_generations=4, top_k=50)
    timer = StepSeconds()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=options.steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[timer],
    )
    trainer.fit(module, datamodule=data)
    found |= {
        "prompt_tokens": round(statistics.mean(timer.prompt_tokens), 1),
        "step_seconds": [round(seconds, 2) for seconds in timer.seconds[1:]],
        "peak_gib": round(peak_memory() / GIB, 2),
    }
    options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
