"""From a tag to a verified file: every place in its order, and every way in which it fails, with the real client."""

import contextlib
import dataclasses
import errno
import multiprocessing
import shutil
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from hub_records import NAME, make_weights
from hub_server import set_client
from huggingface_hub import constants
from safetensors.torch import load_file, save

from poolskip_zoo.registry import resolve
from poolskip_zoo.registry.checkpoint import find

pytest_plugins = ["hub_fixtures"]

WEIGHTS = "model.safetensors"
REPO = f"poolskip-zoo/{NAME}"
DAMAGE = {
    "cut": (lambda whole: whole[:-100], "cut short"),
    "html": (lambda whole: b"<!DOCTYPE html><html>sign in</html>", "a web page"),
    "lfs": (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    "flipped": (lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]), "of another model"),
    "empty": (lambda whole: b"", "an empty file"),
}


def load(name=NAME, **kwargs):
    return timm.create_model(name, pretrained=True, **kwargs).eval()


def fails(match, *said, name=NAME, **kwargs):
    """Loading fails in one line that names model, file and everything said."""
    with pytest.raises(RuntimeError, match=match) as caught:
        load(name, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    for part in (NAME, WEIGHTS, *said):
        assert part in message
    return message


def assert_is(model, file):
    for key, value in load_file(file).items():
        torch.testing.assert_close(model.state_dict()[key], value.to(model.state_dict()[key].dtype), rtol=0, atol=0)


def test_places_in_their_order(on_hub, trained, hub, monkeypatch, tmp_path, made):
    """hub_cards/, then POOLSKIP_HUB_DIR, then the installed package, then the Hub, then its cache."""
    package = tmp_path / "site" / "poolskip_zoo_weights"
    mirror = tmp_path / "mirror"
    for root in (package, mirror):
        shutil.copytree(made, root / NAME)
    (package / "__init__.py").touch()
    with monkeypatch.context() as local:
        local.syspath_prepend(package.parent)
        local.setenv(resolve.HUB_DIR_VARIABLE, str(mirror))
        local.setattr(resolve, "hub_cards_dir", lambda: trained[1].parent)
        for root in (trained[1].parent, mirror, package):
            assert resolve.local_weights(on_hub) == root / NAME / WEIGHTS
            shutil.rmtree(root / NAME)
    assert hub.requests() == []
    sys.modules.pop("poolskip_zoo_weights", None)
    from_hub = resolve.local_weights(on_hub)
    assert hub.requests() == [
        f"HEAD /{REPO}/resolve/{on_hub.revision}/{WEIGHTS}",
        f"GET /{REPO}/resolve/{on_hub.revision}/{WEIGHTS}",
    ]
    assert resolve.local_weights(on_hub) == from_hub
    assert len(hub.requests()) == 2, "a cached file needs no request"
    assert_is(load(), made / WEIGHTS)


def test_a_mirror_that_is_missing_is_named(on_hub, monkeypatch, tmp_path):
    monkeypatch.setenv(resolve.HUB_DIR_VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(RuntimeError, match=r"POOLSKIP_HUB_DIR=.*gone"):
        load()


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_bad_cache_entry_is_set_aside_and_downloaded_anew(on_hub, hub, kind, made):
    path = resolve.local_weights(on_hub)
    damage, said = DAMAGE[kind]
    content = damage(path.read_bytes())
    path.resolve().write_bytes(content)
    for kwargs in ({}, {"num_classes": 3}, {"features_only": True}):
        fails("sha256", said, str(path), on_hub.sha256, ".bad", "next try", **kwargs)
        aside = list(path.resolve().parent.parent.parent.rglob("*.bad"))
        assert [file.read_bytes() for file in aside] == [content]
        assert not path.is_symlink(), "a link to nowhere"
        assert_is(load(), made / WEIGHTS)
        path.resolve().write_bytes(content)
    assert len(hub.requests(f"GET .*{WEIGHTS}")) == 4


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_bad_file_in_a_folder_is_refused_and_left_alone(trained, kind):
    _, folder = trained
    damage, said = DAMAGE[kind]
    content = damage((folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).write_bytes(content)
    fails("sha256", said, str(folder / WEIGHTS))
    assert (folder / WEIGHTS).read_bytes() == content
    assert not list(folder.glob("*.bad"))


def test_wrong_bytes_of_the_right_size_from_the_hub(on_hub, hub, made):
    hub.faults[f"GET .*{WEIGHTS}"] = ["wrong"]
    fails("sha256", "next try")
    assert_is(load(), made / WEIGHTS)


def test_faults_of_the_connection_are_named_and_leave_nothing_bad(on_hub, hub, made):
    hub.faults[f"GET .*{WEIGHTS}"] = ["cut", 503]
    for _ in range(2):
        fails("cannot get the weights")
    hub.faults[f"GET .*{WEIGHTS}"] = ["drop"]
    with contextlib.suppress(RuntimeError):  # newer clients resume
        load()
    assert_is(load(), made / WEIGHTS)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.bad"))


def test_an_unreachable_hub_is_known_at_once(on_hub, hub, register):
    hub.http.shutdown()
    hub.http.server_close()
    started = time.perf_counter()
    fails("cannot be reached", REPO, "127.0.0.1", "network", "hub_cards/", "POOLSKIP_HUB_DIR", "'file': PATH")
    assert time.perf_counter() - started < 5
    assert find("resnet18_poolskip") is None
    record = register(dataclasses.replace(on_hub, name="resnet18_poolskip.c10"))
    with pytest.raises(RuntimeError, match=r"resnet18_poolskip\.c10 .*'resnet18_poolskip\.a1_in1k', a warm start"):
        resolve.local_weights(record)


@pytest.mark.parametrize("offline", [False, True])
def test_an_unreachable_hub_is_named_for_warm_starts_too(hub, monkeypatch, offline, tmp_path):
    name, repo = "resnet18_poolskip.a1_in1k", "timm/resnet18.a1_in1k"
    base = timm.create_model("resnet18").state_dict()
    hub.put(repo, {WEIGHTS: save(base)})
    warm = timm.create_model(name, pretrained=True, cache_dir=tmp_path / "warm").state_dict()
    assert all(torch.equal(warm[key], base[key]) for key in base)
    if offline:
        set_client(monkeypatch, HF_HUB_OFFLINE=True)
    hub.http.shutdown()
    hub.http.server_close()
    reason = "HF_HUB_OFFLINE is set" if offline else "cannot be reached"
    for kwargs in ({}, {"num_classes": 3}, {"features_only": True}):
        with pytest.raises(RuntimeError, match=rf"weights for {name} \(.*of {repo} .*{reason}.*'file': PATH"):
            timm.create_model(name, pretrained=True, cache_dir=tmp_path / "cold", **kwargs)
    assert timm.create_model(name, pretrained=True, cache_dir=tmp_path / "warm") is not None


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy"])
def test_what_is_behind_a_proxy_is_left_to_the_client(hub, monkeypatch, variable):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    set_client(monkeypatch, ENDPOINT="http://hub.invalid")
    with pytest.raises(ConnectionError, match=r"hub\.invalid cannot be reached"):
        resolve._connect()
    monkeypatch.setenv(variable, hub.url)
    resolve._connect()
    for proxy in ("http://127.0.0.1:9", "nonsense.invalid", "http://127.0.0.1:x"):
        monkeypatch.setenv(variable, proxy)
        with pytest.raises(ConnectionError, match=rf"the proxy '{proxy}', by which hub\.invalid is asked for"):
            resolve._connect()
    set_client(monkeypatch, ENDPOINT="hub.invalid")
    with pytest.raises(
        ConnectionError, match=r"HF_ENDPOINT='hub\.invalid' is not a URL such as https://huggingface\.co"
    ):
        resolve._connect()


def test_an_unreachable_hub_does_not_matter_with_a_cache(on_hub, hub, made):
    resolve.local_weights(on_hub)
    hub.http.shutdown()
    hub.http.server_close()
    assert_is(load(), made / WEIGHTS)


def test_offline_mode(on_hub, hub, monkeypatch, made):
    set_client(monkeypatch, HF_HUB_OFFLINE=True)
    fails("HF_HUB_OFFLINE is set and the cache has no copy", REPO)
    assert hub.requests() == []
    set_client(monkeypatch, HF_HUB_OFFLINE=False)
    resolve.local_weights(on_hub)
    set_client(monkeypatch, HF_HUB_OFFLINE=True)
    assert_is(load(), made / WEIGHTS)


def test_what_is_missing_on_the_hub_is_named(on_hub, hub, register, monkeypatch):
    register(dataclasses.replace(on_hub, revision="0" * 40))
    fails("no revision 0000", REPO)
    register(dataclasses.replace(on_hub, revision=hub.put(REPO, {})))
    hub.repos[REPO]["commits"][hub.repos[REPO]["main"]].pop(WEIGHTS)
    fails("no such file", REPO)
    hub.repos.clear()
    fails("no such repository, or it is private", REPO)
    asked = len(hub.requests())
    register(dataclasses.replace(on_hub, revision=None))
    fails("not published", REPO)
    assert len(hub.requests()) == asked


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on the disk"),
        (PermissionError(errno.EACCES, "Permission denied", "/cache"), "not writable"),
        (OSError(errno.EROFS, "Read-only file system", "/cache"), "not writable"),
    ],
)
def test_a_full_disk_and_a_read_only_cache(on_hub, monkeypatch, error, said):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    fails(said, "HF_HOME")


@pytest.mark.usefixtures("hub")
def test_a_cache_that_cannot_be_a_folder(on_hub, tmp_path):
    (tmp_path / "file").touch()
    fails("cannot get the weights", cache_dir=str(tmp_path / "file"))


def test_a_read_only_cache_serves_what_it_has(on_hub, monkeypatch, made):
    path = resolve.local_weights(on_hub)

    def refuse(self, target):
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "replace", refuse)
    assert_is(load(), made / WEIGHTS)
    path.resolve().write_bytes(b"")
    fails("sha256", "cannot be set aside (Read-only file system)", "HF_HOME")


