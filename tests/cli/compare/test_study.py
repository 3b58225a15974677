"""Study files: the cells they stand for, and faults in them."""

import json

import pytest
from helpers.compare_tools import BASE, STUDY, write_study

from minirec_pl.cli.compare.study import Study, as_words
from minirec_pl.cli.compare.tasks import config_after_warm_start
from minirec_pl.utils.errors import InputError


@pytest.fixture
def study(tmp_path):
    return Study.read(write_study(tmp_path))


def test_cells_are_data_by_method_by_budget_by_seed(study):
    assert [cell.id for cell in study.cells()] == [
        "toy/late/full/1/1",
        "toy/late/random/0.5/1",
        "toy/late/minirec/0.5/1",
        "toy/late/full/1/2",
        "toy/late/random/0.5/2",
        "toy/late/minirec/0.5/2",
    ]


def test_a_cell_knows_its_steps_and_seed(study):
    words = study.cells()[4].words(pool=100, batch_size=16)
    assert "--selection.budget=0.5" in words
    assert "--model.lr_scheduler.total_iters=8" in words  # 2 epochs of 4 batches of 50 samples
    assert "--seed_everything=2" in words
    selector = {"class_path": "minirec_pl.selection.RandomSelector", "init_args": {"seed": 2, "redraw": True}}
    assert f"--selection.selector={json.dumps(selector)}" in words


def test_the_whole_pool_takes_no_budget(study):
    words = study.cells()[0].words(pool=100, batch_size=16)
    assert not [word for word in words if "budget" in word]
    assert "--model.lr_scheduler.total_iters=7" in words  # 1 epoch
    assert "--selection=null" in words


def test_fingerprints_tell_cells_and_settings_apart_but_not_places(tmp_path, study):
    prints = [study.fingerprint(cell) for cell in study.cells()]
    assert len(set(prints)) == len(prints)
    elsewhere = Study.read(study.path, {"toy": "/elsewhere"})
    assert [elsewhere.fingerprint(cell) for cell in elsewhere.cells()] == prints
    longer = Study.read(write_study(tmp_path, epochs=3))
    same = [one == other for one, other in zip(prints, map(longer.fingerprint, longer.cells()), strict=True)]
    assert same == [True, False, False] * 2  # full has epochs of its own


def test_a_grid_multiplies_the_methods(tmp_path):
    grid = {"slow": {"model.optimizer.lr": 0.001}, "fast": {"model.optimizer.lr": 0.1}}
    cells = Study.read(write_study(tmp_path, grid=grid, seeds=[1])).cells()
    assert cells[0].id == "toy/late/full@slow/1/1"
    assert "--model.optimizer.lr=0.1" in cells[1].words(100, 16)
    assert len(cells) == 6


def test_a_study_like_another_has_its_keys_and_methods(tmp_path, study):
    path = tmp_path / "second.yaml"
    path.write_text(f"like: {study.path}\nbudgets: [0.25]\nreferences: []\nmethods: {{other: {{like: minirec}}}}\n")
    other = Study.read(path)
    assert [cell.id for cell in other.cells()] == ["toy/late/other/0.25/1", "toy/late/other/0.25/2"]
    assert other.methods[0].overrides == study.methods[2].overrides


def test_a_method_has_overrides_of_its_own_on_a_data_set(tmp_path):
    own = {"per_dataset": {"toy": {"model.optimizer.lr": 0.5}}, "overrides": {"model.optimizer.lr": 0.1}}
    study = Study.read(
        write_study(
            tmp_path, methods={"a": own, "b": {"like": "a"}, "c": {"overrides": own["overrides"]}}, references=[]
        )
    )
    a, b, c = study.cells()[:3]
    assert ["--model.optimizer.lr=0.5" in cell.words(100, 16) for cell in (a, b, c)] == [True, True, False]
    assert study.fingerprint(a) == study.fingerprint(b) != study.fingerprint(c)


def test_a_study_without_methods_has_those_of_the_study_it_is_like(tmp_path, study):
    second, third = tmp_path / "second.yaml", tmp_path / "third.yaml"
    second.write_text(f"like: {study.path}\nreferences: []\nmethods: {{other: {{like: minirec}}}}\n")
    third.write_text(f"like: {second}\nbudgets: [0.25]\n")
    other = Study.read(third)
    assert [cell.id for cell in other.cells()] == ["toy/late/other/0.25/1", "toy/late/other/0.25/2"]
    assert other.methods[0].overrides == study.methods[2].overrides


def test_a_study_cannot_be_like_itself(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(f"like: {two}\n")
    two.write_text(f"like: {one}\n")
    with pytest.raises(InputError, match=r"one\.yaml is like itself"):
        Study.read(one)


def test_words_keep_text_as_it_is():
    assert as_words({"a.b": "c d", "e": [1, "{x}"]}, {"{x}": 5}) == ["--a.b=c d", "--e=[1, 5]"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": [0.1]}, "unknown key 'budget'"),
        ({"methods": {}}, "methods is missing"),
        ({"seeds": [1, 1]}, "seeds: give different whole numbers"),
        ({"references": ["best"]}, "there is no method 'best'"),
        ({"budgets": [1.5]}, "1.5 is not a share of the pool"),
        ({"budgets": [100]}, "100 is not a share of the pool"),
        ({"budgets": ["tenth"]}, "'tenth' is not a share of the pool"),
        ({"epochs": 0}, "epochs is 0"),
        ({"methods": {"a": {"like": "b"}}}, "there is no method 'b' above it"),
        ({"methods": {"a": {"per_dataset": {"x": {}}}}}, "by the name of a data set, which is one of toy"),
        ({"methods": {"a/b": {}}}, "names a folder"),
        ({"datasets": [{"window": "late"}]}, "give a mapping with a name"),
        ({"datasets": STUDY["datasets"] * 2}, "toy/late is there twice"),
        ({"grid": {name: {} for name in "abcde"}}, "at most 4 settings"),
    ],
)
def test_faults_are_named(tmp_path, changes, said):
    with pytest.raises(InputError, match=said) as error:
        Study.read(write_study(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_a_path_of_an_unknown_data_set_is_refused(study):
    with pytest.raises(InputError, match="--path names the data set 'other'"):
        Study.read(study.path, {"other": "x"})


@pytest.mark.parametrize(
    "own",
    [
        {"model.policy.config.hidden_size": 12, "model.policy.init_args.evaluation_beams": 3},
        {"model.policy": {"class_path": "minirec_pl.policy.GenerativePolicy", "init_args": {"evaluation_beams": 3}}},
    ],
)
def test_the_policy_of_a_data_set_is_for_its_warm_start(tmp_path, own):
    own = {**STUDY["datasets"][0]["overrides"], **own, "warm_start.epochs": 3}
    data = {**STUDY["datasets"][0], "overrides": own}
    cell = Study.read(write_study(tmp_path, datasets=[data])).cells()[0]
    assert not [word for word in cell.words(100, 16) if word.startswith(("--model.policy", "--warm_start"))]
    config = {"model": {"init_args": {"policy": {**BASE["model"]["init_args"]["policy"], "init_args": {"config": {}}}}}}
    made = config_after_warm_start(config, tmp_path / "policy", cell.data.filled(1))["model"]["init_args"]["policy"]
    left = {name: value for name, value in made["init_args"].items() if value is not None}
    assert left == {"evaluation_beams": 3, "pretrained": str(tmp_path / "policy")}
