"""From a checkpoint's record to a verified file on this machine: the one place that looks for weights."""

import errno
import hashlib
import importlib.util
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from timm.models import PretrainedCfg

from .catalogue import warm_starts
from .checkpoint import WEIGHTS, Checkpoint

__all__ = ["HUB_DIR_VARIABLE", "hub_cards_dir", "local_folder", "local_weights", "require_timm_weights", "sha256_of"]

# Names a folder with one folder per checkpoint, as `poolskip hub pull` makes it.
HUB_DIR_VARIABLE = "POOLSKIP_HUB_DIR"
# Where timm looks in its own repositories (timm/models/_hub.py).
_TIMM_FILES = (WEIGHTS, "pytorch_model.bin")
# Of each address of the Hub, which has about eight: an unreachable one is known after 20 s, not after minutes.
_CONNECT_SECONDS = 2.5
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def hub_cards_dir() -> Path | None:
    """`hub_cards/`, of cards and weights, beside the package's source in a checkout, or None in an installation."""
    root = Path(__file__).resolve().parent.parent
    # An installation has the cards, without weights, in a folder of this name.
    return root / "hub_cards" if (root / "pyproject.toml").is_file() else None


def local_folder(checkpoint: Checkpoint) -> Path | None:
    """First local folder with a checkpoint's weights, or None; RuntimeError if `POOLSKIP_HUB_DIR` names no folder.

    In order: a checkout's `hub_cards/`, `POOLSKIP_HUB_DIR`, the installed package `poolskip_zoo_weights`.
    """
    return next((each / checkpoint.name for each in _roots() if (each / checkpoint.name / WEIGHTS).is_file()), None)


