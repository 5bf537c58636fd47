"""Real images that ship with the package; README.md in this folder names their source."""

from pathlib import Path

__all__ = ["sample_paths"]


def sample_paths() -> list[Path]:
    """Paths of the sample images, each named after its class.

    Returns:
        Sorted paths.
    """
    return sorted(Path(__file__).parent.glob("*.jpg"))
