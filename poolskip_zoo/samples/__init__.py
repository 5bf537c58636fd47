"""Real images that ship with the package; README.md in this folder names their source."""

from pathlib import Path

__all__ = ["road_scene", "sample_paths"]


def sample_paths() -> list[Path]:
    """Paths of the sample images, each named after its class.

    Returns:
        Sorted paths.
    """
    return sorted(Path(__file__).parent.glob("*.jpg"))


def road_scene() -> tuple[Path, Path]:
    """Paths of a road scene and of its labels, those of CamVid: 0 to 10, and 11 for void.

    Returns:
        The image, 360×480 pixels, and a PNG of the same size.
    """
    folder = Path(__file__).parent / "road"
    return folder / "image.webp", folder / "labels.png"
