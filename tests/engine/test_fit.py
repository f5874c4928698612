"""Training: it learns, it repeats itself, and stopped anywhere it goes on as if nothing had happened."""

import csv
import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from ctseg.engine import fit
from ctseg.engine.checkpoint import read_checkpoint, save_checkpoint
from ctseg.engine.runtime import Runtime
from ctseg.engine.train import train
from ctseg.engine.trainer import Trainer
from ctseg.errors import CtsegError, ModelError, OutputError, Stopped
from ctseg.progress import Silent
from ctseg.recipe import Recipe
from ctseg.workspace import run_recipe, start_run

SIX_STEPS = {"epochs": 3, "batch_cases": 2, "validation_interval_epochs": 2}
HALVED = {"kind": "step", "step_epochs": 1, "gamma": 0.5}
"""Three epochs of two steps (the tiny data has three cases), each with its own learning rate."""
OPTIMIZERS = [{"kind": "adam", "lr": 2e-3}, {"kind": "novograd", "lr": 2e-3}]


def content(run: Path, name: str = "last.pt") -> dict:
    return read_checkpoint(run / name)


def test_the_loss_falls(tiny_recipe: Recipe, tmp_path: Path, train_tiny, changed) -> None:
    result = train_tiny(changed(tiny_recipe, training={"epochs": 20}), tmp_path / "run")
    losses = [row["loss"] for row in content(result.run)["history"]]
    assert len(losses) == 20
    assert sum(losses[-3:]) / 3 < 0.8 * losses[0]


def test_the_same_twice_and_another_seed_differs(
    tiny_recipe: Recipe, tmp_path: Path, train_tiny, changed, assert_same
) -> None:
    train_tiny(tiny_recipe, tmp_path / "a")
    torch.manual_seed(123)  # the process's own generator must not matter
    torch.rand(7)
    train_tiny(tiny_recipe, tmp_path / "b")
    for name in ("last.pt", "best.pt"):
        assert_same(content(tmp_path / "a", name), content(tmp_path / "b", name))
    train_tiny(changed(tiny_recipe, training={"seed": 1}), tmp_path / "c")
    first, other = content(tmp_path / "a")["model"], content(tmp_path / "c")["model"]
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o["kind"])
def test_stopped_after_any_step_it_ends_with_the_same_bits(
    tiny_recipe: Recipe, tmp_path: Path, train_tiny, changed, assert_same, optimizer: dict
) -> None:
    recipe = changed(tiny_recipe, training=SIX_STEPS, schedule=HALVED, optimizer=optimizer)
    train_tiny(recipe, tmp_path / "whole")
    for step in range(1, 7):
        run = tmp_path / f"stopped-{step}"
        with pytest.raises(Stopped):
            train_tiny(recipe, run, stop_after=step)
        stopped = content(run)
        assert (stopped["epoch"], stopped["step"]) == ((step - 1) // 2, (step - 1) % 2 + 1)
        train_tiny(recipe, run)
        for name in ("last.pt", "best.pt"):
            assert_same(content(run, name), content(tmp_path / "whole", name))
        for name in ("log.csv", "log.jsonl"):
            assert (run / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_stopped_after_every_step_it_ends_with_the_same_bits(
    tiny_recipe: Recipe, tmp_path: Path, train_tiny, changed, assert_same, read_events
) -> None:
    recipe = changed(tiny_recipe, training=SIX_STEPS, schedule=HALVED)
    train_tiny(recipe, tmp_path / "whole")
    run, stops = tmp_path / "run", 0
    while True:
        try:
            train_tiny(recipe, run, stop_after=1)
            break
        except Stopped:
            stops += 1
    assert stops == 6
    assert_same(content(run), content(tmp_path / "whole"))
    assert (run / "log.csv").read_text() == (tmp_path / "whole" / "log.csv").read_text()
    assert read_events(run) == read_events(tmp_path / "whole")


def test_a_stop_says_where_and_how_to_go_on(tiny_recipe: Recipe, tmp_path: Path, train_tiny) -> None:
    run = tmp_path / "run"
    with pytest.raises(Stopped, match=rf"epoch 2 after step 1; .*--resume --output {run}$") as caught:
        train_tiny(tiny_recipe, run, stop_after=3)
    assert caught.value.exit_code == 75


@pytest.mark.parametrize("moment", ["best", "log", "checkpoint"])
def test_killed_between_the_files_of_an_epoch(
    tiny_recipe: Recipe, tmp_path: Path, train_tiny, assert_same, read_events, monkeypatch, moment: str
) -> None:
    """After the last epoch's best weights, after its log, or after its checkpoint: no row is lost, none is double."""
    train_tiny(tiny_recipe, tmp_path / "whole")
    run = tmp_path / "run"
    owner, name = {
        "best": (Trainer, "save_best"),
        "log": (fit.Recorder, "write"),
        "checkpoint": (Trainer, "save"),
    }[moment]
    done = getattr(owner, name)
    monkeypatch.setattr(fit, "bank_dice", lambda *_: [0.5] if moment != "best" else [0.5 + len(calls) / 10])
    calls: list[None] = []

    def then_die(*args):
        done(*args)
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, then_die)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tiny_recipe, run)
    monkeypatch.undo()
    monkeypatch.setattr(fit, "bank_dice", lambda *_: [0.5])
    train_tiny(tiny_recipe, run)
    assert_same(content(run)["model"], content(tmp_path / "whole")["model"])
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert rows == content(run)["history"]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert [step for step, _ in read_events(run)["loss"]] == [1, 2]
    assert (run / "curves.png").exists()


