import pytest
import torch

from minirec_pl import GRPORecModule
from minirec_pl.cli.predict import rows_of, table_of


def predictions(trainer, module, data):
    return table_of(rows_of(trainer.predict(module, data)), module.item_ids.tolist(), data.table.user_ids)


def test_predictions_carry_external_ids_and_log_probabilities(toy_data, tiny_policy, make_trainer):
    data, policy = toy_data(), tiny_policy()
    module = GRPORecModule(policy, predict_k=5)
    table = predictions(make_trainer(), module, data)
    assert list(table.columns) == ["sample_id", "user_id", "item_id", "score", "rank"]
    assert sorted(table.sample_id.unique()) == sorted(data.test_ids.tolist())
    with torch.no_grad():
        for batch in data.test_dataloader():
            scores = policy.item_logps(batch)
            for b, sample in enumerate(batch["sample_id"].tolist()):
                rows = table[table.sample_id == sample]
                seen = set(batch["seen"][b].tolist())
                best = sorted((i for i in range(len(scores[b])) if i not in seen), key=lambda i: -float(scores[b, i]))[
                    :5
                ]
                assert rows.item_id.tolist() == [data.catalogue.item_ids[i] for i in best]
                assert rows["rank"].tolist() == [1, 2, 3, 4, 5]
                assert rows.score.tolist() == pytest.approx(scores[b, best].tolist(), abs=1e-5)
                assert set(rows.user_id) == {data.table.user_ids[int(batch["user"][b])]}


def test_lists_end_where_the_unseen_items_do(toy_data, tiny_policy, make_trainer):
    data = toy_data()
    module = GRPORecModule(tiny_policy(), predict_k=200)
    table = predictions(make_trainer(), module, data)
    batch = next(iter(data.test_dataloader()))
    for sample, seen in zip(batch["sample_id"].tolist(), batch["seen"], strict=True):
        rows = table[table.sample_id == sample]
        assert len(rows) == len(data.catalogue) - int((seen >= 0).sum())
        assert rows["rank"].tolist() == list(range(1, len(rows) + 1))
        assert rows.score.min() > -1e6
