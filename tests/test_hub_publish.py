"""Publishing with the real client to a Hub on this machine: whole, again, broken off, refused and betrayed."""

import json
import urllib.request

import pytest
import timm
import torch
from hub_records import NAME
from hub_server import set_client

from poolskip_zoo.cli import main
from poolskip_zoo.hub.publish import publish
from poolskip_zoo.hub.verify import FILES

pytest_plugins = ["hub_fixtures"]

REPO = f"acme/{NAME}"
WRITES = "^(POST|PUT) .*(commit|lfs/|tag/)"


def run(*arguments):
    return main(["hub", "publish", NAME, "--org", "acme", *arguments])


def stored(hub):
    """The files of the repository's main branch."""
    entries = hub.repos[REPO]["commits"][hub.repos[REPO]["main"]]
    return {name: hub.blobs[digest] for name, digest in entries.items() if name != ".gitattributes"}


def assert_published(hub, folder):
    assert stored(hub) == {name: (folder / name).read_bytes() for name in FILES}
    assert hub.repos[REPO]["tags"] == {"v0.1.0": hub.repos[REPO]["main"]}


def test_publish_then_load_then_publish_again(hub, trained, capsys):
    _, folder = trained
    (folder / "model.bin").write_bytes(b"a pickle")
    assert run() == 0
    assert_published(hub, folder)
    commit = hub.repos[REPO]["main"]
    assert f'revision="{commit}"' in capsys.readouterr().out
    assert hub.requests("^PUT /lfs"), "weights go by LFS"
    model = timm.create_model(f"hf-hub:{REPO}@v0.1.0", pretrained=True).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(x), timm.create_model(NAME, pretrained=True).eval()(x))
    before = json.dumps(hub.repos, sort_keys=True)
    hub.log.clear()
    assert run() == 0
    assert json.dumps(hub.repos, sort_keys=True) == before
    assert hub.requests("^PUT|/tag/") == []
    assert f'revision="{commit}"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("where", "fault"),
    [
        ("POST /api/repos/create", 503),
        ("/preupload/", 503),
        ("PUT /lfs", "drop"),
        ("/commit/", 503),
        ("/commit/", "drop"),
        ("/tag/", 503),
        ("GET .*/resolve/.*model.safetensors", 503),
        ("GET .*/resolve/.*config.json", "cut"),
    ],
)
def test_broken_off_the_next_run_completes_it(hub, trained, capsys, where, fault, monkeypatch):
    # As many faults as the client has tries, without its pauses.
    hub.faults[where] = [fault] * 50
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert run() == 2
    error = capsys.readouterr().err
    assert error.count("poolskip: error: ") == 1
    assert REPO in error.splitlines()[-1]
    hub.faults.clear()
    assert run() == 0
    assert_published(hub, trained[1])


def test_a_download_that_drops_breaks_nothing(hub, trained):
    hub.faults["GET .*/resolve/.*model.safetensors"] = ["drop"]
    assert run() == 0 or run() == 0  # newer clients resume
    assert_published(hub, trained[1])


@pytest.mark.parametrize("name", ["model.safetensors", "README.md"])
def test_wrong_bytes_that_come_back_are_noticed(hub, trained, capsys, name):
    hub.faults[f"GET .*/resolve/.*{name}"] = ["wrong"]
    assert run() == 2
    assert f"{name} came back with other bytes" in capsys.readouterr().err
    assert run() == 0


@pytest.mark.parametrize("token", [None, "hf_other"])
def test_a_missing_or_wrong_token_is_one_line(hub, trained, capsys, monkeypatch, token):
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert run() == 2
    error = capsys.readouterr().err
    assert "hf auth login" in error
    assert error.count("\n") == 1
    assert hub.repos == {}


def test_a_changed_card_is_a_new_commit_and_no_moved_tag(hub, trained, capsys):
    _, folder = trained
    assert run() == 0
    old = hub.repos[REPO]["main"]
    hub.put(REPO, {"README.md": b"edited on the Hub"})
    assert run() == 0
    assert stored(hub)["README.md"] == (folder / "README.md").read_bytes()
    assert hub.repos[REPO]["tags"] == {"v0.1.0": old}
    assert f"stays at {old}" in capsys.readouterr().out


def test_private_repositories_need_the_token(hub, trained):
    assert run("--private") == 0
    assert hub.repos[REPO]["private"]
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"{hub.url}/{REPO}/resolve/main/README.md")


def test_dry_run_offline_and_a_broken_folder_ask_nothing(hub, trained, capsys, monkeypatch):
    record, folder = trained
    assert run("--dry-run") == 0
    assert f"{REPO}: would upload 5 files" in capsys.readouterr().out
    with monkeypatch.context() as offline:
        set_client(offline, HF_HUB_OFFLINE=True)
        with pytest.raises(RuntimeError, match="HF_HUB_OFFLINE"):
            publish(record, folder)
    (folder / "README.md").unlink()
    (folder / "README.md").write_text("other")
    for option in ((), ("--dry-run",)):
        assert run(*option) == 2
        assert "README.md is not the file" in capsys.readouterr().err
    assert hub.requests() == []
