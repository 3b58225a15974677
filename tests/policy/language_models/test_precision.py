"""Half precision casts weights and inputs of a model, and nothing that is counted, compared or averaged."""

import sys

import pytest
import torch
from helpers.chat_models import chat_folder
from helpers.text_policy import text_policy, write_model
from helpers.tiny_config import TINY
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode

import minirec_pl
import minirec_pl.data.train_loader
from minirec_pl import GRPORecModule, RecDataModule, WarmStartModule
from minirec_pl.callbacks import MiniRec
from minirec_pl.policy import GenerativePolicy, LanguageModel, Lora, PromptTemplate, RetrievalPolicy
from minirec_pl.policy.item_index import ItemIndex
from minirec_pl.policy.semantic_ids import SemanticIds
from minirec_pl.selection import MiniRecSelector
from minirec_pl.selection.session.session import session_of

pytestmark = pytest.mark.filterwarnings("ignore")
PACKAGE = minirec_pl.__path__[0]
PROMPT = PromptTemplate(system="", user="{history}", age="")
LORA = Lora(r=2, alpha=4, dropout=0.0)
CASTS = {"_to_copy", "to", "copy_", "empty_like", "zeros_like", "ones_like", "full_like", "new_zeros", "new_empty"}


class Made(TorchDispatchMode):
    """Notes where the package makes half-precision tensors out of none: there the default dtype decides."""

    def __init__(self):
        super().__init__()
        self.places = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(value)]
        made = [value for value in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(value)]
        half = any(value.dtype == torch.bfloat16 for value in made)
        if half and not any(value.dtype == torch.bfloat16 for value in given):
            asked = (kwargs or {}).get("dtype") == torch.bfloat16 and func.overloadpacket.__name__ in CASTS
            frame = sys._getframe(1)
            while frame is not None and "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            if not asked and frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
                self.places.add((frame.f_code.co_filename.removeprefix(PACKAGE), frame.f_lineno, str(func)))
        return out


class Watch(Callback):
    """Looks at every step in training: what is made there, and of which dtype the results are."""

    def __init__(self):
        self.made, self.dtypes = Made(), {}

    def on_fit_start(self, trainer, pl_module):
        def watched(function, name):
            def call(*args, **kwargs):
                with self.made:
                    result = function(*args, **kwargs)
                loss = result["loss"] if isinstance(result, dict) and "loss" in result else result
                if torch.is_tensor(loss) and loss.is_floating_point():
                    self.dtypes[name] = loss.dtype
                return result

            return call

        for name in ("training_step", "validation_step", "sample_signals"):
            if hasattr(pl_module, name):
                setattr(pl_module, name, watched(getattr(pl_module, name), name))
        pl_module.policy.item_logps = watched(pl_module.policy.item_logps, "item_logps")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return chat_folder(tmp_path_factory.mktemp("chat")), write_model(tmp_path_factory.mktemp("text"))


def build(kind, folders):
    name, _, stage = kind.partition("-")
    chat, text = map(str, folders)
    torch.manual_seed(0)
    if name == "config":
        policy = GenerativePolicy(config=TINY)
    elif name.startswith("retrieval"):
        policy = RetrievalPolicy(
            LanguageModel(text, "float32", LORA if name == "retrieval_lora" else None),
            prompt=PROMPT,
            max_completion_length=2,
            similarity_temperature=0.1,
            cached_negatives=2,
        )
    else:
        model = LanguageModel(chat, "float32", LORA)
        codes = SemanticIds(levels=2, codes=8) if name == "semantic" else None
        policy = GenerativePolicy(language_model=model, item_ids=name, semantic_ids=codes, prompt=PROMPT)

    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=1e-3)

    if stage == "warm":
        return WarmStartModule(policy, optimizer=optimizer)
    options = {"num_generations": 4, "scoring_generations": 2, "beta": 0.1 if name == "config" else 0.0}
    return GRPORecModule(policy, **options, optimizer=optimizer)


def run(kind, folders, toy_path, make_trainer, precision):
    module, watch = build(kind, folders), Watch()
    stage = kind.partition("-")[2]
    data = RecDataModule(
        str(toy_path),
        "toy",
        train_on="pool" if stage == "grpo" else "warm" if kind == "config-warm" else "warm_samples",
        warm_fraction=0.5,
        batch_size=3,
        eval_batch_size=6,
        history_window=2,
        seed=1,
    )
    selector = MiniRecSelector(difficulty="mean", gate=(-1.0, 2.0))
    callbacks = [MiniRec(9, selector=selector, score_fraction=0.2)] if stage == "grpo" else []
    trainer = make_trainer(
        precision=precision,
        callbacks=[*callbacks, watch],
        max_epochs=1,
        limit_train_batches=2,
        accumulate_grad_batches=2,
        limit_val_batches=1,
        limit_test_batches=1,
    )
    trainer.fit(module, data)
    figures = {**trainer.callback_metrics, **trainer.validate(module, data, verbose=False)[0]}
    figures |= trainer.test(module, data, verbose=False)[0]
    batch = next(iter(data.val_dataloader()))
    logps = module.policy.eval().item_logps(batch)
    signals = session_of(trainer).store.read(session_of(trainer).store.sample_ids) if callbacks else None
    return module, watch, figures, logps, signals


