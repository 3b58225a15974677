"""The small model and the folder it is kept in."""

import json

import pytest
import torch
from helpers.plain_policy import CONFIG, batch_of, many_token_policy, one_token_policy
from transformers import AutoModelForCausalLM, AutoTokenizer

from minirec_pl import InputError
from minirec_pl.data.samples import Catalogue
from minirec_pl.policy import GenerativePolicy
from minirec_pl.policy.folder import StoredPolicy, write_policy
from minirec_pl.policy.language_models.tiny import build_tiny, check_model, item_token, item_tokenizer

BATCH = batch_of([[3], [0, 5, 2]], [[3], [0, 5, 2]])


def test_a_folder_is_loaded_as_it_was_saved(tmp_path):
    policy = one_token_policy(attention_dropout=0.1)
    policy.save_pretrained(tmp_path / "a" / "policy", {"rollouts": {"training": 3}})
    again = GenerativePolicy(pretrained=str(tmp_path / "a" / "policy"))
    assert torch.equal(policy.item_logps(BATCH), again.item_logps(BATCH))
    assert again.catalogue.item_ids == policy.catalogue.item_ids
    assert again.training_cost == {"rollouts": {"training": 3}}
    assert again.training
    assert again.model.training
    again.save_pretrained(tmp_path / "b")
    assert GenerativePolicy(pretrained=str(tmp_path / "b")).training_cost == {"rollouts": {"training": 3}}


def test_ids_of_many_tokens_and_titles_are_kept(tmp_path):
    policy = many_token_policy(tmp_path / "a", Catalogue(["x", "y", "z"], ["Ex", "Why", "Zed"]))
    policy.save_pretrained(tmp_path / "b")
    again = GenerativePolicy(pretrained=str(tmp_path / "b"))
    assert torch.equal(again.trie.item_tokens, policy.trie.item_tokens)
    assert again.catalogue.titles == ["Ex", "Why", "Zed"]
    batch = batch_of([[1, 2]], [[1]])
    assert torch.equal(again.item_logps(batch), policy.item_logps(batch))


def test_plain_transformers_reads_the_folder_and_recommends_the_same(tmp_path):
    policy = one_token_policy().eval()
    policy.save_pretrained(tmp_path / "policy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    text = tokenizer.bos_token + "".join(item_token(f"i{item}") for item in [0, 5, 2])
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    item_tokens = tokenizer.convert_tokens_to_ids([item_token(f"i{item}") for item in range(12)])
    assert item_tokens == policy.trie.item_tokens[:, 0].tolist()
    with torch.no_grad():
        logits = model(tokens).logits[0, -1, item_tokens]
    logits[[0, 5, 2]] = -torch.inf
    unseen = [i for i in range(12) if i not in (0, 5, 2)]
    torch.testing.assert_close(logits.log_softmax(dim=0)[unseen], policy.item_logps(BATCH)[1, unseen])


def test_any_item_id_is_one_token():
    ids = ["50", "a b", "a>b", "<s>", "x<y", "100%", "%3C", "<", "é\n"]
    tokenizer = item_tokenizer(ids)
    text = "<s>" + "".join(map(item_token, ids))
    assert tokenizer(text, add_special_tokens=False).input_ids == [1, *range(3, 3 + len(ids))]


def test_saving_replaces_an_older_policy_only(tmp_path):
    target = tmp_path / "policy"
    one_token_policy(5).save_pretrained(target)
    one_token_policy(7).save_pretrained(target)
    assert len(GenerativePolicy(pretrained=str(target)).catalogue) == 7
    empty, precious = tmp_path / "empty", tmp_path / "thesis"
    for folder in (empty, precious):
        folder.mkdir()
    one_token_policy(5).save_pretrained(empty)
    (precious / "chapter.txt").write_text("everything")
    with pytest.raises(InputError, match="thesis' exists and holds no policy"):
        one_token_policy(5).save_pretrained(precious)
    assert (precious / "chapter.txt").read_text() == "everything"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "policy", "thesis"]


def test_a_failed_write_leaves_the_old_policy(tmp_path, monkeypatch):
    target = tmp_path / "policy"
    one_token_policy(5).save_pretrained(target)
    new = one_token_policy(7)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(new.model, "save_pretrained", full_disk)
    with pytest.raises(InputError, match=r"cannot write the policy to .*No space left on device"):
        new.save_pretrained(target)
    assert len(GenerativePolicy(pretrained=str(target)).catalogue) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(InputError, match="cannot write the policy"):
        one_token_policy(5).save_pretrained(tmp_path / "runs" / "policy")


