"""Every line of bad input through the command: one sentence, exit code 2, no traceback, nothing half-written."""

import resource
import signal

import pytest
import torch
import yaml
from helpers.cli_tools import CONFIGS, Command, interrupt, sentence, write_toy
from helpers.slow import slow

from minirec_pl.cli.main import main


def rejected(arguments, root, capsys, *fragments):
    """Runs the command, which must fail well; returns its sentence."""
    capsys.readouterr()
    assert main(arguments) == 2
    said = sentence(capsys)
    assert "\n" not in said
    for fragment in fragments:
        assert fragment in said
    assert not root.exists(), sorted(root.rglob("*"))
    return said


def broken_data(tmp_path, name, change):
    """The toy dataset with its .inter file changed by `change(lines)`."""
    path = write_toy(tmp_path / "broken", name=name) / f"{name}.inter"
    path.write_text(change(path.read_text().splitlines()))
    return [f"--data.path={tmp_path / 'broken'}", f"--data.dataset={name}"]


def reordered(lines):
    rows = [line.split("\t") for line in lines[1:]]
    return "\n".join([lines[0], *("\t".join([user, time, rating, item]) for user, item, rating, time in rows)]) + "\n"


def one_moment(lines):
    return "\n".join([lines[0], *("\t".join([*line.split("\t")[:3], "5"]) for line in lines[1:])]) + "\n"


DATA = {
    "truncated": (lambda lines: "\n".join(lines)[:-12], ("truncated.inter", "line 1501", "truncated")),
    "reordered": (reordered, ("reordered.inter", "line 2", "column timestamp", "order of the columns")),
    "wrong_type": (
        lambda lines: "\n".join(lines).replace("timestamp:float", "timestamp:token") + "\n",
        ("wrong_type.inter", "line 1", "column timestamp", "timestamp:float"),
    ),
    "unknown_type": (
        lambda lines: "\n".join(lines).replace("timestamp:float", "timestamp:int") + "\n",
        ("unknown_type.inter", "line 1", "column timestamp", "'int'"),
    ),
    "empty_part": (one_moment, ("empty_part.inter", "part is empty", "warm_fraction")),
}


@pytest.mark.parametrize("name", DATA)
def test_data_files(name, command, tmp_path, capsys):
    change, fragments = DATA[name]
    data = broken_data(tmp_path, name, change)
    rejected(command.warm(tmp_path / "runs", *data), tmp_path / "runs", capsys, *fragments)


def test_an_item_that_is_not_in_the_catalogue(command, tmp_path, capsys):
    folder = write_toy(tmp_path / "data")
    (folder / "toy.item").write_text("item_id:token\tmovie_title:token_seq\ni0\tOne\n")
    arguments = command.warm(tmp_path / "runs", f"--data.path={tmp_path / 'data'}")
    rejected(arguments, tmp_path / "runs", capsys, "toy.inter", "line 2", "is not in the item file")


def test_missing_data_folder_says_how_to_fetch_it(command, tmp_path, capsys):
    arguments = command.warm(tmp_path / "runs", f"--data.path={tmp_path / 'no'}", "--data.dataset=ml-100k")
    rejected(arguments, tmp_path / "runs", capsys, "ml-100k.inter is missing", "minirec fetch ml-100k --to")