def test_hub_and_folder_names_of_timm(on_hub, made):
    for name in (f"hf-hub:{REPO}", f"hf-hub:{REPO}@v1", f"local-dir:{made}"):
        model = load(name)
        assert_is(model, made / WEIGHTS)
        assert model.pretrained_cfg["license"] == "apache-2.0"
        assert model.pretrained_cfg["tag"] == "tiny"
    assert load(f"hf-hub:{REPO}", num_classes=3)(torch.rand(1, 3, 32, 32)).shape == (1, 3)


def test_weights_of_another_repository_are_those_that_were_asked_for(on_hub, hub, tmp_path):
    make_weights(tmp_path / WEIGHTS, seed=1)
    hub.put("someone/else", {WEIGHTS: (tmp_path / WEIGHTS).read_bytes()})
    assert_is(load(pretrained_cfg_overlay={"hf_hub_id": "someone/else"}), tmp_path / WEIGHTS)
    assert hub.requests(f"/{REPO}/") == []


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="starts processes by fork")
def test_two_processes_on_one_cold_cache(on_hub, hub):
    fork = multiprocessing.get_context("fork")
    start, found = fork.Barrier(2), fork.Queue()

    def ask():
        start.wait(20)
        found.put(str(resolve.local_weights(on_hub)))

    both = [fork.Process(target=ask) for _ in range(2)]
    for process in both:
        process.start()
    paths = {found.get(timeout=30) for _ in both}
    for process in both:
        process.join(30)
        assert process.exitcode == 0
    assert len(paths) == 1
    assert len(hub.requests(f"HEAD .*{WEIGHTS}")) == 2
    assert len(hub.requests(f"GET .*{WEIGHTS}")) == 1
