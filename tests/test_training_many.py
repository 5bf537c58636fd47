"""Lists of runs: order, limits, failures, parts, the summary."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training import PLAIN, call, data, recipe  # noqa: F401  data is a fixture

from poolskip_zoo.cli import train_many as verb
from poolskip_zoo.training import Recipe, join_weights, load_list, many, train, train_many
from poolskip_zoo.training.many import SUMMARY, split_weights, train_list


def rows(output: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((output / SUMMARY).open()))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(recipe(**{**PLAIN, "epochs": 1}).to_yaml())
    return path


def test_a_list_expands_to_seeds_and_changes(tmp_path: Path, tiny: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(
        f"- {tiny}\n- recipe: {tiny}\n  seeds: [1, 2]\n- recipe: {tiny}\n"
        "  set: {name: other.tiny, lr: 0.5, model_args: {drop_rate: 0.25}}\n"
    )
    recipes = load_list(path)
    assert [(each.name, each.seed) for each in recipes] == [
        *(("test_resnet.tiny", seed) for seed in (0, 1, 2)),
        ("other.tiny", 0),
    ]
    assert (recipes[3].lr, recipes[3].model_args) == (0.5, {"drop_rate": 0.25})


def test_small_numbers_in_a_list_stay_numbers(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "list.yaml").write_text(
        f"- {{recipe: {tiny}, set: {{optimizer: adamw, optimizer_args: {{eps: 1e-8}}}}}}"
    )
    (recipe,) = load_list(tmp_path / "list.yaml")
    assert recipe.optimizer_args == {"eps": 1e-8}


def test_a_grid_s_point_goes_before_what_is_set_for_all(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "list.yaml").write_text(f"- {{recipe: {tiny}, set: {{lr: 0.5}}, grid: [{{lr: 0.1}}, {{lr: 0.2}}]}}")
    assert [each.lr for each in load_list(tmp_path / "list.yaml")] == [0.1, 0.2]


def test_a_grid_of_segmentation_chooses_by_mean_intersection_over_union() -> None:
    metrics = {"name": "a", "val": {"miou": 1.0, "pixel_accuracy": 2.0}}
    assert many.held_out_accuracy(metrics) == 1


def test_shipped_lists_name_shipped_recipes() -> None:
    names = [recipe.name for recipe in load_list("c10")]
    assert names[:2] == ["resnet20_cifar.c10", "resnet20_cifar_poolskip.c10"]
    assert len(names) == 8
    assert len(load_list("camvid")) == 6
    trunk, base, variant = load_list("tin200_pair")
    assert trunk.init == ""
    assert base.init == variant.init == trunk.name
    assert dataclasses.replace(variant, name=base.name, model=base.model) == base
    with pytest.raises(FileNotFoundError, match=r"no shipped list of that name; shipped: .*c10"):
        load_list("c11")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "must be a YAML list"),
        ("- {recipe: x, seed: 1}", "mapping of recipe, seeds, set"),
        ("- {recipe: TINY, seeds: 1}", "seeds must be a list"),
        ("- {recipe: TINY, seeds: []}", "seeds must be a list of one or more"),
        ("- TINY\n- TINY", "with seed 0 twice"),
        ("- {recipe: TINY, set: {lrr: 1}}", "unknown recipe key 'lrr'"),
        ("- {recipe: TINY, seeds: [-1]}", "seed=-1"),
        ("- {recipe: TINY, grid: [{seed: 1}]}", "the grid has name or seed"),
        ("- {recipe: TINY, set: {lr: 2024-01-01}}", "lr='2024-01-01' must be of type float"),
        ("- {recipe: TINY, set: {lr: 2024-13-45}}", "list.yaml is not valid YAML: month must be in 1..12"),
        ("- {", "not valid YAML"),
    ],
)
def test_mistakes_in_a_list_are_named(tmp_path: Path, tiny: Path, text: str, said: str) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(text.replace("TINY", str(tiny)))
    with pytest.raises(ValueError, match=said):
        load_list(path)


def test_limit_stops_and_the_next_call_goes_on(data: Path, tmp_path: Path) -> None:  # noqa: F811
    short = {**PLAIN, "epochs": 1}
    recipes = [recipe(**short), recipe(**short, seed=1)]
    outcomes = train_many(recipes, data, tmp_path, limit_seconds=1e-6, cpu=True)
    assert {outcome.state for outcome in outcomes} == {"waiting"}
    outcomes = train_many(recipes, data, tmp_path, limit_seconds=1e-2, cpu=True)
    assert [outcome.state for outcome in outcomes] == ["stopped", "waiting"]
    assert [row["state"] for row in rows(tmp_path)] == ["stopped", "waiting"]
    assert [each.state for each in train_many(recipes, data, tmp_path, cpu=True)] == ["finished"] * 2
    # Past the limit a run that was finished before is not one that waits: it keeps its line.
    train_many([recipe(**short, seed=2), *recipes], data, tmp_path, limit_seconds=1e-2, cpu=True)
    assert [(row["state"], bool(row["val_top1"])) for row in rows(tmp_path)] == [
        *(("stopped", False), ("finished", True), ("finished", True))
    ]
    whole = train_many(recipes[:1], data, tmp_path / "whole", cpu=True)
    name = "test_resnet.tiny-s0/model.safetensors"
    stopped, straight = load_file(tmp_path / name), load_file(tmp_path / "whole" / name)
    assert all(torch.equal(stopped[key], straight[key]) for key in straight)
    assert whole[0].metrics is not None
    assert float(rows(tmp_path / "whole")[0]["hours"]) == round(whole[0].metrics["seconds"] / 3600, 4)
    with pytest.raises(ValueError, match="limit_seconds=-1 must"):
        train_many(recipes, data, tmp_path, limit_seconds=-1)


def _agree(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    assert many._agreed(rank == 0) is True
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_agree_on_whether_it_is_too_late(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_agree, (str(tmp_path),), nprocs=2)


def test_a_failed_run_keeps_none_of_the_others(data: Path, tmp_path: Path) -> None:  # noqa: F811
    short = {**PLAIN, "epochs": 1}
    wrong = {"name": "x.wrong", "model": "test_vit", "model_args": {"num_heads": 5}}
    recipes = [recipe(**{**short, "name": "x.diverges", "lr": 1e30}), recipe(**{**short, **wrong}), recipe(**short)]
    outcomes = train_many(recipes, data, tmp_path, cpu=True)
    assert [outcome.state for outcome in outcomes] == ["failed", "failed", "finished"]
    assert "the loss is nan at epoch 1" in outcomes[0].error
    assert "test_vit does not take model_args" in outcomes[1].error
    assert [row["state"] for row in rows(tmp_path)] == ["failed", "failed", "finished"]


def test_whatever_a_library_raises_is_a_failed_run(data: Path, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    def fail(*args: object, **kwargs: object) -> None:
        raise LookupError("odd")

    monkeypatch.setattr(many, "train", fail)
    (outcome,) = train_many([recipe()], data, tmp_path, cpu=True)
    assert (outcome.state, outcome.error) == ("failed", "LookupError: odd")
    # Beside other processes, which may wait for this one, it ends the process, and torchrun all of them.
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LookupError, match="odd"):
        train_many([recipe()], data, tmp_path, cpu=True)


def test_the_command_tests_once_and_leaves_parts(
    data: Path,  # noqa: F811
    tmp_path: Path,
    tiny: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "list.yaml").write_text(f"- {tiny}\n")
    arguments = (tmp_path / "list.yaml", "--data-dir", data, "--output", tmp_path / "runs", "--cpu", "--test")
    assert call(verb, *arguments, "--part-size", "350KB") == 0
    assert "test_resnet.tiny, seed 0: finished" in capsys.readouterr().out
    folder = tmp_path / "runs" / "test_resnet.tiny-s0"
    (row,) = rows(tmp_path / "runs")
    assert row["state"] == "finished"
    assert 0 <= float(row["test_top1"]) <= 100
    parts = sorted((folder / "parts").glob("*.safetensors"))
    assert len(parts) > 1
    assert all(part.stat().st_size < 360_000 for part in parts)
    with pytest.raises(ValueError, match="Unit 'XB' not supported"):
        split_weights(shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("parts")), "16XB")
    assert not list((tmp_path / "copy").glob(".*"))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    join_weights(folder)
    assert (folder / "model.safetensors").read_bytes() == whole
    (folder / "scores.json").write_text('{"top1": 12.5, "loss": 1.0}')  # a second look would write another number
    assert call(verb, *arguments) == 0
    assert rows(tmp_path / "runs")[0]["test_top1"] == "12.5"
    (folder / "model.safetensors").unlink()
    parts[0].unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {parts[0].name}"):
        join_weights(folder)


def test_a_point_that_diverges_is_the_worst_of_its_grid(
    data: Path,  # noqa: F811
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = {"recipe": str(tiny), "set": {"epochs": 1, "hold_out": 20}, "seeds": [0, 1]}
    entry["grid"] = [{"lr": 1e30}, {"lr": 0.01}]
    (tmp_path / "list.yaml").write_text(json.dumps([entry]))
    trained = []

    def counted(recipe: Recipe, *args: Any, **settings: Any) -> Any:
        trained.append((recipe.lr, recipe.seed))
        return train(recipe, *args, **settings)

    monkeypatch.setattr(many, "train", counted)
    outcomes = train_list(tmp_path / "list.yaml", data, tmp_path / "runs", cpu=True)
    ends = [(1e30, 0, "failed"), (0.01, 0, "finished"), (0.01, 1, "finished")]
    assert [(each.recipe.lr, each.recipe.seed, each.state) for each in outcomes] == ends
    assert trained.count((1e30, 0)) == 1  # though the list was gone through twice
    # A later call that is stopped on its way leaves the grid decided.
    assert train(outcomes[0].recipe, data, tmp_path / "runs", cpu=True, limit_steps=1) is None
    assert load_list(tmp_path / "list.yaml", tmp_path / "runs") == [each.recipe for each in outcomes]
    told = tmp_path / "runs" / f"{outcomes[0].recipe.name}-s0" / "diverged.txt"
    assert told.read_text().strip() == outcomes[0].error
    (tmp_path / "list.yaml").write_text(json.dumps([{**entry, "grid": [{"lr": 1e30}, {"lr": 1e31}]}]))
    outcomes = train_list(tmp_path / "list.yaml", data, tmp_path / "runs", cpu=True)
    assert [each.state for each in outcomes] == ["failed"] * 2
