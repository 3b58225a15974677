"""Small stand-ins of pretrained chat models: architectures of real ones, a tokenizer that is trained here."""

import functools

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from minirec_pl.data.samples import Catalogue
from minirec_pl.policy import GenerativePolicy, LanguageModel, Lora
from minirec_pl.policy.prompt import PromptTemplate

from .plain_policy import PlainPolicy, shaken
from .tiny_llm import KINDS, SIZES

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
TITLES = [
    "Toy Story", "GoldenEye", "Four Rooms", "Get Shorty", "Toy Story", "Copycat", "Babe: Pig in the City", "Babe",
    "Dead Man Walking", "Richard III", "Seven", "Toy Story (2)", "Mighty Aphrodite", "Postino, Il", "Toy Story",
]  # fmt: skip
CATALOGUE = Catalogue([f"i{i}" for i in range(len(TITLES))], TITLES)
PROMPT = PromptTemplate(system="Recommend.", user="Seen:\n{history}\nNext?")
LORA = Lora(r=4, alpha=128, dropout=0.0)


@functools.cache
def _trained():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TITLES, "system user assistant Recommend. Seen: Next? days ago rated"], trainer)
    return tokenizer.to_str()


def chat_tokenizer(template=CHATML, **options):
    tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **options}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_trained()), **tokens)
    tokenizer.chat_template = template
    return tokenizer


def chat_folder(folder, kind="llama", template=CHATML, vocabulary=None, **options):
    """A model's folder, float32; its weights are far from zero."""
    torch.manual_seed(0)
    tokenizer = chat_tokenizer(template)
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": vocabulary or len(tokenizer)}
    config = {**SIZES, **KINDS[kind], "max_position_embeddings": 256, **tokens, **options}
    model = shaken(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chat_policy(folder, kind="llama", item_ids="title", dtype="float32", lora=LORA, checkpointing=False, **options):
    """A policy on such a model, bound to `CATALOGUE`, its adapters away from their zeros."""
    name = str(folder if (folder / "config.json").is_file() else chat_folder(folder, kind))
    language_model = LanguageModel(name, dtype, lora, checkpointing)
    policy = GenerativePolicy(language_model=language_model, item_ids=item_ids, **{"prompt": PROMPT, **options})
    torch.manual_seed(1)
    policy.bind(CATALOGUE)
    return shaken_adapters(policy, 0.02, seed=2)


def shaken_adapters(model, size=0.05, seed=3):
    """The model with adapters that are not as they begin."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "trainable_tokens" in name:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


class PlainChat(PlainPolicy):
    """The same policy in float64, one sample at a time, without a cache."""

    def __init__(self, policy):
        super().__init__(policy)
        self.chat = policy.chat

    def prompt(self, history):
        batch = {"history": torch.tensor([history], dtype=torch.int64)}
        return (
            self.chat.prompt.encode(self.chat.tokenizer, batch, CATALOGUE, ids=self.chat.id_texts).input_ids[0].tolist()
        )
