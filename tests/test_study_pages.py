"""What pages, README and cards say of the study, held to its runs."""

import csv
import dataclasses
import re
from pathlib import Path

import pytest

from poolskip_zoo.study.results import Run, summary, verdict, welch

ROOT = Path(__file__).resolve().parent.parent


def recorded(study: str = "study") -> list[Run]:
    """The runs of a study's `runs.csv` in docs/."""
    kinds = {field.name: field.type for field in dataclasses.fields(Run)}
    read = lambda kind, text: text if kind is str else int(text) if kind is int else float(text) if text else None  # noqa: E731
    with (ROOT / "docs" / study / "runs.csv").open() as file:
        return [Run(**{key: read(kinds[key], text) for key, text in line.items()}) for line in csv.DictReader(file)]


@pytest.mark.parametrize("study", ["study", "study_longer", "study_decay", "study_decay_again", "study_decay_plain"])
def test_the_page_has_the_numbers_of_its_csv(study: str) -> None:
    page, runs = (ROOT / "docs" / f"{study}.md").read_text(encoding="utf-8"), recorded(study)
    told = {net: re.search(rf"^- {net}: (.*): no verdict yet\.$", page, re.M) for net in {run.net for run in runs}}
    unfinished = {net: found[1] for net, found in told.items() if found}
    assert summary(runs, unfinished) in page


@pytest.mark.parametrize("study", ["study_longer", "study_decay"])
def test_readme_says_the_verdict_of_the_other_runs(study: str) -> None:
    helps, mechanism = verdict(recorded(study), "resnet20_cifar")
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    numbers = re.findall(r"B − [CF] = \S+ \[\S+ \S+\]", helps)
    assert len(numbers) == 2
    assert all(number in said for number in numbers)
    supported = re.search(r"is supported .*?(B − C = \S+ \[\S+ \S+\])", mechanism)
    assert (supported is not None) == (study == "study_decay")
    assert supported is None or f"{supported[1]}, which supports the mechanism" in said


def test_readme_says_what_the_plain_net_shows() -> None:
    _, mechanism = verdict(recorded("study_decay_plain"), "plain20_cifar")
    found = re.search(r"is not supported .*?B − C = (\S+ \[\S+ \S+\])", mechanism)
    assert found
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"it is not supported: {found[1]}" in said


@pytest.mark.parametrize(
    ("study", "decay", "arms"),
    [("study_decay", 0.02, "CA"), ("study_decay_again", 0.01, "C"), ("study_decay_plain", 0.01, "CA")],
)
def test_readme_says_the_accuracy_of_the_runs_under_decay(study: str, decay: float, arms: str) -> None:
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    of = {arm: [r.test_top1 for r in recorded(study) if (r.arm, r.weight_decay) == (arm, decay)] for arm in "ABC"}
    for arm in arms:
        found, low, high = welch(of["B"], of[arm])
        assert f"B − {'base' if arm == 'A' else arm} = {found:+.2f} [{low:+.2f}, {high:+.2f}]" in said


def test_the_repetition_says_the_intervals_of_all_its_seeds() -> None:
    runs = [run for run in recorded("study_decay") if run.weight_decay == 0.01] + recorded("study_decay_again")
    page = " ".join((ROOT / "docs" / "study_decay_again.md").read_text(encoding="utf-8").split())
    for key, digits in (("inert", 1), ("dead", 1), ("test_top1", 2)):
        of = {arm: [getattr(run, key) for run in runs if run.arm == arm] for arm in "ABC"}
        assert {len(values) for values in of.values()} == {8}
        for arm in "CA":
            found, low, high = (f"{value:+.{digits}f}" for value in welch(of["B"], of[arm]))
            assert f"B − {arm} = {found} [{low}, {high}]" in page, (key, arm)


def test_readme_and_cards_say_the_verdict() -> None:
    helps, mechanism, *_ = verdict(recorded(), "resnet20_cifar")
    numbers = re.findall(r"B − [CF] = \S+ \[\S+ \S+\]", helps)
    assert len(numbers) == 2
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    cards = [path.read_text(encoding="utf-8") for path in (ROOT / "hub_cards").glob("*/README.md")]
    for text in (readme, *cards):
        said = " ".join(text.split())
        assert all(number in said for number in numbers)
        assert ("it is not shown that Pool Skip helps" in said) == ("it is not shown" in helps)
        assert ("the mechanism is supported" in said) == ("the mechanism is supported" in mechanism)
        assert ("nor was it put to the test" in said) == ("nor was it put to the test" in mechanism)


def test_cards_say_what_the_later_lists_found() -> None:
    longer, _ = verdict(recorded("study_longer"), "resnet20_cifar")
    found = [re.findall(r"B − F = (\S+ \[\S+ \S+\])", longer)]
    for study, net in (
        ("study_decay", "resnet20_cifar"),
        ("study_decay_again", "resnet20_cifar"),
        ("study_decay_plain", "plain20_cifar"),
    ):
        _, mechanism = verdict(recorded(study), net)
        found.append(
            re.findall(r"0\.01: B − C = (\S+ \[\S+ [^]]+\])", mechanism)
            or re.findall(r"B − C = (\S+ \[\S+ \S+\])", mechanism)
        )
    for path in (ROOT / "hub_cards").glob("*/README.md"):
        said = " ".join(path.read_text(encoding="utf-8").split())
        assert all(len(each) == 1 and each[0] in said for each in found), (path.parent.name, found)
