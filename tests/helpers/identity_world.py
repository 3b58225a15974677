"""A world in which one thing changes: data, language model and options, for what was made before the change."""

from collections import Counter
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from minirec_pl import GRPORecModule, RecDataModule
from minirec_pl.data.samples import Catalogue, SampleTable
from minirec_pl.data.sequence_table import SequenceTable
from minirec_pl.data.sources.assemble import Samples
from minirec_pl.policy import GenerativePolicy, LanguageModel, Lora, PromptTemplate
from minirec_pl.rewards import NDCGReward, hit

from .chat_models import TITLES, chat_folder, chat_tokenizer
from .tiny_config import TINY

N, N_ITEMS = 240, len(TITLES)
TARGET, USER, TIME = "target of a sample", "user of a sample", "time of a sample"
RATING, HISTORY = "rating of a sample", "history of a ready-made sequence"
ORDER, TEXT = "order of the catalogue", "text of an item, where the policy reads it"
SPLIT, POOL = "split", "samples of the pool"
VALIDATION, TEST, WINDOW = "samples of validation", "samples of test", "`history_window`"
PROMPT, TOKENIZER, IDS, BASE = "prompt", "tokenizer", "item ids", "base model"
REWARDS, WEIGHTS, OPTIONS = "rewards", "weights", "other options"
OF_DATA = {
    SPLIT: {"split": (0.8, 0.15, 0.05)},
    POOL: {"pool_samples": None},
    VALIDATION: {"val_samples": 2},
    TEST: {"test_samples": 2},
    WINDOW: {"history_window": 3},
}
IN_WORDS = (TEXT, PROMPT, TOKENIZER, IDS, BASE)
ROW = 150  # of the pool


class Log:
    """A log of 240 interactions, or as many ready-made sequences, in which a thing is changed."""

    changed = ""  # for all logs, as a file on the disk would be
    sequences = False

    def read(self) -> Samples:
        random, changed = np.random.default_rng(0), Log.changed
        users, items = random.integers(0, 12, N), random.integers(0, N_ITEMS, N)
        times, ratings = np.sort(random.integers(0, 10**6, N)).astype(float), random.integers(1, 6, N).astype(float)
        ids, titles = [f"i{i}" for i in range(N_ITEMS)], [f"{t} {i}" for i, t in enumerate(TITLES)]
        histories = [random.permutation(N_ITEMS)[:4] for _ in range(N)]
        if changed == TARGET:
            items[ROW] = (items[ROW] + 1) % N_ITEMS
        elif changed == USER:
            users[ROW] = (users[ROW] + 1) % 12
        elif changed == TIME:
            times[ROW] += 0.25
        elif changed == RATING:
            ratings[ROW] = ratings[ROW] % 5 + 1
        elif changed == HISTORY:
            histories[ROW] = histories[ROW][::-1]
        elif changed == TEXT:
            titles[3] = "Another Title"
        elif changed == ORDER:
            ids[1], ids[2], titles[1], titles[2] = ids[2], ids[1], titles[2], titles[1]
            items = np.select([items == 1, items == 2], [2, 1], items)
        names, catalogue = [f"u{u}" for u in users], Catalogue(ids, titles)
        if Log.sequences:
            table = SequenceTable(names, items, histories, N_ITEMS, timestamps=times)
        else:
            table = SampleTable(names, items, times, N_ITEMS, ratings)
        return Samples(table, catalogue, "log", Counter())


def write_language_model(folder, changed=""):
    """The language model on the disk; the one before is replaced."""
    chat_folder(folder, **({"max_position_embeddings": 512} if changed == BASE else {}))
    if changed == BASE:
        weights = load_file(folder / "model.safetensors")
        save_file(
            {name: 1.5 * value for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"}
        )
    if changed == TOKENIZER:
        change_tokenizer(folder)
    return folder


def change_tokenizer(folder):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content'] +", "message['content'] + '!' +")
    tokenizer.save_pretrained(folder)


class World:
    """Makes data and modules as a config would have them; `changed` names what is not as it was."""

    def __init__(self, folder, words=False):
        self.folder, self.words, self.changed = Path(folder), words, ""
        if words:
            write_language_model(self.folder / "lm")

    def change(self, thing):
        self.changed = Log.changed = thing
        if self.words and thing in (TOKENIZER, BASE):
            write_language_model(self.folder / "lm", thing)

    def data(self):
        usual = {"warm_fraction": 0.5, "history_window": 5, "batch_size": 8, "pool_samples": 30, "seed": 1}
        return RecDataModule(source=Log(), **{**usual, **OF_DATA.get(self.changed, {})})

    def policy(self):
        if not self.words:
            return GenerativePolicy(config=TINY)
        prompt = PromptTemplate(system="Now!" if self.changed == PROMPT else "", user="{history}\nNext?")
        kind = "token" if self.changed == IDS else "title"
        lora = Lora(r=2, alpha=4, dropout=0.0)
        model = LanguageModel(str(self.folder / "lm"), dtype="float32", lora=lora)
        return GenerativePolicy(language_model=model, item_ids=kind, prompt=prompt)

    def module(self, policy=None):
        rewards = [NDCGReward()] if self.changed == REWARDS else [hit]
        generations = 4 if self.changed == OPTIONS else 2
        options = {"num_generations": 2, "scoring_generations": generations, "rewards": rewards}
        return GRPORecModule(self.policy() if policy is None else policy, **options)


def documented(page, heading):
    """The cells of the first table below a line of a page: {(row, column): text}."""
    lines = iter(page.read_text(encoding="utf-8").split(heading, 1)[1].splitlines())
    rows: list[list[str]] = []
    for line in lines:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split(" | ")])
        elif rows:
            break
    names, _, *cells = rows
    return {(row[0], name): text for row in cells for name, text in zip(names[1:], row[1:], strict=True)}