def local_weights(checkpoint: Checkpoint, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Find a checkpoint's weights: in a local folder, the Hub client's cache, or on the Hub.

    RuntimeError, with the ways out, if there are none or their sha256 is not the recorded one; such a file of the cache
    is set aside, so that the next call downloads it anew, and files elsewhere are left as they are.
    """
    folder = local_folder(checkpoint)
    path = folder / WEIGHTS if folder else _from_hub(checkpoint, cache_dir)
    actual = sha256_of(path)
    if actual != checkpoint.sha256:
        told = _not_recorded(path, checkpoint, actual)  # before the file has another name
        raise RuntimeError(f"{told}. {'Put the right file there, or remove it' if folder else _set_aside(path)}")
    return path


def require_timm_weights(name: str, cfg: PretrainedCfg, cache_dir: str | os.PathLike[str] | None = None) -> None:
    """Check that timm will get its own weights, for which it would try for a minute and name no file.

    Args:
        name: `<arch>.<tag>` of the variant, or of timm's model.
        cfg: its configuration, timm's own but for a variant's name.
        cache_dir: folder of the Hub client's cache.

    Raises:
        RuntimeError: if the cache has no copy and the Hub cannot be reached.
    """
    import huggingface_hub

    repo, _, revision = (cfg.hf_hub_id or "").partition("@")
    if not repo:
        return
    files = [cfg.hf_hub_filename] if cfg.hf_hub_filename else list(_TIMM_FILES)
    cache = None if cache_dir is None else os.fspath(cache_dir)
    for file in files:
        cached = huggingface_hub.try_to_load_from_cache(repo, file, cache_dir=cache, revision=revision or None)
        if isinstance(cached, str):
            return
    try:
        _connect()
    except ConnectionError as error:
        raise RuntimeError(
            f"cannot get timm's weights for {name} ({files[0]} of {repo} on the Hugging Face Hub): {error}. "
            "Ways out: connect to the network and try again; load a file of timm's with "
            "pretrained_cfg_overlay={'file': PATH}; start from random weights with pretrained=False (smp: "
            "encoder_weights=None)"
        ) from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _roots() -> Iterator[Path]:
    cards = hub_cards_dir()
    if cards is not None:
        yield cards
    mirror = os.environ.get(HUB_DIR_VARIABLE)
    if mirror:
        folder = Path(mirror).expanduser()
        if not folder.is_dir():
            raise RuntimeError(f"{HUB_DIR_VARIABLE}={mirror!r} is not a folder")
        yield folder
    spec = importlib.util.find_spec("poolskip_zoo_weights")
    if spec is not None and spec.origin:
        yield Path(spec.origin).parent


def _from_hub(checkpoint: Checkpoint, cache_dir: str | os.PathLike[str] | None) -> Path:
    import huggingface_hub

    cache = None if cache_dir is None else os.fspath(cache_dir)
    repo, _, revision = checkpoint.hub_id.partition("@")
    if not revision:
        raise RuntimeError(_no_file(checkpoint, "it is not published there yet", published=False))
    # The sha256 decides, so a cached file needs no question to the Hub, which offline takes the client 25 s.
    cached = huggingface_hub.try_to_load_from_cache(repo, WEIGHTS, cache_dir=cache, revision=revision)
    if isinstance(cached, str) and Path(cached).is_file():
        return Path(cached)
    try:
        _connect()
        return Path(huggingface_hub.hf_hub_download(repo, WEIGHTS, revision=revision, cache_dir=cache))
    # The client raises OSError, ValueError and its own classes; each means that there is no file.
    except Exception as error:
        raise RuntimeError(_no_file(checkpoint, _reason(error, revision))) from error


def _connect() -> None:
    """Raise ConnectionError at once where the client would try for long."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set and the cache has no copy")
    url, proxies = urlsplit(constants.ENDPOINT), getproxies()
    if not url.hostname:
        raise ConnectionError(f"HF_ENDPOINT={constants.ENDPOINT!r} is not a URL such as https://huggingface.co")
    proxy, said = proxies.get(url.scheme) or proxies.get("all"), url.hostname
    if proxy and not proxy_bypass(url.hostname):
        url = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        said = f"the proxy {proxy!r}, by which {said} is asked for,"
    try:
        port = url.port or {"https": 443, "socks5": 1080, "socks5h": 1080}.get(url.scheme, 80)
        socket.create_connection((url.hostname or "", port), timeout=_CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:  # ValueError: of a port that is no number
        raise ConnectionError(f"{said} cannot be reached ({error})") from error


def _reason(error: Exception, revision: str) -> str:
    """What went wrong, in a few words; the classes' order is from special to general."""
    from huggingface_hub import utils

    code = getattr(error, "errno", None)
    status = getattr(getattr(error, "response", None), "status_code", None)
    known = (
        (code == errno.ENOSPC, "no space left on the disk of the cache; HF_HOME moves it"),
        (code in _NOT_WRITABLE, f"the cache is not writable ({error}); HF_HOME moves it"),
        (isinstance(error, utils.RevisionNotFoundError), f"the repository has no revision {revision}"),
        (
            isinstance(error, utils.RepositoryNotFoundError),
            "there is no such repository, or it is private and there is no token for it",
        ),
        (isinstance(error, utils.LocalEntryNotFoundError), "the Hub cannot be reached and the cache has no copy"),
        (isinstance(error, utils.EntryNotFoundError), "the repository has no such file"),
        (status is not None, f"the Hub answered with status {status}"),
    )
    plain = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return next((words for applies, words in known if applies), plain)


def _no_file(checkpoint: Checkpoint, reason: str, published: bool = True) -> str:
    repo = checkpoint.hub_id.partition("@")[0]
    start = next((name for name in warm_starts() if name.partition(".")[0] == checkpoint.arch), None)
    return (
        f"cannot get the weights of {checkpoint.name} ({WEIGHTS} of {repo} on the Hugging Face Hub): {reason}. Ways "
        f"out: {'connect to the network and try again; ' if published else ''}install the package "
        "poolskip-zoo-weights, which `make weights-wheel` builds in a checkout; put the file into "
        f"{checkpoint.name}/ of hub_cards/ in a checkout or of the folder that {HUB_DIR_VARIABLE} names (`poolskip hub "
        "pull` in a checkout fills one); load your own with pretrained_cfg_overlay={'file': PATH}"
        + (f"; start from the base model's weights with {start!r}, a warm start" if start else "")
    )


def _not_recorded(path: Path, checkpoint: Checkpoint, actual: str) -> str:
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    kind = (
        "an empty file"
        if not start
        else "a Git LFS pointer, whose file was not fetched"
        if start.startswith(b"version https://git-lfs")
        else "a web page"
        if start.startswith((b"<!doctype", b"<html"))
        else f"{path.stat().st_size:,} bytes, cut short or of another model"
    )
    return (
        f"{path} is not the recorded file of {checkpoint.name}, but {kind}: its sha256 is {actual}, expected "
        f"{checkpoint.sha256}"
    )


def _set_aside(path: Path) -> str:
    """Rename a bad file of the cache, and say so; its name in the cache is a link where the system has links."""
    target = path.resolve()
    try:
        target.replace(target.with_name(f"{target.name}.bad"))
        if path.is_symlink():
            path.unlink()
    except FileNotFoundError:
        pass  # another process was faster
    except OSError as error:
        return f"It cannot be set aside ({error.strerror}): remove it, or move the cache with HF_HOME"
    return f"It is set aside as {target.name}.bad; the next try downloads it anew"
