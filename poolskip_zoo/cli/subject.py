"""The model that a verb's words stand for: a name, a folder, a file or a call of a function."""

import io
import re
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

FRESH = "fresh weights"
# A function of a module, and its arguments: MODULE:FUNCTION or MODULE:FUNCTION(ARGUMENTS).
_CALL = re.compile(r"(?P<module>[\w.]+):(?P<function>[\w.]+)(?P<arguments>\(.*\))?", re.DOTALL)


@dataclass
class Subject:
    """A model in evaluation mode on the CPU, and what is known of it.

    Attributes:
        name: what it was called by.
        model: the model.
        weights: where its weights are from, for people.
        dataset: what it was trained on, if that is known.
        recipe: what it was trained by, of a run or a recorded checkpoint.
        sha256: of its weights, where they are ours.
    """

    name: str
    model: Any
    weights: str
    dataset: str | None = None
    recipe: Any = None
    sha256: str | None = None

    @property
    def segments(self) -> bool:
        """Whether it gives every pixel a class, as far as is known."""
        return self.recipe is not None and self.recipe.segments

    @property
    def has_seen_all(self) -> bool:
        """Whether its recipe held out none of the data set's training images."""
        return self.recipe is not None and (self.recipe.dataset, self.recipe.hold_out) == (self.dataset, 0)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of what the model was trained on; ValueError if it does not say."""
        if not hasattr(self.model, "pretrained_cfg"):
            raise ValueError(f"{self.name} does not say what size of images it takes: a model of timm or ours does")
        return tuple(self.model.pretrained_cfg["input_size"])


def load(
    name: str,
    checkpoint: str | None = None,
    dataset: str | None = None,
    pretrained: bool | None = True,
    way_out: str = "`poolskip list --pretrained` prints those that have",
) -> Subject:
    """Make the model that is meant.

    Args:
        name: name of timm's or ours, run folder, folder of timm or smp (with or without `local-dir:`), weights beside
            their recipe.yaml or config.json, `hf-hub:` repository, or a call of a Python function.
        checkpoint: file of the weights of the model of that name.
        dataset: what they were trained on, if no recipe stands beside them.
        pretrained: whether with weights; None gives a name without tag fresh ones, and all else its own.
        way_out: what to do where a name has none, for the message.

    Returns:
        The model and what is known of it.

    Raises:
        ValueError: if there is no such model, file, folder, function or data set, or no such weights.
        FileNotFoundError: if there is no such checkpoint.
        RuntimeError: if weights cannot be had or do not fit.
    """
    from timm.models import is_model

    from ..data import DATASETS
    from ..inference import load_model
    from ..registry.catalogue import is_name, registered_models
    from ..registry.checkpoint import WEIGHTS, SegmentationCheckpoint, find
    from ..training import load_recipe, recipe_names

    if dataset and dataset not in DATASETS:
        raise ValueError(f"unknown dataset {dataset!r}: one of {', '.join(DATASETS)}")
    if checkpoint:
        return _of_checkpoint(name, Path(checkpoint), dataset)
    if called := _CALL.fullmatch(name):
        return Subject(name, _call(name, **called.groupdict()), "as made by the function")
    path = Path(name.removeprefix("local-dir:"))
    file = path / WEIGHTS if path.is_dir() else path
    if path.exists() and not is_name(name):
        if file.with_name("recipe.yaml").is_file():
            return of_run(name, file, pretrained is not False)
        if file.is_file() or file.with_name("config.json").is_file():
            return _of_folder(name, file, pretrained is not False)
    if pretrained is None:
        pretrained = "." in name or ":" in name
    record = find(name) if pretrained or not is_model(name) else None
    if record is None and name in recipe_names():
        raise ValueError(f"no weights of {name} are kept: `poolskip train {name}` makes them; give its run's folder")
    if isinstance(record, SegmentationCheckpoint):
        return _of_segmentation(record, pretrained)
    if path.is_dir() and not is_name(name):
        raise ValueError(f"the folder {path} has neither recipe.yaml nor config.json: no run, no model of timm or smp")
    if not (is_model(name) or name.startswith(("hf-hub:", "local-dir:"))):
        close = get_close_matches(name, registered_models(), 3)
        names = f"similar: {', '.join(close)}" if close else "`poolskip list` prints them"
        raise ValueError(
            f"unknown model {name!r}: neither a name ({names}) nor a file, a folder or a call "
            "MODULE:FUNCTION(ARGUMENTS)"
        )
    model = load_model(name, pretrained, way_out)
    if record is None:
        return Subject(name, model, f"weights {model.pretrained_cfg.get('tag')}" if pretrained else FRESH)
    return Subject(name, model, f"weights {record.tag}", record.dataset, load_recipe(record.recipe), record.sha256)


def of_run(name: str, file: Path, pretrained: bool = True) -> Subject:
    """Make the model of a run.

    Args:
        name: what to call it.
        file: its weights, beside recipe.yaml.
        pretrained: whether with them.

    Returns:
        The model with its weights.

    Raises:
        FileNotFoundError: if the run has left no weights yet.
        ValueError: if the file is the state that training goes on from.
        RuntimeError: if the weights do not fit.
    """
    from ..registry.resolve import sha256_of
    from ..registry.segmentation import load_weights
    from ..training import load_recipe
    from ..training.state import CHECKPOINT
    from ..training.task import make_task

    if file.name == CHECKPOINT:  # a moving average of the weights, if there is one, is not what timm would read of it
        raise ValueError(f"{file} is the state that training goes on from; the run's weights are model.safetensors")
    recipe = load_recipe(file.with_name("recipe.yaml"))
    model = make_task(recipe).make_model(trained=True).eval()
    if not pretrained:
        return Subject(name, model, FRESH, recipe.dataset, recipe)
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}: the run is not finished, or has lost it")
    load_weights(model, file)
    return Subject(name, model, f"trained by {recipe.name}", recipe.dataset, recipe, sha256_of(file))


def _of_checkpoint(name: str, file: Path, dataset: str | None) -> Subject:
    """Make the model of a name with weights of a file, by the recipe beside them if there is one."""
    from ..registry.checkpoint import SegmentationCheckpoint, find
    from ..registry.resolve import sha256_of
    from ..registry.segmentation import load_weights
    from ..training import load_recipe
    from ..training.build import create_classifier, is_known

    if file.is_dir():
        raise FileNotFoundError(f"checkpoint {file} is a folder: give the file, such as {file / 'model.safetensors'}")
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint {file} does not exist")
    arch, tagged, _ = name.partition(".")
    beside = file.with_name("recipe.yaml")
    if beside.is_file():
        recipe = load_recipe(beside)
        trained = recipe.name if recipe.segments else recipe.model
        if trained.partition(".")[0] != arch:
            raise ValueError(f"{file} was trained as {trained!r}, not {arch!r} (see {beside})")
        return of_run(name, file)
    # A tag names the record, whose arguments the weights may need; a bare name is of the model as it comes.
    record = find(name) if tagged else None
    if isinstance(record, SegmentationCheckpoint):
        raise ValueError(f"{file} has no recipe.yaml next to it, which says how a segmentation model is built")
    if not is_known(name):
        raise ValueError(f"unknown model {name!r}: `poolskip list` shows the names")
    dataset = dataset or (record.dataset if record else None)
    if not dataset:
        raise ValueError(f"{file} has no recipe.yaml next to it: give its data set with --dataset")
    model = create_classifier(arch, dataset, {**record.model_args, "pretrained": False} if record else {})
    return Subject(name, load_weights(model, file).eval(), f"weights of {file}", dataset, None, sha256_of(file))


def _of_folder(name: str, file: Path, pretrained: bool) -> Subject:
    """Make the model of a folder or file by the config.json of timm or smp."""
    from ..inference import load_model
    from ..registry.segmentation import load_weights

    config = file.with_name("config.json")
    if not config.is_file():
        raise ValueError(
            f"{file} does not say which model it is of: there is neither recipe.yaml nor config.json next to it"
        )
    if '"_model_class"' in config.read_text(encoding="utf-8"):
        import segmentation_models_pytorch as smp

        if not pretrained:
            raise ValueError(f"{name} is a folder of smp, which can only be read with its weights")
        with redirect_stdout(io.StringIO()):  # the Hub's client prints that the folder is one
            model = smp.from_pretrained(str(file.parent)).eval()
    else:
        model = load_model(f"local-dir:{file.parent}", pretrained)
    if pretrained and Path(name).is_file():  # there may be several in the folder
        load_weights(model, file)
    return Subject(name, model, f"weights of {name}" if pretrained else FRESH)


def _of_segmentation(record: Any, pretrained: bool) -> Subject:
    """Make the model of a recorded checkpoint of segmentation."""
    from ..registry.resolve import local_weights
    from ..registry.segmentation import build_recorded, load_weights
    from ..training import load_recipe

    model = build_recorded(record)
    if pretrained:
        load_weights(model, local_weights(record))
    recipe = load_recipe(record.recipe)
    weights = f"weights {record.tag}" if pretrained else FRESH
    return Subject(record.name, model, weights, record.dataset, recipe, record.sha256 if pretrained else None)


def _call(name: str, module: str, function: str, arguments: str | None) -> Any:
    """Call a function of a module that can be imported, the current folder's included, for its model."""
    import ast
    import importlib
    import operator

    from torch import nn

    try:
        call: Any = ast.parse(f"f{arguments or '()'}", mode="eval").body
        positional = [ast.literal_eval(each) for each in call.args]
        keywords = {each.arg: ast.literal_eval(each.value) for each in call.keywords}
    except (AttributeError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name}: its arguments must be literals, as in 'm:f(10, size=(4, 4))'") from error
    sys.path.insert(0, "")
    try:
        model = operator.attrgetter(function)(importlib.import_module(module))(*positional, **keywords)
    except Exception as error:
        raise ValueError(f"{name}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove("")
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} is {type(model).__name__}, no torch.nn.Module")
    return model.eval()


def best_device() -> Any:
    """Where verbs measure models: the first GPU, or the CPU where there is none."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