def test_best_weights_are_those_of_the_best_epoch(
    tiny_recipe: Recipe, tmp_path: Path, train_tiny, changed, assert_same, monkeypatch
) -> None:
    """Scores 0.2, 0.7, 0.5, 0.7: the first of the two best is kept. Training two epochs alone gives its weights."""
    train_tiny(changed(tiny_recipe, training={"epochs": 2}), tmp_path / "two")
    scores, overlaps = iter([0.2, 0.7, 0.5, 0.7]), []
    monkeypatch.setattr(fit, "bank_dice", lambda _model, _case, overlap: overlaps.append(overlap) or [next(scores)])
    recipe = changed(tiny_recipe, training={"epochs": 4, "validation_overlap": 0.125})
    result = train_tiny(recipe, tmp_path / "four")
    assert (result.best_epoch, result.best_mean_dice) == (2, 0.7)
    assert result.checkpoint == tmp_path / "four" / "best.pt"
    best = content(tmp_path / "four", "best.pt")
    assert (best["epoch"], best["mean_dice"]) == (2, 0.7)
    assert_same(best["model"], content(tmp_path / "two")["model"])
    assert overlaps == [0.125] * 4


def test_mean_dice_is_over_all_structures_of_all_cases(tiny_recipe, tmp_path, train_tiny, changed, monkeypatch) -> None:
    """A case without a label's structure gives no value and does not count."""
    values = iter([[0.2, 0.4], [], [0.9]])
    monkeypatch.setattr(fit, "bank_dice", lambda *_: next(values))
    recipe = changed(tiny_recipe, training={"epochs": 3})
    train_tiny(recipe, tmp_path / "run")
    assert [row["mean_dice"] for row in content(tmp_path / "run")["history"]] == [pytest.approx(0.3), None, 0.9]


def test_validation_comes_every_interval_and_after_the_last_epoch(tiny_recipe, tmp_path, train_tiny, changed) -> None:
    recipe = changed(tiny_recipe, training={"epochs": 5, "validation_interval_epochs": 2})
    train_tiny(recipe, tmp_path / "run")
    history = content(tmp_path / "run")["history"]
    assert [row["epoch"] for row in history if row["mean_dice"] is not None] == [2, 4, 5]
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").read_text().splitlines()))
    assert [int(row["epoch"]) for row in rows if row["mean_dice"]] == [2, 4, 5]


