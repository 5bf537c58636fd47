"""A tiny trained checkpoint with its folder, and the real Hub client talking to a server on this machine."""

import dataclasses
import os

import pytest
from hub_records import NAME, make_record, make_weights
from hub_server import TOKEN, HubServer, set_client
from timm.models import _registry as timm_registry

from poolskip_zoo.hub.card import write_card
from poolskip_zoo.hub.verify import WEIGHTS, checkpoint_cfg
from poolskip_zoo.registry import checkpoint as checkpoint_module
from poolskip_zoo.registry import resolve


@pytest.fixture
def register(monkeypatch):
    """Register a record with timm and with this package, until the test ends."""

    def add(record):
        if not record.sha256:
            monkeypatch.setitem(checkpoint_module._NOT_KEPT, record.name, record)
            return record
        monkeypatch.setitem(checkpoint_module._CHECKPOINTS, record.name, record)
        monkeypatch.setitem(timm_registry._model_pretrained_cfgs, record.name, checkpoint_cfg(record))
        return record

    return add


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The folder of the tiny checkpoint, whole; tests take copies."""
    folder = tmp_path_factory.mktemp("made") / NAME
    folder.mkdir()
    make_weights(folder / WEIGHTS)
    write_card(make_record(folder / WEIGHTS), folder)
    return folder


@pytest.fixture
def trained(made, tmp_path, monkeypatch, register):
    """The record, registered, and its folder in a temporary hub_cards/."""
    cards = tmp_path / "hub_cards"
    (cards / NAME).mkdir(parents=True)
    for file in made.iterdir():
        os.link(file, cards / NAME / file.name)
    monkeypatch.setattr(resolve, "hub_cards_dir", lambda: cards)
    monkeypatch.delenv(resolve.HUB_DIR_VARIABLE, raising=False)
    return register(make_record(made / WEIGHTS)), cards / NAME


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub, an empty cache and a token for the client; its settings are read when it is used, not only at import."""
    with HubServer() as server:
        set_client(
            monkeypatch,
            ENDPOINT=server.url,
            HUGGINGFACE_CO_URL_TEMPLATE=server.url + "/{repo_id}/resolve/{revision}/{filename}",
            HF_HUB_DISABLE_XET=True,
            HF_HUB_OFFLINE=False,
            HF_HUB_CACHE=str(tmp_path / "cache"),
            HF_TOKEN_PATH=str(tmp_path / "no-token"),
        )
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield server


@pytest.fixture
def on_hub(hub, trained, monkeypatch, register):
    """The tiny checkpoint on the Hub alone, its revision pinned."""
    record, folder = trained
    revision = hub.put(f"poolskip-zoo/{NAME}", {file.name: file.read_bytes() for file in folder.iterdir()}, "v1")
    monkeypatch.setattr(resolve, "hub_cards_dir", lambda: None)
    return register(dataclasses.replace(record, revision=revision))
