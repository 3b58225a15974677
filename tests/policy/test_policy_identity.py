"""A policy folder and what it was made with: its tokenizer, the model under its adapters, its texts, its data."""

import json
import warnings

import pytest
from helpers.text_policy import text_policy, toy_catalogue, write_model
from safetensors.torch import load_file, save_file

from minirec_pl import GRPORecModule
from minirec_pl.data.samples import Catalogue
from minirec_pl.policy import GenerativePolicy, RetrievalPolicy
from minirec_pl.utils.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path / "model")
    text_policy(tmp_path / "model").save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def test_a_retriever_whose_base_model_was_replaced_is_refused(folder):
    path = folder.parent / "model" / "model.safetensors"
    weights = load_file(path)
    save_file({name: value + 0.1 for name, value in weights.items()}, path, {"format": "pt"})
    with pytest.raises(InputError, match="the model under its adapters is not the one that it was trained with"):
        RetrievalPolicy(pretrained=str(folder))
    save_file(weights, path, {"format": "pt"})
    RetrievalPolicy(pretrained=str(folder))


def test_a_retriever_whose_tokenizer_was_replaced_is_refused(folder):
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>assistant", "<|im_start|>Assistant"))
    with pytest.raises(InputError, match="its tokenizer is not the one that it was trained with: put that back"):
        RetrievalPolicy(pretrained=str(folder))


def test_other_texts_of_a_retriever_are_listed(folder):
    with pytest.warns(UserWarning, match=r"goes on with another item_prompt \('Item \{text\}', before '\{text\}'\)"):
        policy = RetrievalPolicy(pretrained=str(folder), item_prompt="Item {text}")
    assert policy.identity.facts["item_prompt"] == "Item {text}"


def test_using_a_tokenizer_does_not_change_what_it_is(folder):
    policy = RetrievalPolicy(pretrained=str(folder))
    policy.bind(toy_catalogue())
    before = policy.identity.facts
    policy.tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=2)
    policy._tokenizer_fact = ""
    assert policy.identity.facts == before
    again = RetrievalPolicy(pretrained=str(folder))
    again.bind(toy_catalogue())
    assert again.identity.differences(before) == []


def test_the_first_text_that_differs_is_named(folder):
    policy = RetrievalPolicy(pretrained=str(folder))
    policy.bind(toy_catalogue())
    before, catalogue = policy.identity.facts, toy_catalogue()
    texts = [*catalogue.texts[:4], "Another text", *catalogue.texts[5:]]
    policy.bind(Catalogue(catalogue.item_ids, catalogue.titles, texts))
    assert policy.identity.differences(before) == ["the item 'i4' has the text 'Another text' here and another there"]


def test_the_other_item_of_a_catalogue_is_named(tiny_policy):
    policy = tiny_policy()
    ids = list(policy.catalogue.item_ids)
    ids[3] = "new"
    with pytest.raises(InputError, match=r"the data has 80 \(item 3 is 'new' here and '.*' there\)"):
        policy.bind(Catalogue(ids))


def test_the_folder_of_a_policy_says_what_it_was_trained_on(tiny_policy, toy_data, make_trainer, tmp_path):
    def validate(**options):
        module = GRPORecModule(GenerativePolicy(pretrained=str(tmp_path / "policy")), num_generations=2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(limit_val_batches=1).validate(module, datamodule=toy_data(**options), verbose=False)
        return [str(w.message) for w in caught if "the policy" in str(w.message)]

    module = GRPORecModule(tiny_policy(), num_generations=2)
    make_trainer(max_epochs=1, limit_train_batches=1).fit(module, datamodule=toy_data())
    module.policy.save_pretrained(tmp_path / "policy")
    assert validate() == []
    (told,) = validate(history_window=7, pool_samples=30)
    assert told == "the policy was trained on other data: the history window is 7 here and 50 there"
    side = tmp_path / "policy" / "minirec.json"
    stored = json.loads(side.read_text())
    assert "samples.rows" not in stored["made_for"]
    del stored["made_for"]
    side.write_text(json.dumps(stored))
    (told,) = validate()
    assert "does not say which data it was trained on" in told