def test_learning_rate_falls_by_its_schedule(tiny_recipe, tmp_path, train_tiny, changed) -> None:
    recipe = changed(
        tiny_recipe,
        training={"epochs": 5},
        schedule={"kind": "step", "step_epochs": 2, "gamma": 0.1},
        optimizer={"lr": 1e-3},
    )
    train_tiny(recipe, tmp_path / "run")
    rates = [row["lr"] for row in content(tmp_path / "run")["history"]]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5], rel=1e-12)


def test_weights_do_not_depend_on_the_validation(tiny_recipe, tmp_path, train_tiny, changed, assert_same) -> None:
    """Evaluating must leave batch statistics and random numbers alone."""
    for interval in (1, 3):
        recipe = changed(tiny_recipe, training={"epochs": 3, "validation_interval_epochs": interval})
        train_tiny(recipe, tmp_path / str(interval))
    assert_same(content(tmp_path / "1")["model"], content(tmp_path / "3")["model"])


def test_batch_statistics_come_from_every_training_step_and_no_other(
    tiny_recipe, tmp_path, train_tiny, changed
) -> None:
    """Three epochs of two steps, each validated in between."""
    train_tiny(changed(tiny_recipe, training={"epochs": 3}), tmp_path / "run")
    weights = content(tmp_path / "run")["model"]
    counts = [int(value) for name, value in weights.items() if name.endswith("num_batches_tracked")]
    assert set(counts) == {6}


def test_a_diverging_loss_is_an_error_that_names_its_cure(tiny_recipe, tmp_path, train_tiny, changed) -> None:
    recipe = changed(tiny_recipe, optimizer={"lr": 1e30}, training={"epochs": 5})
    with pytest.raises(CtsegError, match=r"training diverged: the loss of epoch \d is nan; lower optimizer.lr"):
        train_tiny(recipe, tmp_path / "run")
    if (tmp_path / "run" / "last.pt").exists():
        assert all(math.isfinite(row["loss"]) for row in content(tmp_path / "run")["history"])


def test_a_fresh_trainer_depends_on_the_seed_alone(tiny_recipe: Recipe, cpu: Runtime, changed, assert_same) -> None:
    first = Trainer.fresh(tiny_recipe, cpu).network.state_dict()
    torch.rand(3)
    assert_same(first, Trainer.fresh(tiny_recipe, cpu).network.state_dict())
    other = Trainer.fresh(changed(tiny_recipe, training={"seed": 1}), cpu).network.state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_run_without_a_checkpoint_starts_at_its_beginning(tiny_recipe: Recipe, cpu: Runtime, tmp_path: Path) -> None:
    trainer = Trainer.fresh(tiny_recipe, cpu)
    trainer.load(tmp_path)
    assert (trainer.epoch, trainer.step, trainer.history) == (0, 0, [])


