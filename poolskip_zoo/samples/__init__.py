"""Real images that ship with the package; README.md in this folder names their source."""

from collections.abc import Iterable
from pathlib import Path

__all__ = ["first_name", "road_scene", "sample_class", "sample_paths"]


def sample_paths(labels: Iterable[str] | None = None) -> list[Path]:
    """Paths of the sample images, each named after its class.

    Args:
        labels: class names of a model, synonyms after a comma as timm has them; None takes all images.

    Returns:
        Sorted paths of the images whose class is among them.
    """
    paths = sorted(Path(__file__).parent.glob("*.jpg"))
    if labels is None:
        return paths
    known = {first_name(label) for label in labels}
    return [path for path in paths if sample_class(path) in known]


def sample_class(path: Path) -> str:
    """Class of a sample image.

    Args:
        path: one of `sample_paths`.

    Returns:
        The first name of its class.

    Example:
        >>> sample_class(Path("school_bus.jpg"))
        'school bus'
    """
    return path.stem.replace("_", " ")


def first_name(label: str) -> str:
    """First of a class's names.

    Args:
        label: names with commas between.

    Returns:
        What stands before the first comma.
    """
    return label.partition(",")[0]


def road_scene() -> tuple[Path, Path]:
    """Paths of a road scene and of its labels, those of CamVid: 0 to 10, and 11 for void.

    Returns:
        The image, 360×480 pixels, and a PNG of the same size.
    """
    folder = Path(__file__).parent / "road"
    return folder / "image.webp", folder / "labels.png"