def test_a_missing_policy_says_how_to_get_one(tmp_path):
    with pytest.raises(InputError, match=r"no policy in .*warm-start\.yaml"):
        GenerativePolicy(pretrained=str(tmp_path / "nowhere"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def edit(**changes):
    def change(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("model.safetensors", cut, ""),
        ("model.safetensors", lambda path: path.unlink(), ""),
        ("model.safetensors", lambda path: path.write_bytes(b"{}"), ""),
        ("config.json", lambda path: path.write_text("{"), ""),
        ("minirec.json", cut, ""),
        ("minirec.json", lambda path: path.write_text("[]"), ""),
        ("minirec.json", edit(item_tokens=[[3], [4]]), "does not give each of the 5 items its tokens"),
        ("minirec.json", edit(item_tokens=[[3], [4], [5], [6], [99]]), "token 99 of a vocabulary of 8"),
        ("minirec.json", edit(item_tokens=[[3.5], [4], [5], [6], [7]]), "does not give"),
        ("minirec.json", edit(item_tokens=[[3, 4], [4], [5], [6], [7]]), ""),
        ("minirec.json", edit(titles=["one"]), "1 titles for 5 items"),
        ("minirec.json", edit(item_ids=["a", "a", "b", "c", "d"]), "twice"),
    ],
)
def test_a_damaged_policy_is_named(tmp_path, name, damage, reason):
    one_token_policy(5).save_pretrained(tmp_path / "policy")
    damage(tmp_path / "policy" / name)
    with pytest.raises(InputError, match=rf"the policy in '.*policy' cannot be read \(.*{reason}.*train or") as info:
        GenerativePolicy(pretrained=str(tmp_path / "policy"))
    assert "\n" not in str(info.value)


def test_missing_weights_are_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    one_token_policy(5).save_pretrained(tmp_path / "policy")
    file = tmp_path / "policy" / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"weights are missing: model\.norm\.weight"):
        GenerativePolicy(pretrained=str(tmp_path / "policy"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "lama"}, "refused by transformers"),
        ({"model_type": "t5"}, "T5Config does not know: intermediate_size"),
        ({"hidden_sise": 16}, "LlamaConfig does not know: hidden_sise"),
        ({"hidden_size": "wide"}, "refused by transformers"),
        ({"vocab_size": 9}, "sets vocab_size, which the catalogue decides"),
    ],
)
def test_configs_that_make_no_model(config, message):
    with pytest.raises(InputError, match=message) as info:
        build_tiny({**CONFIG, **config}, 9)
    assert "\n" not in str(info.value)


def test_models_whose_logits_are_not_those_of_the_head_are_refused():
    gpt2 = build_tiny({"model_type": "gpt2", "hidden_size": 16, "n_layer": 1, "n_head": 2}, 9)
    check_model(gpt2)
    check_model(build_tiny({**CONFIG, "model_type": "gemma2", "head_dim": 8, "num_key_value_heads": 1}, 9))
    check_model(build_tiny({**CONFIG, "model_type": "granite", "logits_scaling": 8.0}, 9))
    squared = build_tiny(CONFIG, 9)
    squared.lm_head.register_forward_hook(lambda module, args, output: output.square())
    with pytest.raises(InputError, match="changes the states or the logits around its head"):
        check_model(squared)
    with pytest.raises(InputError, match="OpenAIGPTLMHeadModel cannot be a policy"):
        check_model(build_tiny({"model_type": "openai-gpt", "n_embd": 16, "n_layer": 1, "n_head": 2}, 9))
    with pytest.raises(InputError, match="refused by transformers"):
        build_tiny({"model_type": "t5"}, 9)
    gpt2.config.pad_token_id = None
    with pytest.raises(InputError, match="no pad or no start token"):
        check_model(gpt2)


def test_weights_follow_the_seed():
    first, second, other = (one_token_policy(seed=seed).item_logps(BATCH) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_duplicate_item_id():
    with pytest.raises(InputError, match="twice"):
        item_tokenizer(["a", "b", "a"])


def test_written_folders_are_readable_by_others(tmp_path):
    policy = one_token_policy(5)
    write_policy(tmp_path / "p", StoredPolicy(policy.model, policy.catalogue, policy.trie.item_tokens, {}))
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "p").stat().st_mode == (tmp_path / "plain").stat().st_mode