QUICK = ["config-grpo", "config-warm"]
SLOW = ["title-grpo", "semantic-grpo", "token-grpo", "token-warm", "retrieval-grpo", "retrieval_lora-grpo"]
SLOW += ["retrieval-warm", "retrieval_lora-warm"]


@pytest.mark.parametrize("kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def test_every_module_runs_and_comes_close_to_float32(kind, folders, toy_path, make_trainer):
    _, _, wanted, exact, signals = run(kind, folders, toy_path, make_trainer, "32-true")
    for precision in ("bf16-true", "bf16-mixed"):
        module, watch, figures, logps, near = run(kind, folders, toy_path, make_trainer, precision)
        weights = {p.dtype for p in module.policy.parameters()}
        assert weights == ({torch.bfloat16} if precision == "bf16-true" else {torch.float32})
        assert precision == "bf16-mixed" or watch.made.places == set()  # autocast makes them in linear layers
        assert watch.dtypes["training_step"] in (torch.float32, torch.float64)
        assert watch.dtypes["item_logps"] == logps.dtype == torch.float32
        open_items = (exact > -1e30) & (logps > -1e30)
        assert torch.equal(exact > -1e30, logps > -1e30)
        assert (logps - exact)[open_items].abs().max() < 0.35
        assert figures.keys() == wanted.keys()
        for name in ("val/mrr", "test/mrr", "val/ndcg@10", "test/ndcg@10"):
            assert figures[name] == pytest.approx(float(wanted[name]), abs=0.15)
        if signals is not None:
            assert near.reward_mean.dtype == torch.float64
            assert near.gradient.dtype == near.embedding.dtype == torch.float32
            cosine = torch.nn.functional.cosine_similarity(near.embedding, signals.embedding)
            assert cosine[near.embedding.any(dim=1)].min() > 0.98
        for buffer in module.policy.buffers():
            assert buffer.dtype != torch.bfloat16


def test_ages_and_ratings_reach_the_prompt_unrounded(folders, toy_path, make_trainer):
    seen = []

    class Batches(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch)

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch)

    data = RecDataModule(str(toy_path), "toy", warm_fraction=0.5, batch_size=4, seed=1)
    options = {"precision": "bf16-true", "max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1}
    make_trainer(callbacks=[Batches()], **options).fit(build("config-grpo", folders), data)
    assert len(seen) == 2
    for batch in seen:
        assert batch["history_age"].dtype == batch["history_rating"].dtype == torch.float32
    ages = seen[0]["history_age"]
    assert not torch.equal(ages, ages.bfloat16().float())


def test_a_foreign_batch_is_still_converted(make_trainer):
    trainer = make_trainer(precision="bf16-true")
    minirec_pl.data.train_loader.keep_columns(trainer)
    convert = trainer.precision_plugin.convert_input
    assert convert({"x": torch.zeros(1)})["x"].dtype == convert([torch.zeros(1)])[0].dtype == torch.bfloat16
    assert convert({"history": torch.zeros(1, 1).long(), "history_age": torch.zeros(1)})["history_age"].dtype == (
        torch.float32
    )


@pytest.mark.parametrize("item_dtype", ["float32", "bfloat16"])
def test_a_cast_leaves_counters_and_item_vectors_alone(tmp_path, item_dtype):
    policy = text_policy(write_model(tmp_path), item_dtype=item_dtype)
    policy.refresh_items(5)
    index = policy.index
    before = {name: value.clone() for name, value in index.named_buffers()}
    frequencies = [value.clone() for value in policy.buffers()]
    for cast in (
        lambda module: module.to(torch.bfloat16),
        lambda module: module.half(),
        lambda module: module.double(),
    ):
        cast(policy)
        for name, value in index.named_buffers():
            assert value.dtype == before[name].dtype
            assert torch.equal(value, before[name])
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(policy.buffers(), frequencies, strict=True))
    assert {p.dtype for p in policy.parameters()} == {torch.float64}
    moved = ItemIndex([[1], [2, 3]], 4, torch.bfloat16, 0).to("meta", torch.float32)
    assert [(v.device.type, v.dtype) for v in moved.buffers()] == [
        ("meta", torch.bfloat16),
        ("meta", torch.int64),
        ("meta", torch.float64),
    ]
