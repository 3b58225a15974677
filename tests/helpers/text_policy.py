"""Retrieval policies with tiny real models and tokenizers, and what they do by definition, in float64."""

import copy
import math

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from minirec_pl.data.samples import Catalogue
from minirec_pl.policy import LanguageModel, Lora, PromptTemplate, RetrievalPolicy
from minirec_pl.policy.prompt import time_ago

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TITLES = [
    "Star Wars",
    "Alien",
    "Heat",
    "Fargo",
    "Toy Story",
    "Babe",
    "Seven",
    "Casino",
    "Jaws",
    "Twister",
    "Big",
    "Aladdin",
]
SIZES = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": False, "use_sliding_window": False},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 64, "final_logit_softcapping": 30.0},
}


def write_model(folder, kind="llama", seed=0, positions=512):
    """A model with a byte-level tokenizer and a ChatML template as an ordinary Hugging Face folder."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(
        ["You recommend items to users. The user's history, oldest first <answer>", *TITLES] * 5, trainer
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    torch.manual_seed(seed)
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **SIZES, **KINDS[kind], **tokens, max_position_embeddings=positions)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def toy_catalogue(count=12):
    titles = [TITLES[i % len(TITLES)] + ("" if i < len(TITLES) else f" {i}") for i in range(count)]
    return Catalogue([f"i{i}" for i in range(count)], titles)


def text_policy(folder, lora=True, catalogue=None, noise=0.3, **options):
    """A bound policy with adapters that do something."""
    torch.manual_seed(3)
    adapters = Lora(r=2, alpha=4, dropout=0.0) if lora else None
    model = LanguageModel(str(folder), dtype="float32", lora=adapters)
    short = PromptTemplate(system="Be brief.", user="{history}\nNext?")
    usual = {"max_completion_length": 6, "similarity_temperature": 0.1, "prompt": short}
    policy = RetrievalPolicy(model, **{**usual, **options})
    policy.bind(toy_catalogue() if catalogue is None else catalogue)
    if lora and noise:
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    parameter.add_(noise * torch.randn(parameter.shape))
    return policy


def toy_batch(rows=4, seed=0, n_items=12):
    """Histories of unequal length with ages and some ratings."""
    random = torch.Generator().manual_seed(seed)
    history = torch.stack([torch.randperm(n_items, generator=random)[:3] for _ in range(rows)])
    target = torch.tensor(
        [next(i for i in range(row, n_items + row) if i % n_items not in history[row]) for row in range(rows)]
    )
    rating = torch.full(history.shape, torch.nan)
    rating[:, 1] = 4.0
    history[1::2, 0] = -1
    return {
        "history": history,
        "history_rating": rating,
        "history_age": torch.tensor([[90_000.0, 7200.0, 30.0]]).expand(rows, -1).clone(),
        "seen": history.clone(),
        "target": target % n_items,
        "sample_id": torch.arange(rows) * 7 + 3,
        "user": torch.arange(rows),
    }


class PlainRetriever:
    """The same policy in float64: one sequence at a time, no cache, no padding."""

    def __init__(self, policy):
        self.policy = policy
        self.model = copy.deepcopy(policy.model).double().eval()
        self.tokenizer = policy.tokenizer
        self.marker = self.tokenizer(policy.text.answer_marker, add_special_tokens=False)["input_ids"]

    def tokens(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, batch, row):
        template, catalogue = self.policy.text.prompt, self.policy.catalogue
        lines = []
        for column, item in enumerate(batch["history"][row].tolist()):
            if item < 0:
                continue
            titles = catalogue.item_ids if catalogue.titles is None else catalogue.titles
            titles = catalogue.item_ids if catalogue.titles is None else catalogue.titles
            line = f"{len(lines) + 1}. {titles[item]}"
            rating = float(batch["history_rating"][row, column]) if "history_rating" in batch else math.nan
            if not math.isnan(rating):
                line += f", rated {rating:g}"
            lines.append(f"{line}, {time_ago(float(batch['history_age'][row, column]))} ago")
        user = template.user.replace("{history}", "\n".join(lines))
        parts = [
            f"<|im_start|>{who}\n{text}<|im_end|>\n" for who, text in (("system", template.system), ("user", user))
        ]
        return self.tokens("".join(parts) + "<|im_start|>assistant\n")

    def causal(self):
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def hidden(self, tokens):
        return self.causal().model(input_ids=torch.tensor([tokens])).last_hidden_state[0]

    def logits(self, tokens):
        return self.causal().lm_head(self.hidden(tokens))

    @staticmethod
    def before_end(text):
        """The reasoning without padding and without the token that ends it."""
        return [token for token in text if token not in (-1, 2)]

    def state(self, batch, row, text):
        return self.hidden([*self.prompt(batch, row), *self.before_end(text), *self.marker])[-1]

    def token_logps(self, batch, row, text, temperature=1.0):
        text = [token for token in text if token >= 0]
        prompt = self.prompt(batch, row)
        logps = (self.logits([*prompt, *text])[len(prompt) - 1 : -1] / temperature).log_softmax(dim=-1)
        return logps[torch.arange(len(text)), torch.tensor(text)]

    def item(self, item):
        text = self.policy.text.item_prompt.replace("{text}", self.policy.catalogue.texts[item])
        state = self.hidden([*self.tokens(text)[: self.policy.text.longest_item], *self.marker])[-1]
        return state / state.norm()

    def target_logp(self, state, target, items):
        """Of the target among the items, each once."""
        items = sorted(set(items))
        user = state / state.norm()
        logits = torch.stack([user @ self.item(item) for item in items]) / self.policy.similarity_temperature
        return logits.log_softmax(dim=0)[items.index(target)]

    def scores(self, state, seen=()):
        user = state / state.norm()
        scores = torch.stack([user @ self.item(item) for item in range(len(self.policy.catalogue))])
        scores = scores / self.policy.similarity_temperature
        scores[[item for item in seen if item >= 0]] = -torch.inf
        return scores

    def greedy(self, batch, row, length):
        text = []
        for _ in range(length):
            text.append(int(self.logits([*self.prompt(batch, row), *text])[-1].argmax()))
            if text[-1] == 2:
                break
        return text
