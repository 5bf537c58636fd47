"""The study: its layers and nets, its list and rules, and the whole of it on tiny runs."""

import csv
import dataclasses
import json
import warnings
from pathlib import Path
from statistics import mean, variance
from typing import Any

import pytest
import torch
from test_study_pages import recorded
from test_training import PLAIN, assert_equal_runs, call, data, recipe  # noqa: F401  data is a fixture
from timm import create_model

from poolskip_zoo.cli import study as verb
from poolskip_zoo.cli import train_many as train_verb
from poolskip_zoo.layers import PoolSkip2d, pool_skip_modules
from poolskip_zoo.registry.catalogue import registered_models
from poolskip_zoo.study import nets
from poolskip_zoo.study.layers import ControlSkip2d, RandomSkip2d
from poolskip_zoo.study.results import ARMS, Run, arm_of, chosen, decays, reported, summary, verdict, welch
from poolskip_zoo.training import load_list, train
from poolskip_zoo.training.build import make_model

TINY = {"epochs": 1, "train_images": 60, "batch_size": 20, "hold_out": 20, "image_size": 16}
ROOT = Path(__file__).resolve().parent.parent
NAMES = [name for name in nets.__all__ if name.startswith(("plain", "resnet", "test"))]


def built(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return create_model(name, num_classes=10, **kwargs)


# --- layers and nets


def test_the_control_leaves_pooling_out() -> None:
    layer, x = ControlSkip2d(3), torch.randn(2, 3, 5, 7)
    torch.testing.assert_close(layer(x), x + layer.conv(x))


def kept_by(layer: RandomSkip2d, x: torch.Tensor) -> torch.Tensor:
    """The map that the layer convolves, as a mask."""
    seen = []
    with torch.no_grad():
        handle = layer.conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        layer(x)
        handle.remove()
    torch.testing.assert_close(seen[0], x * (seen[0] != 0))
    return seen[0] != 0


def test_random_positions_are_one_a_window_and_uniform() -> None:
    layer, x = RandomSkip2d(2), torch.rand(64, 2, 8, 10) + 1
    assert kept_by(layer, x).view(64, 2, 4, 2, 5, 2).sum((3, 5)).eq(1).all()
    share = torch.stack([kept_by(layer, x) for _ in range(20)]).float().mean((0, 1, 2))
    assert share.sub(0.25).abs().max() < 0.05  # 2,560 draws: 6 standard deviations
    # Partial windows at the edges have one each as well, also where the map comes in bfloat16.
    for map_ in (x[:, :, :7, :9], x[:, :, :7, :9].bfloat16()):
        mask = torch.nn.functional.pad(kept_by(layer.to(map_.dtype), map_), (0, 1, 0, 1))
        assert mask.view(64, 2, 4, 2, 5, 2).sum((3, 5)).eq(1).all()


def test_random_positions_follow_the_generator_and_stand_still_in_evaluation() -> None:
    layer, x = RandomSkip2d(2), torch.rand(3, 2, 8, 8) + 1
    torch.manual_seed(1)
    first = kept_by(layer, x)
    assert not torch.equal(first, kept_by(layer, x))
    torch.manual_seed(1)
    assert torch.equal(first, kept_by(layer, x))
    layer.eval()
    mask = kept_by(layer, x)
    assert torch.equal(mask, mask[:1].expand_as(mask))
    assert torch.equal(mask[:1], kept_by(layer, x[1:2]))
    layer.number = 1
    assert not torch.equal(mask, kept_by(layer, x))
    with pytest.raises(ValueError, match=r"\[2, 8, 8\]: expected 4 dimensions"):
        layer(x[0])


def test_arms_of_one_seed_start_from_the_same_weights() -> None:
    pool_skip = built("test_resnet_cifar_poolskip").state_dict()
    for name, kind in (("test_resnet_cifar_control", ControlSkip2d), ("test_resnet_cifar_random", RandomSkip2d)):
        model = built(name)
        layers = list(pool_skip_modules(model).values())
        assert {type(layer) for layer in layers} == {kind}
        assert [getattr(layer, "number", place) for place, layer in enumerate(layers)] == list(range(len(layers)))
        own = model.state_dict()
        assert own.keys() == pool_skip.keys()
        assert all(torch.equal(own[key], value) for key, value in pool_skip.items())
    base = built("test_resnet_cifar").state_dict()
    assert all(torch.equal(pool_skip[key], value) for key, value in base.items())
    plain, maxima = built("test_plain_cifar"), built("test_plain_cifar_maxima")
    assert plain.state_dict().keys() == base.keys()
    assert {type(layer) for layer in pool_skip_modules(maxima).values()} == {PoolSkip2d}
    assert {type(layer) for layer in pool_skip_modules(built("test_plain_cifar_control")).values()} == {ControlSkip2d}


def test_plain_nets_have_no_way_around_their_convolutions() -> None:
    for name, passes in (("test_plain_cifar", False), ("test_resnet_cifar", True)):
        model = built(name).eval()
        torch.nn.init.zeros_(model.layer2[0].bn2.weight)
        out = model(torch.randn(2, 3, 32, 32))
        assert torch.equal(out[0], out[1]) != passes


def test_nets_of_the_study_are_no_part_of_the_zoo() -> None:
    assert len(NAMES) == 10
    assert not set(NAMES) & set(registered_models(test=True))
    assert not any("_poolskip" in name for name in NAMES)


def test_random_positions_go_on_exactly(data: Path, tmp_path: Path) -> None:  # noqa: F811
    one = recipe(**{**PLAIN, **TINY, "name": "test_resnet_cifar.x", "model": "test_resnet_cifar_random"})
    train(one, data, tmp_path / "whole", cpu=True)
    assert train(one, data, tmp_path / "stopped", cpu=True, limit_steps=2) is None
    train(one, data, tmp_path / "stopped", cpu=True)
    assert_equal_runs(*(tmp_path / name / "test_resnet_cifar.x-s0" for name in ("whole", "stopped")))


# --- the list


def test_the_list_is_that_of_the_protocol(tmp_path: Path) -> None:
    recipes = load_list("study", tmp_path)
    assert {each.name.partition("_wd")[0].partition("_lr")[0].partition("_weight")[0] for each in recipes} == {
        *(f"resnet20_cifar.study-{arm}" for arm in ARMS),
        *(f"plain20_cifar.study-{arm}" for arm in "ABC"),
    }
    shared = ("epochs", "train_images", "hold_out", "batch_size", "precision", "warmup_epochs")
    assert len({tuple(getattr(each, key) for key in shared) for each in recipes}) == 1
    halves = [load_list("study", tmp_path, (part, 2)) for part in (1, 2)]
    assert sorted(map(str, halves[0] + halves[1])) == sorted(map(str, recipes))
    with pytest.raises(ValueError, match="share 3/2: expected"):
        load_list("study", tmp_path, (3, 2))
    parameters = {each.model: sum(p.numel() for p in make_model(each).parameters()) for each in recipes}
    assert parameters["resnet20_cifar_control"] == parameters["resnet20_cifar_random"] == 560_698
    assert parameters["resnet38_cifar"] == 561_370


def test_the_longer_list_takes_the_settings_that_the_study_chose(tmp_path: Path) -> None:
    longer, short = load_list("study_longer", tmp_path), {each.recipe: each for each in recorded()}
    assert len(longer) == 4 * 5
    assert {each.seed for each in longer}.isdisjoint(run.seed for run in short.values())
    for arm in "ABCF":
        settings = {(each.lr, each.weight_decay) for each in longer if arm_of(each.name)[1] == arm}
        best = chosen(recorded(), "resnet20_cifar", arm, 5e-4)[0]
        assert settings == {(best.lr, best.weight_decay)}
    first = load_list("study", tmp_path)[0]
    changed = {"name", "model", "lr", "weight_decay", "seed", "train_images", "epochs"}
    fields = {field.name for field in dataclasses.fields(first)} - changed
    assert all(getattr(each, key) == getattr(first, key) for each in longer for key in fields)


def test_the_lists_of_strong_decay_differ_from_the_study_in_that_alone(tmp_path: Path) -> None:
    names = ("study_decay", "study_decay_again", "study_decay_plain")
    first, again, plain = (load_list(name, tmp_path) for name in names)
    assert (len(first), len(again), len(plain)) == (7 * 4, 3 * 4, 3 * 6)
    seeds = [{each.seed for each in recipes} for recipes in (first, again, plain)]
    seeds += [{run.seed for run in recorded(name)} for name in ("study", "study_longer")]
    assert len(set.union(*seeds)) == sum(map(len, seeds))
    changed = {"name", "model", "weight_decay", "optimizer_args", "lr", "seed"}
    fields = {field.name for field in dataclasses.fields(first[0])} - changed
    study = load_list("study", tmp_path)[0]
    assert all(getattr(each, key) == getattr(study, key) for each in first + again + plain for key in fields)
    assert {str(each.optimizer_args) for each in first + again + plain} == {"{'filter_bias_and_bn': False}"}
    assert {(each.lr, each.weight_decay) for each in first} == {(0.1, 0.01), (0.1, 0.02)}
    others = {dataclasses.replace(each, seed=0).to_yaml() for each in first}
    assert {dataclasses.replace(each, seed=0).to_yaml() for each in again} < others
    arms = {(arm_of(each.name), each.model) for each in load_list("study", tmp_path)}
    assert {(arm_of(each.name), each.model) for each in plain} < arms
    assert {(each.lr, each.weight_decay) for each in plain} == {(0.1, 0.01)}


def test_a_grid_goes_on_with_the_best_point(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(recipe(**{**PLAIN, "name": "x.study-A"}).to_yaml())
    path = tmp_path / "list.yaml"
    path.write_text(f"- {{recipe: {tmp_path / 'one.yaml'}, grid: [{{lr: 0.1}}, {{lr: 0.3}}], seeds: [0, 1, 2]}}\n")
    first = load_list(path, tmp_path)
    assert [(each.name, each.lr, each.seed) for each in first] == [
        *(("x.study-A_lr0.1", 0.1, 0), ("x.study-A_lr0.3", 0.3, 0))
    ]
    for each, score in zip(first, (50.0, 60.0), strict=True):
        assert load_list(path, tmp_path) == first
        folder = tmp_path / f"{each.name}-s0"
        folder.mkdir()
        (folder / "recipe.yaml").write_text(each.to_yaml())
        (folder / "metrics.json").write_text(json.dumps({"val": {"top1": score}}))
    assert [(each.lr, each.seed) for each in load_list(path, tmp_path)] == [(0.1, 0), (0.3, 0), (0.3, 1), (0.3, 2)]
    # What was trained by another recipe decides nothing, and does not mix with what is yet to be trained.
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(", grid:", ", set: {epochs: 3}, grid:"))
    with pytest.raises(ValueError, match=r"x\.study-A_lr0\.1-s0 holds a run of another recipe \(epochs 2 -> 3\)"):
        load_list(path, tmp_path)
    path.write_text(f"- {{recipe: {tmp_path / 'one.yaml'}, grid: {{lr: [0.1]}}}}\n")
    with pytest.raises(ValueError, match="grid must be a list of mappings"):
        load_list(path, tmp_path)


def test_a_grid_chooses_only_for_further_seeds(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(recipe(**{**PLAIN, "hold_out": 0}).to_yaml())
    path = tmp_path / "list.yaml"
    entry = f"- {{recipe: {tmp_path / 'one.yaml'}, grid: [{{lr: 0.1}}, {{lr: 0.3}}]"
    path.write_text(f"{entry}}}\n")
    (first, *_) = recipes = load_list(path, tmp_path)
    for each in recipes:
        folder = tmp_path / f"{each.name}-s{each.seed}"
        folder.mkdir()
        (folder / "recipe.yaml").write_text(each.to_yaml())
        (folder / "metrics.json").write_text(json.dumps({"name": each.name, "val": None}))
    assert load_list(path, tmp_path) == recipes
    path.write_text(f"{entry}, seeds: [0, 1]}}\n")
    with pytest.raises(ValueError, match=rf"{first.name} holds out no images \(hold_out=0\), by which a grid chooses"):
        load_list(path, tmp_path / "nothing is trained yet")


def test_settings_that_only_something_else_tells_apart_are_refused(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(recipe(**{**PLAIN, "name": "x.study-A"}).to_yaml())
    path = tmp_path / "list.yaml"
    path.write_text(f"- {{recipe: {tmp_path / 'one.yaml'}, grid: [{{batch_size: 32}}, {{batch_size: 64}}]}}\n")
    said = r"x\.study-A_batch_size32 and x\.study-A_batch_size64 are arm A of x at lr=\S+ weight_decay=\S+: the"
    with pytest.raises(ValueError, match=said):
        call(verb, tmp_path, "--list", path)
    path.write_text("- {recipe: unet_resnet18.camvid_r180, set: {name: x.study-A}}\n")
    with pytest.raises(ValueError, match=r"x\.study-A segments camvid: a study is of classifiers"):
        call(verb, tmp_path, "--list", path)


# --- the rules


def made(arm: str, scores: list[float], *, inert: int = 0, decay: float = 5e-4, lr: float = 0.1) -> list[Run]:
    """Runs of an arm with these test accuracies."""
    rest: dict[str, Any] = dict.fromkeys((field.name for field in dataclasses.fields(Run)), 1)
    rest.update(net="n", arm=arm, lr=lr, weight_decay=decay, recipe=f"{arm}{decay}{lr}", inert=inert, hardware="")
    return [Run(**{**rest, "seed": seed, "val_top1": score, "test_top1": score}) for seed, score in enumerate(scores)]


def test_the_interval_is_welchs() -> None:
    from scipy.stats import t

    a, b = [90.1, 90.5, 91.0], [89.0, 90.9, 90.2, 90.4]
    of_a, of_b = variance(a) / len(a), variance(b) / len(b)
    freedom = (of_a + of_b) ** 2 / (of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1))
    half, difference = t.ppf(0.975, freedom) * (of_a + of_b) ** 0.5, mean(a) - mean(b)
    assert welch(a, b) == pytest.approx((difference, difference - half, difference + half), abs=1e-9)
    # One arm without scatter leaves the other's degrees of freedom: t of 0.975 and 2 is 4.303.
    assert welch([1, 2, 3], [80] * 4) == pytest.approx((-78, -78 - 4.303 / 3**0.5, -78 + 4.303 / 3**0.5), abs=1e-3)
    assert welch([1, 1], [2, 2]) == (-1, -1, -1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert welch([80, 80, 80.00000000000001], [79, 79, 79]) == pytest.approx((1, 1, 1))
    with pytest.raises(ValueError, match="two seeds"):
        welch([1.0], [1.0, 2.0])


def test_settings_are_chosen_by_held_out_accuracy_of_the_first_seed() -> None:
    runs = [
        *(*made("A", [70, 50], lr=0.1), *made("A", [60], lr=0.05), *made("A", [69, 80], decay=1e-4)),
        *(*made("B", [1, 2]), *made("B", [1, 2], decay=1e-4), *made("C", [1, 2]), *made("C", [1], decay=1e-4)),
    ]
    assert [(run.weight_decay, run.lr, run.seed) for run in chosen(runs, "n", "A")] == [(5e-4, 0.1, 0), (5e-4, 0.1, 1)]
    assert [run.val_top1 for run in chosen(runs, "n", "A", 1e-4)] == [69, 80]
    assert decays(runs, "n") == [5e-4]  # C has one seed at 1e-4
    assert {(run.arm, run.weight_decay, run.lr) for run in reported(runs)} == {
        *((arm, 5e-4, 0.1) for arm in "ABC"),
    }


@pytest.mark.parametrize(
    ("c", "f", "helps"),
    [
        ([88, 88.1, 88.2], [87, 87.1, 87.2], True),
        ([88, 88.1, 88.2], [89.9, 90, 90.2], False),
        ([92, 93, 92], [80] * 3, False),
    ],
)
def test_it_helps_only_if_both_differences_are_above_zero(c: list[float], f: list[float], helps: bool) -> None:
    said = verdict([*made("B", [90, 90.1, 90.2]), *made("C", c), *made("F", f)], "n")[0]
    assert said.startswith("n: Pool Skip helps (" if helps else "n: it is not shown that Pool Skip helps (")


@pytest.mark.parametrize(
    ("b", "c", "says"),
    [
        ((3, 5), (3, 9), "the mechanism is supported ("),
        ((4, 5), (3, 9), "the mechanism is not supported ("),
        ((3, 9), (3, 9), "the mechanism is not supported ("),
        ((0, 0), (0, 0), "the mechanism is not supported, nor was it put to the test"),
    ],
)
def test_the_mechanism_needs_fewer_inert_filters(b: tuple[int, int], c: tuple[int, int], says: str) -> None:
    runs = [
        run
        for arm, counts in (("A", c), ("B", b), ("C", c))
        for decay, inert in zip((1e-4, 5e-4), counts, strict=True)
        for seed, run in enumerate(made(arm, [90, 90.1], decay=decay))
        for run in [dataclasses.replace(run, inert=inert + 0.1 * seed * bool(inert))]  # seeds that agree tell nothing
    ]
    sentences = verdict(runs, "n")
    assert sentences[0].startswith("n: no verdict on whether Pool Skip helps, which needs C and F")
    assert sentences[1].startswith(f"n: {says}")


def test_what_the_seeds_cannot_say_is_no_verdict() -> None:
    helps, mechanism = verdict([run for arm in "ABCF" for run in made(arm, [90])], "n")
    assert helps.startswith("n: no verdict on whether Pool Skip helps, which needs two seeds of each of B, C and F (")
    assert mechanism == "n: no verdict on the mechanism, which needs two seeds of A, B and C at a weight decay."
    agree = [run for arm, inert in zip("ABC", (9, 3, 4), strict=True) for run in made(arm, [90, 91], inert=inert)]
    said = "n: the mechanism is not supported, since seeds that agree give no interval (inert base filters at weight"
    assert verdict(agree, "n")[1].startswith(said)


@pytest.mark.parametrize(
    ("lost", "judged"), [("n.study-B", False), ("n.study-F", False), ("n.study-B_lr9", True), ("m.study-B", True)]
)
def test_runs_that_diverged_are_told_and_leave_no_verdict_where_they_count(lost: str, judged: bool) -> None:
    runs = [dataclasses.replace(run, recipe=f"n.study-{arm}") for arm in "ABC" for run in made(arm, [90, 91])]
    said = summary(runs, {}, [(lost, 1)])
    assert f"- {lost[0]}: diverged, in no number: {lost}-s1.\n" in said
    assert ("- n: no verdict, since runs that would count have diverged.\n" in said) != judged
    assert ("- n: the mechanism" in said) == judged


def test_cheap_forms_and_unfinished_nets_are_told() -> None:
    runs = [*made("B", [90, 90.1, 90.2]), *made("Bdepthwise", [90, 90.3, 90.1]), *made("B4", [80, 80.1, 80.2])]
    said = "\n".join(verdict(runs, "n"))
    assert "B″ cannot be told from B, or does better (B″ − B = +0.03 [" in said
    assert "B4 does worse than B (B4 − B = -10.00 [" in said
    assert "- n: 3 of 9: no verdict yet.\n" in summary(runs, {"n": "3 of 9"})


# --- all of it


def test_from_the_list_to_the_page(
    data: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "one.yaml").write_text(recipe(**{**PLAIN, **TINY, "model": "test_resnet_cifar"}).to_yaml())
    models = {"A": "test_resnet_cifar", "B": "test_resnet_cifar_poolskip", "C": "test_resnet_cifar_control"}
    entry = (
        "- {{recipe: {0}, set: {{name: t.study-{1}, model: {2}}}, seeds: [0, 1], grid: [{{lr: 0.1}}, {{lr: 0.02}}]}}\n"
    )
    text = "".join(entry.format(tmp_path / "one.yaml", arm, model) for arm, model in models.items())
    (tmp_path / "list.yaml").write_text(text.replace(", {lr: 0.02}]", "]", 2))  # a grid of two points for C alone
    page, runs = tmp_path / "study.md", tmp_path / "runs"
    page.write_text("\n".join(["above", *verb.MARKS, "below"]))
    train_command = (train_verb, tmp_path / "list.yaml", "--data-dir", data, "--output", runs, "--cpu")
    command = (verb, runs, "--list", tmp_path / "list.yaml", "--data-dir", data, "--images", 20)
    with pytest.raises(ValueError, match="no run of the list"):
        call(*command)
    assert call(*train_command, "--share", "1/3") == 0
    assert call(*command) == 0
    assert "- t: 2 runs finished of 6 or more: no verdict yet." in capsys.readouterr().out
    assert not list(runs.glob("*/scores.json"))
    assert call(*train_command) == 0
    assert call(*command, "--output", tmp_path / "out", "--page", page) == 0
    lines = list(csv.DictReader((tmp_path / "out" / "runs.csv").open()))
    assert sorted(line["arm"] + line["seed"] for line in lines) == ["A0", "A1", "B0", "B1", "C0", "C0", "C1"]
    tested = [line for line in lines if line["test_top1"]]
    assert [line["arm"] for line in tested] == ["A", "A", "B", "B", "C", "C"]  # the worse point of C's grid is not read
    assert len(list(runs.glob("*/scores.json"))) == 6
    assert {int(line["filters"]) for line in lines} == {8 + 2 * (8 + 16 + 32)}
    layers = list(csv.DictReader((tmp_path / "out" / "layers.csv").open()))
    assert sum(layer["kind"] == "pool_skip" for layer in layers) == 5 * 6
    for name in ("cost.png", "depth.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    written = page.read_text(encoding="utf-8")
    assert written.startswith("above\n")
    assert written.endswith("\nbelow")
    assert "![depth](out/depth.png)" in written
    assert "| C | y = x + conv(x) |" in written
    # The test set is read once: another call takes what was written.
    scores = next(runs.glob("t.study-A*-s0/scores.json"))
    scores.write_text('{"top1": 12.5}')
    assert call(*command, "--page", page) == 0
    assert page.read_text(encoding="utf-8").count(verb.MARKS[0]) == 1
    assert next(csv.DictReader((runs / "runs.csv").open()))["test_top1"] == "12.5"
    # What has diverged is not waited for.
    lost = next(runs.glob("t.study-C*-s1"))
    (lost / "metrics.json").rename(lost / "kept.json")
    (lost / "diverged.txt").write_text("the loss is nan\n")
    capsys.readouterr()
    assert call(*command) == 0
    said = capsys.readouterr().out
    assert (
        f"- t: no verdict, since runs that would count have diverged.\n- t: diverged, in no number: {lost.name}.\n"
        in said
    )
    (lost / "kept.json").rename(lost / "metrics.json")
    # Other images, another diagnosis.
    assert call(*command[:-1], 10) == 0
    assert {json.loads(path.read_text(encoding="utf-8"))["images"] for path in runs.glob("*/diagnosis.json")} == {10}
    # Runs of another recipe than the list's have no line: it would tell of settings that were not theirs.
    (tmp_path / "list.yaml").write_text(
        (tmp_path / "list.yaml").read_text(encoding="utf-8").replace("study-B,", "study-B, epochs: 9,")
    )
    with pytest.raises(ValueError, match=r"t\.study-B.* holds a run of another recipe \(epochs 1 -> 9\)"):
        call(*command)
    (tmp_path / "list.yaml").write_text((tmp_path / "list.yaml").read_text(encoding="utf-8").replace(" epochs: 9,", ""))
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no place for results"):
        call(*command, "--page", page)