def test_a_damaged_last_checkpoint_falls_back_on_the_one_before(
    tiny_recipe: Recipe, tmp_path: Path, train_tiny, changed, assert_same, cpu: Runtime
) -> None:
    """A byte changed, the file cut, or the file gone: the run repeats an epoch and ends with the same bits."""
    recipe = changed(tiny_recipe, training={"epochs": 4})
    train_tiny(recipe, tmp_path / "whole")
    for n, damage in enumerate(("byte", "cut", "gone")):
        run = tmp_path / damage
        with pytest.raises(Stopped):
            train_tiny(recipe, run, stop_after=5)
        assert content(run, "previous.pt")["epoch"] == 2
        data = bytearray((run / "last.pt").read_bytes())
        if damage == "byte":
            weights = next(iter(content(run)["model"].values())).numpy().tobytes()
            data[data.index(weights) + len(weights) // 2] ^= 1
        (run / "last.pt").write_bytes(data[: len(data) - 100] if damage == "cut" else data)
        if damage == "gone":
            (run / "last.pt").unlink()
        warning = Trainer.fresh(recipe, cpu, content(run, "previous.pt")["data"]).load(run)
        assert ("going on from the one before it" in warning) == (n < 2)
        train_tiny(recipe, run)
        for name in ("last.pt", "best.pt"):
            assert_same(content(run, name), content(tmp_path / "whole", name))
        assert (run / "log.csv").read_text() == (tmp_path / "whole" / "log.csv").read_text()


def test_two_damaged_checkpoints_are_an_error_that_names_both(tiny_recipe, tmp_path, train_tiny, cpu) -> None:
    train_tiny(tiny_recipe, tmp_path)
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(ModelError, match=r"no checkpoint of run .* can be read: .*last.pt.*previous.pt"):
        Trainer.fresh(tiny_recipe, cpu).load(tmp_path)


def test_a_fallback_does_not_lose_the_good_checkpoint(tiny_recipe, tmp_path, train_tiny, cpu, monkeypatch) -> None:
    """Damaged, gone on from the one before, and the disk is full when the first new one is written."""
    train_tiny(tiny_recipe, tmp_path)
    good = (tmp_path / "previous.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(b"PK")
    resumed = Trainer.fresh(tiny_recipe, cpu, content(tmp_path, "previous.pt")["data"])
    resumed.load(tmp_path)

    def full(*_args) -> None:
        raise OutputError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("ctseg.engine.trainer.save_checkpoint", full)
        with pytest.raises(OutputError):
            resumed.save(tmp_path)
    assert (tmp_path / "previous.pt").read_bytes() == good
    resumed.save(tmp_path)
    assert content(tmp_path)["epoch"] == 1
    resumed.save(tmp_path)
    assert content(tmp_path, "previous.pt")["epoch"] == 1


def test_best_weights_lost_in_a_kill_are_written_again(
    tiny_recipe, tmp_path, train_tiny, changed, monkeypatch, assert_same
) -> None:
    """Killed after the checkpoint of the best epoch, before its weights were kept apart."""
    monkeypatch.setattr(fit, "bank_dice", lambda *_: [0.5])
    train_tiny(changed(tiny_recipe, training={"epochs": 1}), tmp_path)
    expected = content(tmp_path, "best.pt")
    (tmp_path / "best.pt").unlink()
    train_tiny(changed(tiny_recipe, training={"epochs": 1}), tmp_path)
    assert_same(content(tmp_path, "best.pt"), expected)


def test_a_checkpoint_from_before_an_option_existed_is_resumed(tiny_recipe, cpu, tmp_path: Path) -> None:
    Trainer.fresh(tiny_recipe, cpu).save(tmp_path)
    old = content(tmp_path)
    del old["recipe"]["training"]["deterministic"], old["recipe"]["lesions"]
    save_checkpoint(tmp_path / "last.pt", old)
    assert Trainer.fresh(tiny_recipe, cpu).load(tmp_path) == ""


def test_changed_cases_are_refused_unless_asked(tiny_recipe: Recipe, cpu: Runtime, tmp_path: Path) -> None:
    Trainer.fresh(tiny_recipe, cpu, "one").save(tmp_path)
    other = Trainer.fresh(tiny_recipe, cpu, "other")
    with pytest.raises(ModelError, match=r"prepared cases have changed since; .*--change-recipe"):
        other.load(tmp_path)
    assert other.load(tmp_path, changed=True) == ""


def test_a_recipe_may_change_when_asked(
    tiny_recipe: Recipe, cpu: Runtime, tmp_path: Path, changed, assert_same
) -> None:
    """Weights, epoch and log stay; another kind of optimizer starts anew; another network is refused."""
    before = Trainer.fresh(tiny_recipe, cpu)
    before.epoch, before.history = 1, [{"epoch": 1, "loss": 1.0, "mean_dice": None, "lr": 1e-3}]
    before.save(tmp_path)
    after = Trainer.fresh(changed(tiny_recipe, optimizer={"kind": "novograd"}, training={"seed": 5}), cpu)
    after.load(tmp_path, changed=True)
    assert (after.epoch, after.history) == (1, before.history)
    assert_same(after.network.state_dict(), before.network.state_dict())
    frozen = Trainer.fresh(changed(tiny_recipe, training={"freeze": ["model.0"]}), cpu)
    frozen.load(tmp_path, changed=True)
    assert frozen.epoch == 1
    with pytest.raises(ModelError, match="weights do not fit"):
        Trainer.fresh(changed(tiny_recipe, network={"channels": [4, 16]}), cpu).load(tmp_path, changed=True)


def test_a_new_run_may_start_with_weights_and_goes_on_from_its_own(
    tiny_recipe: Recipe, cpu: Runtime, tmp_path: Path, assert_same
) -> None:
    given = Trainer.fresh(tiny_recipe, cpu).network
    for parameter in given.parameters():
        parameter.data.fill_(0.5)
    save_checkpoint(tmp_path / "start.pt", {"model": given.state_dict(), "report": {}})
    trainer = Trainer.fresh(tiny_recipe, cpu)
    trainer.load(tmp_path)
    assert_same(trainer.network.state_dict(), given.state_dict())
    Trainer.fresh(tiny_recipe, cpu).save(tmp_path)
    trainer.load(tmp_path)
    assert_same(trainer.network.state_dict(), Trainer.fresh(tiny_recipe, cpu).network.state_dict())


def test_a_stop_during_validation_repeats_no_step(
    tiny_recipe: Recipe, tmp_path: Path, train_tiny, changed, assert_same, tiny_manifest
) -> None:
    """Two validation cases: the stop between them saves an epoch with all its steps, whose validation begins anew."""
    cases = tuple(
        dataclasses.replace(c, split="validation") if c.split == "testing" else c for c in tiny_manifest.cases
    )
    manifest, run = dataclasses.replace(tiny_manifest, cases=cases), tmp_path / "run"
    train_tiny(tiny_recipe, tmp_path / "whole", manifest=manifest)
    with pytest.raises(Stopped, match="epoch 1 after step 2"):
        train_tiny(tiny_recipe, run, manifest=manifest, stop_after=3)
    assert (content(run)["epoch"], content(run)["step"]) == (0, 2)
    train_tiny(tiny_recipe, run, manifest=manifest)
    assert_same(content(run), content(tmp_path / "whole"))


def test_a_changed_recipe_keeps_the_number_of_patches_unless_it_says_another(
    tiny_recipe, cpu, tmp_path, changed
) -> None:
    before = Trainer.fresh(tiny_recipe, cpu)
    before.patches_per_pass, before.step, before.losses = 3, 1, [0.5]
    before.save(tmp_path)
    for training, expected in (({"epochs": 9}, 3), ({"patches_per_pass": 2}, 2)):
        after = Trainer.fresh(changed(tiny_recipe, training=training), cpu)
        after.load(tmp_path, changed=True)
        assert after.patches_per_pass == expected
        assert (after.step, after.losses) == (0, [])  # the epoch begins anew


def test_a_changed_run_is_resumed_without_saying_so_again(
    tiny_recipe, tmp_path, train_tiny, changed, cpu, tiny_prepared
) -> None:
    """Even if it was stopped before its first new step."""
    recipe = changed(tiny_recipe, training={"epochs": 4})
    train_tiny(tiny_recipe, tmp_path / "run")
    calls = itertools.count(1)
    with pytest.raises(Stopped):
        train(
            recipe, tmp_path / "run", None, cpu, Silent(), tiny_prepared, lambda: next(calls) == 1, change_recipe=True
        )
    for name in {"last.pt", "previous.pt"} & {path.name for path in (tmp_path / "run").iterdir()}:
        assert content(tmp_path / "run", name)["recipe"]["training"]["epochs"] == 4
    assert train_tiny(recipe, tmp_path / "run").epochs == 4


def test_a_change_that_is_none_goes_on_in_the_middle_of_its_epoch(
    tiny_recipe, tmp_path, train_tiny, changed, cpu
) -> None:
    """As a job that is queued again with the same options does."""
    with pytest.raises(Stopped):
        train_tiny(tiny_recipe, tmp_path / "run", stop_after=3)
    saved = content(tmp_path / "run")
    assert saved["step"] > 0
    same = Trainer.fresh(tiny_recipe, cpu, saved["data"])
    same.load(tmp_path / "run", changed=True)
    assert (same.step, same.changed) == (saved["step"], False)
    other = Trainer.fresh(changed(tiny_recipe, optimizer={"lr": 1e-5}), cpu, saved["data"])
    other.load(tmp_path / "run", changed=True)
    assert (other.step, other.changed) == (0, True)


def test_the_best_weights_keep_the_recipe_that_they_were_trained_with(
    tiny_recipe, tmp_path, tiny_prepared, train_tiny, changed, cpu
) -> None:
    train_tiny(tiny_recipe, tmp_path / "run")
    trainer = Trainer.fresh(changed(tiny_recipe, preprocess={"hu_window": [-1000, 1000]}), cpu)
    trainer.load(tmp_path / "run", changed=True)
    trainer.history[-1]["mean_dice"] = 1.0  # the last epoch is the best one
    trainer.repair_best(tmp_path / "run")
    assert content(tmp_path / "run", "best.pt")["recipe"] == tiny_recipe.to_dict()


def test_a_recipe_is_changed_before_there_is_a_checkpoint(
    tiny_recipe, tmp_path, tiny_manifest, tiny_prepared, train_tiny, changed, cpu
) -> None:
    start_run(tmp_path / "run", tiny_recipe, tiny_manifest)
    other = changed(tiny_recipe, training={"epochs": 1})
    train(other, tmp_path / "run", None, cpu, Silent(), tiny_prepared, change_recipe=True)
    assert run_recipe(tmp_path / "run") == other
    assert train(other, tmp_path / "run", None, cpu, Silent(), tiny_prepared).epochs == 1


def test_weights_of_a_fine_tuning_that_never_began_are_not_taken(
    tiny_recipe, tmp_path, train_tiny, assert_same, cpu
) -> None:
    train_tiny(tiny_recipe, tmp_path / "plain")
    foreign = {name: torch.zeros_like(v) for name, v in Trainer.fresh(tiny_recipe, cpu).network.state_dict().items()}
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run" / "start.pt", {"model": foreign})
    with pytest.raises(CtsegError, match=r"holds start.pt, but no run of ctseg, which would replace them"):
        train_tiny(tiny_recipe, tmp_path / "run")
    (tmp_path / "run" / ".starting").touch()  # it is of a start that was killed
    train_tiny(tiny_recipe, tmp_path / "run")
    assert_same(content(tmp_path / "run")["model"], content(tmp_path / "plain")["model"])


def test_a_stop_stays_a_stop_when_the_curves_cannot_be_drawn(tiny_recipe, tmp_path, train_tiny, monkeypatch) -> None:
    def full(*_args, **_options) -> None:
        raise OutputError("cannot write 'curves.png': disk full")

    monkeypatch.setattr(fit.Recorder, "close", full)
    with pytest.raises(Stopped):
        train_tiny(tiny_recipe, tmp_path / "run", stop_after=1)


def test_an_overflow_of_the_network_in_float16_is_an_error(tiny_recipe, tmp_path, train_tiny, monkeypatch) -> None:
    monkeypatch.setattr("ctseg.engine.step.Stepper.step", lambda *_: torch.tensor(math.inf))
    with pytest.raises(CtsegError, match=r"the loss of epoch 1 is inf; lower optimizer.lr"):
        train_tiny(tiny_recipe, tmp_path / "run")


def test_unknown_or_too_many_frozen_weights_are_refused(tiny_recipe: Recipe, cpu: Runtime, changed) -> None:
    with pytest.raises(CtsegError, match="no parameter starts with 'modle'"):
        Trainer.fresh(changed(tiny_recipe, training={"freeze": ["modle"]}), cpu)
    with pytest.raises(CtsegError, match="nothing is left to train"):
        Trainer.fresh(changed(tiny_recipe, training={"freeze": ["model"]}), cpu)


def test_early_stopping_waits_for_a_validation(tiny_recipe, tmp_path, train_tiny, changed, monkeypatch) -> None:
    """Validated every second epoch: after three epochs without a rise it ends with the fourth, not the third."""
    scores = iter([0.7, 0.5, 0.4, 0.3])
    monkeypatch.setattr(fit, "bank_dice", lambda *_: [next(scores)])
    training = {"epochs": 8, "early_stop_epochs": 3, "validation_interval_epochs": 2}
    assert train_tiny(changed(tiny_recipe, training=training), tmp_path / "run").epochs == 6


def test_early_stopping_ends_when_validation_rises_no_more(
    tiny_recipe: Recipe, tmp_path: Path, train_tiny, changed, monkeypatch
) -> None:
    scores = iter([0.2, 0.7, 0.5, 0.7, 0.6, 0.9])
    monkeypatch.setattr(fit, "bank_dice", lambda *_: [next(scores)])
    result = train_tiny(changed(tiny_recipe, training={"epochs": 6, "early_stop_epochs": 3}), tmp_path / "run")
    assert (result.epochs, result.best_epoch) == (5, 2)
    again = train_tiny(changed(tiny_recipe, training={"epochs": 6, "early_stop_epochs": 3}), tmp_path / "run")
    assert again.epochs == 5  # resumed after its end, it trains no further


def test_another_recipes_checkpoint_is_refused(tiny_recipe: Recipe, cpu: Runtime, tmp_path: Path, changed) -> None:
    Trainer.fresh(tiny_recipe, cpu).save(tmp_path)
    with pytest.raises(ModelError, match="written by another recipe"):
        Trainer.fresh(changed(tiny_recipe, optimizer={"lr": 1e-4}), cpu).load(tmp_path)


@pytest.mark.parametrize("part", ["model", "optimizer", "scaler", "epoch", "step", "losses", "history"])
def test_an_incomplete_checkpoint_is_refused(tiny_recipe: Recipe, cpu: Runtime, tmp_path: Path, part: str) -> None:
    Trainer.fresh(tiny_recipe, cpu).save(tmp_path)
    saved = content(tmp_path)
    del saved[part]
    save_checkpoint(tmp_path / "last.pt", saved)
    with pytest.raises(ModelError, match="incomplete or damaged"):
        Trainer.fresh(tiny_recipe, cpu).load(tmp_path)


def test_a_run_may_change_its_precision(tiny_recipe: Recipe, cpu: Runtime, tmp_path: Path) -> None:
    """Started in float32, resumed in mixed precision, and back: the loss scale starts anew or is dropped."""
    mixed = Runtime(torch.device("cpu"), "float16")
    Trainer.fresh(tiny_recipe, cpu).save(tmp_path)
    resumed = Trainer.fresh(tiny_recipe, mixed)
    resumed.load(tmp_path)
    assert resumed.scaler.get_scale() == 2.0**16
    resumed.scaler.scale(torch.ones(1))  # makes the scaler's state
    resumed.scaler.update(512.0)
    resumed.save(tmp_path)
    again = Trainer.fresh(tiny_recipe, mixed)
    again.load(tmp_path)
    assert again.scaler.get_scale() == 512.0
    Trainer.fresh(tiny_recipe, cpu).load(tmp_path)
