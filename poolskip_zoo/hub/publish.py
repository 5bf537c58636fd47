"""Publish a checkpoint's folder to the Hugging Face Hub, and prove that what arrives is what was sent."""

import tempfile
from pathlib import Path

from huggingface_hub.utils import LocalTokenNotFoundError

from .. import __version__
from ..registry.checkpoint import HUB_ORG, Checkpoint
from ..registry.resolve import sha256_of
from .verify import FILES, verify_folder

__all__ = ["publish"]


def publish(
    record: Checkpoint,
    folder: Path,
    org: str = HUB_ORG,
    *,
    private: bool = False,
    dry_run: bool = False,
) -> str | None:
    """Upload a verified folder, tag it, download it into an empty cache and verify that.

    Every step may have been done before: run twice it changes nothing, and after a break the next run goes on.
    Authentication is huggingface_hub's own.

    Args:
        record: the checkpoint.
        folder: its folder; only `FILES` are sent.
        org: organisation or user on the Hub.
        private: whether a new repository is private.
        dry_run: say what would be done, without any request.

    Returns:
        The commit to pin as the record's `revision`; None after a dry run.

    Raises:
        RuntimeError: if the folder is not what is recorded, the Hub refuses or fails, or what it gives back differs.
    """
    import huggingface_hub
    from huggingface_hub import constants

    repo, version = f"{org}/{record.name}", f"v{__version__}"
    verify_folder(record, folder)
    if dry_run:
        size = sum((folder / name).stat().st_size for name in FILES)
        print(f"{repo}: would upload {len(FILES)} files, {size:,} bytes, and tag them {version}")
        return None
    if constants.HF_HUB_OFFLINE:
        raise RuntimeError(f"{repo}: HF_HUB_OFFLINE is set")
    with tempfile.TemporaryDirectory(prefix="poolskip-publish-") as cache:
        try:
            commit = _upload(repo, folder, version, private)
            got = huggingface_hub.snapshot_download(repo, revision=commit, cache_dir=cache, allow_patterns=list(FILES))
        # The client raises OSError, ValueError, RuntimeError, its own classes and its HTTP library's.
        except Exception as error:
            raise RuntimeError(f"{repo}: {_reason(error)}") from error
        _compare(record, folder, Path(got), repo)
    print(f'{repo}: published and verified; pin it with revision="{commit}" in the record')
    if org != HUB_ORG:
        print(f"{repo}: the records look for {HUB_ORG}/{record.name}; HUB_ORG in registry/checkpoint.py decides that")
    return commit


def _upload(repo: str, folder: Path, version: str, private: bool) -> str | None:
    """Create, upload and tag, where that is not done yet; return the commit."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    message = f"{folder.name} {version}"
    api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=list(FILES), commit_message=message)
    commit = api.model_info(repo, revision="main").sha
    tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo).tags}
    if version not in tags:
        api.create_tag(repo, tag=version, revision=commit, exist_ok=True)
    elif tags[version] != commit:
        print(f"{repo}: {version} stays at {tags[version]}; tags are never moved")
    return commit


def _compare(record: Checkpoint, folder: Path, got: Path, repo: str) -> None:
    for name in FILES:
        if not (got / name).is_file():
            raise RuntimeError(f"{repo}: {name} did not arrive")
        if sha256_of(got / name) != sha256_of(folder / name):
            raise RuntimeError(f"{repo}: {name} came back with other bytes than {folder / name} has")
    verify_folder(record, got)


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    text = " ".join(str(error).split())[:300]
    if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
        return f"the Hub refuses ({text}). Log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
    return f"{type(error).__name__}: {text}. The same command goes on from here"
