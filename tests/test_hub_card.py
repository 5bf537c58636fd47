"""Cards and folders of checkpoints: made from the record alone, checked file by file, copied."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from hub_records import NAME, make_record, make_weights
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from poolskip_zoo.cli import hub as hub_verb
from poolskip_zoo.cli import main
from poolskip_zoo.hub.card import card_text, check_front_matter, config, write_card
from poolskip_zoo.hub.verify import FILES, GOLDEN_TOLERANCE, pull, verify_folder
from poolskip_zoo.registry import resolve
from poolskip_zoo.registry.checkpoint import checkpoints
from poolskip_zoo.training import load_recipe

pytest_plugins = ["hub_fixtures"]

WEIGHTS = "model.safetensors"
RECIPE = "resnet20_cifar_poolskip.c10"


def assert_current(record, folder, to):
    """A folder is what `poolskip hub card` would make of its record and its weights."""
    assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)
    again = to / record.name
    again.mkdir(parents=True)
    for name in (WEIGHTS, "golden.safetensors"):
        shutil.copyfile(folder / name, again / name)
    write_card(record, again)
    assert (again / "README.md").read_bytes() == (folder / "README.md").read_bytes()
    # By value, for timm's order of entries is its own; so its sum is compared apart.
    assert json.loads((again / "config.json").read_text(encoding="utf-8")) == json.loads(
        (folder / "config.json").read_text(encoding="utf-8")
    )
    shutil.copyfile(folder / "config.json", again / "config.json")
    write_sums = "".join(
        f"{resolve.sha256_of(again / name)}  {name}\n"
        for name in ("README.md", "config.json", "golden.safetensors", WEIGHTS)
    )
    assert (folder / "SHA256SUMS").read_text(encoding="utf-8") == write_sums
    verify_folder(record, folder)


def test_all_cards_are_current(tmp_path):
    folder = resolve.hub_cards_dir()
    if folder is None:
        pytest.skip("an installation has no hub_cards/")
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        record.name for record in checkpoints(not_kept=True)
    }
    for record in checkpoints():
        assert_current(record, folder / record.name, tmp_path)
    for record in (each for each in checkpoints(not_kept=True) if not each.sha256):
        write_card(record, tmp_path / record.name)
        assert [file.name for file in (folder / record.name).iterdir()] == ["README.md"]
        assert (tmp_path / record.name / "README.md").read_bytes() == (folder / record.name / "README.md").read_bytes()


def test_a_made_folder_is_current_and_stale_files_are_noticed(trained, tmp_path):
    record, folder = trained
    assert_current(record, folder, tmp_path / "1")
    with pytest.raises(AssertionError):
        assert_current(dataclasses.replace(record, metrics={"top1": 91.26, "top5": 99.5}), folder, tmp_path / "2")
    with pytest.raises(AssertionError):
        assert_current(dataclasses.replace(record, licence="mit"), folder, tmp_path / "3")


def test_front_matter(trained):
    data = ModelCard.load(trained[1] / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "timm", "image-classification")
    assert data.datasets == ["uoft-cs/cifar10"]
    assert "pool-skip" in data.tags
    assert data.model_name == NAME
    assert [(r.dataset_name, r.dataset_split, r.metric_name, r.metric_value) for r in data.eval_results] == [
        ("CIFAR-10 (JPEG copy)", "test", "Top-1 accuracy, %", 91.25),
        ("CIFAR-10 (JPEG copy)", "test", "Top-5 accuracy, %", 99.5),
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [("license", "my-licence"), ("library_name", None), ("pipeline_tag", "cats"), ("datasets", ["me/set"]),
     ("datasets", []), ("model-index", None)],
)  # fmt: skip
def test_front_matter_that_the_hub_does_not_take(trained, key, value):
    _, front, body = (trained[1] / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    entries = yaml.safe_load(front)
    check_front_matter(f"---\n{yaml.safe_dump(entries)}---\n{body}")
    entries[key] = value
    with pytest.raises(ValueError, match="front matter"):
        check_front_matter(f"---\n{yaml.safe_dump(entries)}---\n{body}")


def test_a_card_says_what_a_reader_needs(trained):
    record, folder = trained
    text = (folder / "README.md").read_text(encoding="utf-8")
    blocks = text.split("```python\n")[1:]
    assert blocks[0].startswith("import poolskip_zoo")
    # The example runs, with the card's own shapes.
    namespace = {}
    exec(blocks[0].partition("```")[0], namespace)
    assert namespace["logits"].shape == (1, 10)
    for said in (
        f'"hf-hub:poolskip-zoo/{NAME}"', "local-dir:", "onnx", "no formal licence; research use", "seed 3", "a CPU",
        "0.25 hours", "123 images/s", "torch 2.9.0", "91.25", "One run with one seed", "not to the paper", "2×2",
        "@inproceedings", "arXiv:2409.13154", "`test_resnet_cifar`, not trained", "JPEG copy",
    ):  # fmt: skip
        assert said in text, said
    recipe = yaml.safe_load(text.split("```yaml\n")[1].partition("```")[0])
    assert recipe["epochs"] == load_recipe(record.recipe).epochs
    assert not [line for line in text.partition("```")[0].splitlines()[20:] if len(line) > 120]
    yet, done = "has not been trained by this recipe yet", "variant were trained by the same recipe"
    assert (yet in text, done in text) == (True, False)
    record = dataclasses.replace(record, base_scores={"top1": 90.0, "top5": 99.0})
    text = card_text(record)
    assert (yet in text, done in text) == (False, True)
    noted = card_text(dataclasses.replace(record, base_note="the base had an epoch less"))
    said = f"{done}, except that the base had an epoch less."
    assert noted.split() == text.replace(f"{done}.", said).split()


def test_a_card_has_the_twin_of_the_same_tag_beside_it(trained, register):
    record, folder = trained
    base = make_record(folder / WEIGHTS, "test_resnet_cifar.tiny", metrics={"top1": 88.8, "top5": 99.0}, hours=0.125)
    register(base)
    row = next(line for line in card_text(record).splitlines() if line.startswith("| `test_resnet_cifar.tiny`"))
    assert "88.80" in row
    assert "0.12" in row
    other = card_text(base)
    assert f"| `{NAME}` | 91.25" in other
    assert "placement" not in other
    assert "pool-skip" not in other.partition("# test")[0]
    register(dataclasses.replace(base, name="test_resnet_cifar.other"))
    assert "test_resnet_cifar.other" not in card_text(record)


def test_config_is_the_checkpoints_own(trained):
    record, _ = trained
    made = config(dataclasses.replace(record, licence="mit"))
    cfg = made["pretrained_cfg"]
    assert (made["architecture"], made["num_classes"], cfg["tag"], cfg["license"]) == (record.arch, 10, "tiny", "mit")
    assert made["label_names"][3] == "cat"
    assert "num_classes" not in made["model_args"], "HF transformers passes it a second time"
    assert (cfg["input_size"], cfg["mean"]) == ([3, 32, 32], [0.4914, 0.4822, 0.4465])
    assert not {"hf_hub_id", "url", "origin_url", "file"} & set(cfg)
    # Of a timm base, none of whose entries about its own weights must stay.
    cfg = config(dataclasses.replace(record, name="resnet18_poolskip.c10"))["pretrained_cfg"]
    assert (cfg["tag"], cfg["license"], cfg["num_classes"]) == ("c10", "apache-2.0", 10)
    assert not {"origin_url", "test_input_size", "test_crop_pct"} & set(cfg)


def test_an_unknown_recipe_is_refused(trained):
    with pytest.raises(ValueError, match="no recipe 'gone'"):
        card_text(dataclasses.replace(trained[0], recipe="gone"))


def test_a_card_tells_of_the_weights_that_training_began_with(trained, monkeypatch):
    assert "trained from scratch on" in " ".join(card_text(trained[0]).split())
    for init, said in (
        ("resnet50.first", "its training counts"),
        (
            "resnet50.tin200_r64_trunk64",
            "`poolskip train resnet50.tin200_r64_trunk32`, then `poolskip train resnet50.tin200_r64_trunk64` come "
            "first, with the same seed and `--output`, and count",
        ),
    ):
        monkeypatch.setattr("poolskip_zoo.hub.card._recipe", lambda record, init=init: f"name: a.b\ninit: {init}")
        text = " ".join(card_text(trained[0]).split())
        assert f"trained from the weights of `{init}` on" in text
        assert f"Training starts from the weights of `{init}`: {said} in the hours." in text


# --- verify and pull


def rewrite(path, content):
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_verify_notices_every_missing_and_changed_file(trained, name):
    record, folder = trained
    whole = (folder / name).read_bytes()
    assert verify_folder(record, folder) <= GOLDEN_TOLERANCE / 10
    rewrite(folder / name, whole.replace(whole[-5:-4], b"#"))
    with pytest.raises(RuntimeError, match="not the"):
        verify_folder(record, folder)
    (folder / name).unlink()
    with pytest.raises(RuntimeError, match=f"lacks {name}"):
        verify_folder(record, folder)


def test_verify_computes_the_golden_output(trained, capsys):
    """Outputs that differ are noticed where all hashes agree."""
    record, folder = trained
    stored = load_file(folder / "golden.safetensors")
    assert stored["input"].shape == (2, 3, 32, 32)
    for change, fine in ((GOLDEN_TOLERANCE / 5, True), (math.nan, False), (GOLDEN_TOLERANCE * 5, False)):
        output = stored["output"] * (1 + change)
        (folder / "golden.safetensors").unlink()
        save_file({"input": stored["input"], "output": output}, folder / "golden.safetensors")
        rewrite(folder / "README.md", b"")
        write_card(record, folder)
        assert main(["hub", "verify", NAME]) == (0 if fine else 1)
    assert "golden output differs by 5" in capsys.readouterr().err


def test_pull_makes_a_mirror(trained, tmp_path, capsys, monkeypatch):
    _, folder = trained
    assert main(["hub", "pull", NAME, "--to", str(tmp_path / "mirror")]) == 0
    assert sorted(p.name for p in (tmp_path / "mirror").rglob("*")) == sorted([NAME, *FILES])
    monkeypatch.setattr(resolve, "hub_cards_dir", lambda: None)
    monkeypatch.setenv(resolve.HUB_DIR_VARIABLE, str(tmp_path / "mirror"))
    x = torch.rand(1, 3, 32, 32)
    same = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(timm.create_model(NAME, pretrained=True).eval()(x), same(x))
    assert main(["hub", "pull", NAME, "--to", str(tmp_path / "mirror")]) == 0
    rewrite(tmp_path / "mirror" / NAME / WEIGHTS, b"")
    assert main(["hub", "pull", NAME, "--to", str(tmp_path / "mirror")]) == 2
    assert "not the recorded file" in capsys.readouterr().err


def test_two_pulls_at_once(trained, tmp_path, monkeypatch):
    record, _ = trained

    def late(copy, target):
        shutil.copytree(copy, target)
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(os, "replace", late)
    assert verify_folder(record, pull(record, tmp_path / "mirror")) < GOLDEN_TOLERANCE
    assert [each.name for each in (tmp_path / "mirror").iterdir()] == [NAME]


def test_pull_and_verify_from_the_hub(on_hub, tmp_path, capsys):
    assert main(["hub", "verify", NAME]) == 0
    assert verify_folder(on_hub, pull(on_hub, tmp_path / "mirror")) < GOLDEN_TOLERANCE


def test_a_broken_pull_leaves_nothing(trained, tmp_path):
    record, folder = trained
    rewrite(folder / "golden.safetensors", b"x")
    with pytest.raises(RuntimeError, match=r"golden\.safetensors"):
        pull(record, tmp_path / "mirror")
    assert list((tmp_path / "mirror").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify", "resnet18_poolskip.a1_in1k"], "no trained checkpoint 'resnet18_poolskip.a1_in1k'"),
        (["verify"], "or --all"),
        (["card", NAME, "--all"], "or --all"),
        (["add", "nowhere", "--scores", "-"], "no recipe.yaml"),
    ],
)
@pytest.mark.usefixtures("trained")
def test_mistakes_are_one_line(arguments, said, capsys):
    assert main(["hub", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error


# --- from a run to a folder


@pytest.fixture
def finished(tmp_path):
    """A run folder as `poolskip train` leaves it, but for the model, which is tiny; and its scores."""
    run = tmp_path / "run"
    run.mkdir()
    make_weights(run / WEIGHTS)
    (run / "recipe.yaml").write_text(load_recipe(RECIPE, ["seed=5"]).to_yaml())
    metrics = {
        "name": "test_resnet_cifar_poolskip.c10", "model": "test_resnet_cifar_poolskip", "dataset": "cifar10_jpeg",
        "seed": 5, "hardware": 'A "CPU"', "seconds": 1800.0, "images_per_second": 250.5, "versions": {"torch": "2.9.0"},
    }  # fmt: skip
    (run / "metrics.json").write_text(json.dumps(metrics))
    scores = {"name": metrics["name"], "dataset": "cifar10_jpeg", "top1": 90.10000000000001, "top5": 99.0, "loss": 0.3}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    return run


@pytest.fixture
def shipped(monkeypatch):
    """The tiny model has no recipe of its own."""
    from poolskip_zoo.hub import add

    record = add.Checkpoint
    monkeypatch.setattr(add, "Checkpoint", lambda **values: record(**{**values, "recipe": RECIPE}))


@pytest.mark.usefixtures("shipped")
def test_add_makes_a_folder_and_a_record_to_paste(finished, tmp_path, capsys, register):
    from poolskip_zoo.registry.checkpoint import Checkpoint

    cards = tmp_path / "hub_cards"
    arguments = ["hub", "add", str(finished), "--scores", str(tmp_path / "scores.json"), "--cards", str(cards)]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    source = "\n".join(line for line in first.splitlines() if not line.startswith("#"))
    (record,) = eval(f"({source})", {"Checkpoint": Checkpoint})
    assert (record.seed, record.hours, record.hardware, record.metrics["top1"]) == (5, 0.5, 'A "CPU"', 90.1)
    assert_current(record, cards / record.name, tmp_path / "again")
    register(record)
    assert main(arguments) == 0, "adding the same weights again is fine"
    assert capsys.readouterr().out == first
    text = (tmp_path / "scores.json").read_text(encoding="utf-8")
    (tmp_path / "scores.json").write_text(text, encoding="utf-16")  # as Windows' PowerShell writes
    assert main(arguments) == 0
    assert capsys.readouterr().out == first
    make_weights(finished / WEIGHTS, seed=1)
    assert main(arguments) == 2
    assert "never replaced" in capsys.readouterr().err


@pytest.mark.usefixtures("shipped")
def test_weights_that_are_too_large_leave_a_card_alone(finished, tmp_path, capsys, register):
    from poolskip_zoo.registry.checkpoint import Checkpoint, find

    cards = tmp_path / "hub_cards"
    scores = ["--scores", str(tmp_path / "scores.json"), "--without-weights", "--cards", str(cards)]
    assert main(["hub", "add", str(finished), *scores]) == 0
    source = "\n".join(line for line in capsys.readouterr().out.splitlines() if not line.startswith("#"))
    (record,) = eval(f"({source})", {"Checkpoint": Checkpoint})
    assert record.sha256 == ""
    assert [file.name for file in (cards / record.name).iterdir()] == ["README.md"]
    text = " ".join((cards / record.name / "README.md").read_text(encoding="utf-8").split())
    assert "The weights are not kept, because of their size" in text
    assert f"`poolskip validate {RECIPE} --checkpoint runs/{RECIPE}-s5/model.safetensors" in text
    assert "`test_resnet_cifar_poolskip.c10`, weights not kept | 90.10" in text
    assert "SHA256SUMS" not in text
    register(record)
    assert find(record.name) is None
    assert record not in checkpoints()
    assert record in checkpoints(not_kept=True)
    for action in ("verify", "publish"):
        assert main(["hub", action, record.name]) == 2
        assert "has only a card" in capsys.readouterr().err


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize(
    "wrong",
    ["recipe", "scores", "data", "no score", "list", "cut", "weights", "nan", "unfinished", "short", "damaged", "path"],
)
def test_add_refuses_what_a_card_could_not_tell(finished, tmp_path, capsys, wrong):
    if wrong == "recipe":
        (finished / "recipe.yaml").write_text(load_recipe(RECIPE, ["epochs=7", "lr=0.3"]).to_yaml())
    elif wrong == "scores":
        (tmp_path / "scores.json").write_text('{"name": "resnet20_cifar", "dataset": "cifar10_jpeg", "top1": 1}')
    elif wrong == "data":
        scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
        (tmp_path / "scores.json").write_text(json.dumps({**scores, "dataset": "cifar100"}))
    elif wrong == "no score":
        scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
        (tmp_path / "scores.json").write_text(json.dumps({**scores, "top1": float("nan")}))
    elif wrong in ("short", "damaged"):
        (finished / "metrics.json").write_text('{"name": "x"}' if wrong == "short" else "{")
    elif wrong == "path":
        metrics = json.loads((finished / "metrics.json").read_text(encoding="utf-8"))
        (finished / "metrics.json").write_text(json.dumps({**metrics, "name": f"../{RECIPE}"}))
    elif wrong in ("list", "cut"):
        (tmp_path / "scores.json").write_text("[]" if wrong == "list" else '{"name": ')
    elif wrong == "weights":  # another run of the same model, whose file has the same name
        scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
        (tmp_path / "scores.json").write_text(json.dumps({**scores, "sha256": "0" * 64}))
    elif wrong == "nan":
        state = load_file(finished / WEIGHTS)
        state["fc.bias"][0] = float("nan")
        save_file(state, finished / WEIGHTS)
    else:
        (finished / "metrics.json").unlink()
    cards = tmp_path / "hub_cards"
    assert main(["hub", "add", str(finished), "--scores", str(tmp_path / "scores.json"), "--cards", str(cards)]) == 2
    said = {
        "recipe": "epochs, lr differ",
        "scores": "resnet20_cifar",
        "data": "the scores are of",
        "list": "scores.json is not what `poolskip validate … --json` prints",
        "cut": "scores.json is not valid JSON",
        "weights": "other weights",
        "nan": "fc.bias",
        "no score": "between 0 and 100",
        "unfinished": "metrics.json",
        "path": f"name '../{RECIPE}' is not a plain file name",
        "short": "metrics.json is damaged: it lacks dataset, hardware",
        "damaged": "metrics.json is damaged: Expecting",
    }
    assert said[wrong] in capsys.readouterr().err
    assert not list(cards.rglob("*"))


def test_add_refuses_a_size_that_the_checkpoint_would_not_load_with(tmp_path):
    for size, refused in ((0, False), (32, False), (64, True)):
        context = pytest.raises(ValueError, match="images of 64 pixels") if refused else contextlib.nullcontext()
        with context:
            hub_verb._check_arguments(tmp_path, load_recipe(RECIPE, [f"image_size={size}"]))


def test_add_takes_a_vit_that_was_trained_at_other_sizes_too(tmp_path):
    vit = load_recipe("vit_tiny_patch4_32_poolskip.c10_e11")
    assert vit.model_args == {"dynamic_img_size": True}
    hub_verb._check_arguments(tmp_path, vit)
    with pytest.raises(ValueError, match="model_args depth too"):
        hub_verb._check_arguments(tmp_path, dataclasses.replace(vit, model_args={"depth": 2}))


def test_card_writes_a_folder_again(trained, capsys):
    record, folder = trained
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    rewrite(folder / "README.md", b"old")
    (folder / "golden.safetensors").unlink()
    assert main(["hub", "card", record.name]) == 0
    assert {file.name: file.read_bytes() for file in Path(folder).iterdir()} == before