OPTIONS = {
    "budget 0": ("--selection.budget=0", "budget is 0", "(0, 1]"),
    "budget 0.0": ("--selection.budget=0.0", "budget is 0.0"),
    "negative budget": ("--selection.budget=-3", "budget is -3"),
    "budget above 1": ("--selection.budget=1.5", "budget is 1.5", "at most 1.0"),
    "budget above the pool": ("--selection.budget=100000", "budget is 100000 samples but the pool has"),
    "budget no number": ("--selection.budget=many", "selection.budget", "int or float", "many"),
    "rescore": ("--selection.rescore_fraction=1.5", "rescore_fraction is 1.5"),
    "one rollout": ("--model.num_generations=1", "num_generations is 1", "at least 2"),
    "rollouts no number": ("--model.num_generations=some", "model.num_generations", "int", "some"),
    "loss": ("--model.loss_type=mse", "model.loss_type", "'dapo'", "mse"),
    "learning rate": ("--model.optimizer.lr=fast", "model.optimizer.lr", "float", "fast"),
    "empty split": ("--data.split=[1.0, 0.0, 0.0]", "split=(1.0, 0.0, 0.0)", "above 0"),
    "empty pool": ("--data.warm_fraction=1.0", "pool part is empty", "warm_fraction"),
    "train on the warm part": ("--data.train_on=warm", "WarmChunkSampler"),
    "unknown option": ("--nonsense=1", "unknown option nonsense", "minirec fit --help"),
    "unknown model option": ("--model.nonsense=1", "unknown option model.nonsense", "--model.help"),
    "unknown selection option": ("--selection.nonsense=1", "unknown option selection.nonsense", "--selection.help"),
    "unknown data option": ("--data.nonsense=1", "unknown option data.nonsense", "--data.help"),
    "unknown trainer option": ("--trainer.nonsense=1", "unknown option trainer.nonsense"),
    "wrong model class": ("--model=minirec_pl.Nothing", "model", "minirec_pl.Nothing"),
    "model is a function": ("--model=os.path.join", "model", "subclass of RecModule"),
    "wrong selector": ("--selection.selector=minirec_pl.selection.Nothing", "selection.selector", "Nothing"),
    "selection is another callback": (
        "--selection=minirec_pl.callbacks.run_folder.RunFolder",
        "selection",
        "subclass of SessionCallback",
    ),
    "wrong reward": ("--model.rewards=[helpers.cli_tools.nothing]", "model.rewards", "no attribute 'nothing'"),
    "wrong module of a reward": ("--model.rewards=[nowhere.reward]", "model.rewards", "nowhere"),
    "accelerator": ("--trainer.accelerator=abacus", "accelerator", "abacus", "cpu"),
    "missing policy": ("--model.policy.pretrained=runs/none", "runs/none", "warm-start.yaml"),
    "unknown figure": ("--trainer.callbacks.monitor=val/none", "val/none", "val/ndcg@10"),
}
LIKE_OTHERS = {
    "budget 0.0",
    "negative budget",
    "budget above the pool",
    "rollouts no number",
    "learning rate",
    "empty split",
    "unknown model option",
    "unknown data option",
    "unknown trainer option",
    "model is a function",
    "wrong selector",
    "wrong module of a reward",
}


@pytest.mark.parametrize("name", [slow(name) if name in LIKE_OTHERS else name for name in OPTIONS])
def test_options(name, command, tmp_path, capsys):
    override, *fragments = OPTIONS[name]
    root = tmp_path / "runs"
    capsys.readouterr()
    assert main(command.grpo(root, override)) == 2
    said = sentence(capsys)
    for fragment in fragments:
        assert fragment in said
    left = {path.name for path in root.rglob("*") if path.is_file()}
    assert "config.yaml" not in left or left & {"ledger.parquet", "best.ckpt"}


@pytest.mark.parametrize(("reward", "what"), [("nan_reward", "nan"), ("short_reward", "1 values for")])
def test_a_bad_reward_is_named_with_its_samples(reward, what, command, tmp_path, capsys):
    capsys.readouterr()
    assert main(command.grpo(tmp_path / "runs", f"--model.rewards=[helpers.cli_tools.{reward}]")) == 2
    said = sentence(capsys)
    assert reward in said
    assert what in said
    assert "sample_id" in said
    assert not (tmp_path / "runs" / "version_0" / "checkpoints").exists()
    assert not (tmp_path / "runs" / "version_0" / "policy").exists()


def test_a_bad_reward_while_scoring_leaves_nothing(command, tmp_path, capsys):
    arguments = command.grpo(tmp_path / "runs", "--model.rewards=[helpers.cli_tools.nan_reward]")
    rejected([*arguments, "--model.scoring_generations=2"], tmp_path / "runs", capsys, "nan_reward", "sample_id")


def test_missing_ledger(command, tmp_path, capsys):
    name = "--trainer.callbacks"
    arguments = [word for word in command.grpo(tmp_path / "runs") if not word.startswith("--selection")]
    select = ["--selection=null", f"{name}+=minirec_pl.callbacks.SelectSamples", f"{name}.ledger=no.parquet"]
    rejected([*arguments, *select], tmp_path / "runs", capsys, "no ledger 'no.parquet'")


YAMLS = {
    "broken": ("model: [1,\n", ("line 2", "not valid YAML")),
    "tab": ("model:\n\tclass_path: x\n", ("line 2, column 1", "not valid YAML")),
    "list": ("- 1\n", ("mapping",)),
    "empty": ("", ("mapping",)),
    "unknown_key": ("nonsense: 1\n", ("unknown option nonsense",)),
    "unknown_model_key": ("model:\n  init_args: {nonsense: 1}\n", ("unknown option model.nonsense",)),
    "unknown_selection_key": ("selection:\n  init_args: {nonsense: 1}\n", ("unknown option selection.nonsense",)),
    "unknown_trainer_key": ("trainer: {nonsense: 1}\n", ("trainer.nonsense",)),
}


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_files(name, command, tmp_path, capsys):
    text, fragments = YAMLS[name]
    path = tmp_path / f"{name}.yaml"
    path.write_text(text)
    arguments = command.grpo(tmp_path / "runs", "--config", str(path))
    said = rejected(arguments, tmp_path / "runs", capsys, *fragments)
    if name in ("broken", "tab", "list", "empty"):
        assert str(path) in said


def test_missing_config(tmp_path, capsys):
    rejected(["fit", "--config", str(tmp_path / "no.yaml")], tmp_path / "runs", capsys, "no.yaml", "--config")
    rejected(["fit"], tmp_path / "runs", capsys, "--model is missing", "--config")


def test_checkpoints_that_are_none(command, tmp_path, capsys):
    root = tmp_path / "runs"
    missing, rubbish, alone = tmp_path / "no.ckpt", tmp_path / "rubbish.ckpt", tmp_path / "a" / "b" / "alone.ckpt"
    rubbish.write_bytes(b"hello")
    rejected(command.grpo(root, f"--ckpt_path={missing}"), root, capsys, "no checkpoint", "no.ckpt")
    rejected(command.grpo(root, f"--ckpt_path={rubbish}"), root, capsys, "rubbish.ckpt", "truncated")
    rejected(["test", f"--ckpt_path={missing}"], root, capsys, "no checkpoint", "no.ckpt")
    alone.parent.mkdir(parents=True)
    torch.save({}, alone)
    rejected(["test", "--ckpt_path", str(alone)], root, capsys, "config.yaml", "--config")


def test_a_checkpoint_of_another_catalogue(command, tmp_path, capsys):
    other = Command(tmp_path)
    write_toy(other.data, n_items=40)
    checkpoint = command.folder / "warm" / "version_0" / "checkpoints" / "best.ckpt"
    arguments = other.warm(tmp_path / "runs", "--ckpt_path", str(checkpoint), "--trainer.max_epochs=3")
    rejected(arguments, tmp_path / "runs", capsys, "made for something else", "40 items here and 80 there")
    arguments = command.grpo(tmp_path / "runs", f"--data.path={other.data}")
    rejected(arguments, tmp_path / "runs", capsys, "catalogue of 80 items", "40")


def test_a_folder_that_cannot_be_written(command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file" / "runs", "/proc/minirec"):
        capsys.readouterr()
        assert main(command.warm(root)) == 2
        assert "--trainer.default_root_dir" in sentence(capsys)
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(("limit", "what"), [(100, "runs/version_0"), (40_000, "best.ckpt")])
def test_a_full_disk(limit, what, command, tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    capsys.readouterr()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        code = main(command.warm(tmp_path / "runs"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 2
    assert what in sentence(capsys)
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_before_training_and_while_scoring(command, tmp_path, capsys):
    root = tmp_path / "runs"
    rejected(command.warm(root, *interrupt("on_fit_start")), root, capsys, "interrupted", "nothing to resume")
    reward = ["--model.rewards=[helpers.cli_tools.interrupting_reward]", "--model.scoring_generations=2"]
    rejected(command.grpo(root, *reward), root, capsys, "interrupted", "nothing to resume")
    checkpoint = command.folder / "warm" / "version_0" / "checkpoints" / "best.ckpt"
    arguments = ["test", "--ckpt_path", str(checkpoint), f"--trainer.default_root_dir={root}"]
    rejected([*arguments, *interrupt("on_test_batch_start")], root, capsys, "interrupted; nothing was written")


def test_the_shipped_configs_say_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["fit", "--config", str(CONFIGS / "quickstart.yaml")]) == 2
    assert "warm-start.yaml" in sentence(capsys)
    assert main(["fit", "--config", str(CONFIGS / "warm-start.yaml")]) == 2
    assert "minirec fetch ml-100k --to data" in sentence(capsys)
    assert main(["quickstart"]) == 2
    assert "minirec fetch ml-100k --to data" in sentence(capsys)
    assert main(["quickstart", "--configs", "configs"]) == 2
    assert "--configs" in sentence(capsys)
    assert not list(tmp_path.iterdir())


def test_a_config_key_of_another_class_is_named(command, tmp_path, capsys):
    config = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    config["model"]["init_args"]["learning_rate"] = 0.1
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    rejected(
        ["fit", "--config", str(tmp_path / "mine.yaml")], tmp_path / "r", capsys, "unknown option", "learning_rate"
    )
