"""Recipes and cohort descriptions: strict YAML whose errors name the line and the nearest key."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from math import cos, pi
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dymo_med import limits
from dymo_med.errors import ConfigError, Problem
from dymo_med.registry import Registry, nearest

_REGION = re.compile(r"[A-Za-z0-9_-]{1,32}")
# How pydantic begins what it would have liked.
_SHOULD = "Input should be "
ModelT = TypeVar("ModelT", bound=BaseModel)
KeyPath = tuple[str | int, ...]
# No recipe or cohort needs more: a table of ten thousand columns has half of that.
_MOST_PARTS = 200_000
_QUOTE = (
    'Quote a name with {record} in it, as YAML takes { for the begin of a mapping: "{record}.nii"'
)


class Strict(BaseModel):
    """Base of everything read from YAML: unknown keys are errors, objects are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Named(BaseModel):
    """A table entry by name, with that entry's own options beside it.

    The options are checked by the class in the table (`Options.model_validate`), not here.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.model_extra or {})


class Schedule(Strict):
    """How long and how fast one network is trained.

    Attributes:
        epochs: Upper bound on passes over the training records.
        batch_size: Records per step.
        learning_rate: Adam's step size.
        weight_decay: Decoupled weight decay (AdamW).
        patience: Stop after this many epochs without a better validation score.
        min_improvement: What counts as better.
        decay: `cosine` lowers the step size along half a cosine to near 0 in the last epoch,
            `poly` in proportion to (1 - epoch / epochs) to the power of 0.9.
        parts: Parts that a batch is worked through in, one after the other; their gradients are
            added up before the step. More parts need less memory.
        clip_gradients: Largest Euclidean norm of a step's gradient, taken over all parameters; a
            longer one is shortened and keeps its direction. None = it stays as it is, which is
            the default with `clip_values` and with `gradient: gmd`.
        clip_values: Largest size of each single entry of a step's gradient, which changes its
            direction; None = entries stay as they are.
    """

    epochs: Annotated[int, Field(ge=1)] = 100
    batch_size: Annotated[int, Field(ge=1)] = 32
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    patience: Annotated[int, Field(ge=1)] = 20
    min_improvement: Annotated[float, Field(ge=0)] = 1e-4
    decay: Literal["none", "cosine", "poly"] = "none"
    parts: Annotated[int, Field(ge=1)] = 1
    clip_gradients: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 5.0
    clip_values: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _values_instead(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("clip_values") is not None:
            return {"clip_gradients": None, **data}
        return data

    @model_validator(mode="after")
    def _one_clipping(self) -> Self:
        if self.clip_gradients is not None and self.clip_values is not None:
            raise ValueError("give clip_gradients or clip_values, not both")
        return self

    def step_size(self, epoch: int) -> float:
        """Return the step size of an epoch, counted from 0."""
        if self.decay == "none":
            return self.learning_rate
        if self.decay == "poly":
            return float(self.learning_rate * (1 - epoch / self.epochs) ** 0.9)
        return self.learning_rate * (1 + cos(pi * epoch / self.epochs)) / 2


class Augmentation(Strict):
    """Random changes of training images; all images of a record change alike.

    Attributes:
        mirror_axes: Spatial axes to mirror with probability 1/2 (0 = left-right in RAS).
        shift_voxels: Largest shift along each axis.
        intensity: Standard deviation of a random gain and offset.
        rotate_degrees: Largest turn about each axis; of a picture, in its plane.
        scale: Largest change of size, as a share.
    """

    mirror_axes: list[Annotated[int, Field(ge=0, le=2)]] = []
    shift_voxels: Annotated[int, Field(ge=0)] = 0
    intensity: Annotated[float, Field(ge=0)] = 0.0
    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = 0.0
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.0


# Networks that answer as one; more than these few gain nothing.
MOST_MEMBERS = 5


class BackboneTraining(Schedule):
    """Training of the fusion backbone.

    Attributes:
        subsets: K, distinct random subsets of modalities per batch, all if there are no more; 5
            by default, with `gmd` 15 (all of four modalities).
        prototype_weight: Weight of the prototype loss.
        prototype_epoch: First epoch (from 0) in which the prototype loss counts.
        prototype_temperature: Its softmax temperature.
        augmentation: Random changes of training images.
        gradient: `sum` minimises the mean loss over subsets of modalities; `gmd` projects the
            gradients of the subsets' losses off each other where they disagree.
        reduction: With `gmd`, how projected gradients of parameters shared by all modalities
            are reduced.
        class_weights: `balanced` weighs the loss of a class with the inverse of how common it is
            among training records.
        auxiliary: Weight of the loss of answers from each modality alone, so that none is left
            untrained beside a stronger one.
        members: Networks that are trained one after another, from different weights, and whose
            mean is the answer.
        crop: Voxels along each axis of the random part that a segmentation network is shown in a
            training step, and of its sliding window later; None = the whole grid.
        crop_lesion: Share of these parts that are placed so that they hold some of the lesion;
            the others lie anywhere in the scan.
    """

    subsets: Annotated[int, Field(ge=1)] = 5
    prototype_weight: Annotated[float, Field(ge=0)] = 1.0
    prototype_epoch: Annotated[int, Field(ge=1)] = 3
    prototype_temperature: Annotated[float, Field(gt=0)] = 0.1
    augmentation: Augmentation = Augmentation()
    class_weights: Literal["none", "balanced"] = "none"
    gradient: Literal["sum", "gmd"] = "sum"
    reduction: Literal["mean", "sum"] = "mean"
    auxiliary: Annotated[float, Field(ge=0)] = 0.0
    members: Annotated[int, Field(ge=1, le=MOST_MEMBERS)] = 1
    crop: Annotated[list[Annotated[int, Field(ge=8)]], Field(min_length=3, max_length=3)] | None = (
        None
    )
    crop_lesion: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _published_gmd(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("gradient") == "gmd":
            return {"subsets": 15, "clip_gradients": None, **data}
        return data

    @model_validator(mode="after")
    def _directions_stay(self) -> Self:
        if self.gradient == "gmd" and self.clip_values is not None:
            raise ValueError(
                "clip_values would turn the gradient that gmd projected; use clip_gradients"
            )
        return self


class Recipe(Strict):
    """Everything `train` needs besides the cohort.

    Attributes:
        name: Name of the bundle that comes out.
        description: One sentence for the model card.
        seed: Seed of every random choice, 0 or more.
        imputer: Entry of the imputer table and its options; None = nothing is recovered, which
            only a segmentation can do without.
        backbone: Entry of the backbone table and its options.
        selector: Entry of the selector table and its options; None = the one that does best on the
            calibration split.
        comparators: Entries of the comparator table, each a name or a name with options.
        imputer_training: Schedule of the imputer.
        backbone_training: Schedule of the backbone, and of every comparator.
    """

    name: str
    description: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    imputer: Named | None = None
    backbone: Named
    selector: Named | None = None
    comparators: list[Named] = []
    imputer_training: Schedule = Schedule()
    backbone_training: BackboneTraining = BackboneTraining()

    @field_validator("comparators", mode="before")
    @classmethod
    def _names_alone(cls, entries: Any) -> Any:
        if not isinstance(entries, list):
            return entries
        return [{"name": entry} if isinstance(entry, str) else entry for entry in entries]


class TaskEntry(BaseModel):
    """`task:` of a cohort description; its other keys are checked by the task itself.

    Attributes:
        type: Name of the task.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str


class SubgroupEntry(Strict):
    """One entry of `subgroups:` of a cohort description.

    Attributes:
        column: Column of one of the tables, `name` or `modality.name`.
        label_column: Column of the labels file instead.
        edges: Where a number's bands end: [40, 60] makes three.
    """

    column: str | None = None
    label_column: str | None = None
    edges: list[float] = []

    @model_validator(mode="after")
    def _one_source(self) -> SubgroupEntry:
        if (self.column is None) == (self.label_column is None):
            raise ValueError("give either column or label_column")
        if self.edges != sorted(set(self.edges)):
            raise ValueError("edges must increase")
        return self


def as_words(values: Any) -> Any:
    """Return a list from YAML with its numbers as text; booleans are refused.

    Raises:
        ValueError: If one is a boolean: which word was meant is not known any more.
    """
    if not isinstance(values, list):
        return values
    if any(isinstance(v, bool) for v in values):
        raise ValueError("YAML reads yes, no, on, off, true and false as booleans; quote them")
    return [str(v) if isinstance(v, int | float) else v for v in values]


class CohortFile(Strict):
    """`cohort.yaml`.

    Attributes:
        name: Name of the cohort.
        description: One sentence.
        task: What is predicted.
        modalities: Entries by name in canonical order; each is checked by its kind.
        patients: Folder of the patient directories, relative to this file.
        labels: Labels file, relative to this file.
        splits: Splits file, relative to this file.
        layout: `patients`, a folder of patient directories, or `bids`, a BIDS dataset.
        tables: Keys that hold for every table that does not say otherwise (`decimal: ","`).
        missing_values: Words and numbers that mean "blank" in tables, besides the empty cell.
        subgroups: Patients for whom an evaluation is reported apart, by name.
        quality: Limits of the quality gate, by name, for bundles made from this cohort.
    """

    name: str
    description: str = ""
    task: TaskEntry
    modalities: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    patients: str = "patients"
    labels: str = "labels.csv"
    splits: str = "splits.csv"
    layout: Literal["patients", "bids"] = "patients"
    tables: dict[str, Any] = {}
    missing_values: list[str] = []
    subgroups: dict[str, SubgroupEntry] = {}
    quality: dict[str, Any] = {}

    @field_validator("missing_values", mode="before")
    @classmethod
    def _words(cls, values: Any) -> Any:
        return as_words(values)

    @model_validator(mode="after")
    def _stay_inside(self) -> CohortFile:
        if self.layout == "bids" and "patients" in self.model_fields_set:
            raise ValueError("cohort.yaml of a BIDS dataset lies in its folder; leave patients out")
        for key in ("patients", "labels", "splits"):
            value = Path(getattr(self, key))
            if value.is_absolute() or ".." in value.parts:
                raise ValueError(f"{key} must be a path inside the cohort's folder")
        return self


class _LineLoader(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys and remembers each key's line."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.duplicates: list[tuple[int, str]] = []
        self._composed = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._composed += 1  # counted as they come: nobody waits for the rest of too many
        if self._composed > _MOST_PARTS:
            raise ValueError(f"more than {_MOST_PARTS:,} parts")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                self.duplicates.append((key_node.start_mark.line + 1, key))
            seen.add(key)
        return super().construct_mapping(node, deep)


def _parts(node: yaml.Node) -> int:
    """Return of how many parts a YAML node consists once its aliases are written out.

    A few lines of aliases to aliases can stand for more than any memory holds.

    Raises:
        ValueError: If they are too many, or one contains itself.
    """
    known: dict[int, int] = {}

    def count(part: yaml.Node) -> int:
        if id(part) not in known:
            known[id(part)] = _MOST_PARTS  # until it is counted: whoever contains itself has it
            inside: list[yaml.Node] = []
            if part.tag == "tag:yaml.org,2002:int" and len(part.value) > 20:
                raise ValueError("a number of more than 64 bits")
            if isinstance(part, yaml.MappingNode):
                inside = [node for pair in part.value for node in pair]
            elif isinstance(part, yaml.SequenceNode):
                inside = part.value
            known[id(part)] = 1 + sum(map(count, inside))
        return known[id(part)]

    total = count(node)
    if total > _MOST_PARTS:
        raise ValueError(f"more than {_MOST_PARTS:,} parts")
    return total


def _lines(node: yaml.Node | None, path: KeyPath = ()) -> dict[KeyPath, int]:
    """Return the 1-based line of every key path below a YAML node."""
    found: dict[KeyPath, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            here = (*path, str(key_node.value))
            found[here] = key_node.start_mark.line + 1
            found.update(_lines(value_node, here))
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            here = (*path, i)
            found[here] = item.start_mark.line + 1
            found.update(_lines(item, here))
    return found


class Document:
    """A YAML mapping together with the line of each of its keys.

    Args:
        path: The file.

    Raises:
        ConfigError: If the file is absent, unreadable, not YAML, or not a mapping.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as stream:
                content = stream.read(limits.MAX_YAML_BYTES + 1)
            cut = len(content) > limits.MAX_YAML_BYTES
            text = "" if cut else content.decode("utf-8-sig")
        except FileNotFoundError:
            raise ConfigError(
                Problem(
                    str(path), "there is no such file", expected="a file", remedy="Check the path"
                )
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                Problem(
                    str(path),
                    "the file cannot be read as text",
                    expected="UTF-8 text",
                    got=type(error).__name__,
                    remedy="Check the path and its permissions, and save the file in UTF-8",
                )
            ) from None
        if cut:
            raise ConfigError(
                limits.too_large(
                    str(path),
                    "the description",
                    path.stat().st_size,
                    limits.MAX_YAML_BYTES,
                    "Check that it is the right file",
                )
            )
        try:
            loader = _LineLoader(text)
            node = loader.get_single_node()
            if node is not None:
                _parts(node)
            self.data = loader.construct_document(node) if node is not None else None
            duplicates = loader.duplicates
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
            got = getattr(error, "problem", None) or (
                str(error) if type(error) is ValueError else "too many lists in one another"
            )
            remedy = "Check indentation and quotes"
            if mark is not None and "{record}" in "".join(
                text.splitlines()[mark.line : mark.line + 1]
            ):
                got, remedy = "{record} without quotes", _QUOTE
            raise ConfigError(
                Problem(
                    where,
                    "the file is not valid YAML",
                    expected="key: value lines that PyYAML's safe loader reads",
                    got=got[:100],
                    remedy=remedy,
                )
            ) from None
        if duplicates:
            raise ConfigError(
                *(
                    Problem(
                        f"{path}:{line}",
                        f"key '{key}' occurs twice",
                        expected="each key once",
                        remedy="Remove one of the two",
                    )
                    for line, key in duplicates
                )
            )
        if not isinstance(self.data, dict):
            raise ConfigError(
                Problem(
                    str(path),
                    "the file does not hold a mapping",
                    expected="key: value lines",
                    remedy="Check that it is the right file",
                )
            )
        self.lines = _lines(node)

    def where(self, path: KeyPath) -> str:
        """Return `file:line key.path` of a key, or of its nearest parent that has a line."""
        for end in range(len(path), 0, -1):
            line = self.lines.get(path[:end])
            if line is not None:
                return f"{self.path}:{line} {'.'.join(map(str, path))}"
        return f"{self.path} {'.'.join(map(str, path))}".rstrip()

    def problems(
        self, error: ValidationError, model: type[BaseModel], prefix: KeyPath = ()
    ) -> list[Problem]:
        """Translate a pydantic error into problems with line numbers and nearest keys.

        Args:
            error: What pydantic found.
            model: The model that was validated, for the names of its keys.
            prefix: Where in the document the validated part sits.
        """
        found = []
        for item in error.errors(include_url=False):
            path: KeyPath = (*prefix, *item["loc"])
            if item["type"] == "extra_forbidden":
                known = _known_keys(model, item["loc"][:-1])
                found.append(
                    Problem(
                        self.where(path),
                        "unknown key",
                        expected="a key that is known here",
                        remedy=nearest(str(path[-1]), known),
                    )
                )
            elif item["type"] == "missing":
                found.append(
                    Problem(
                        self.where(path),
                        "a required key is absent",
                        expected=f"the key {path[-1]}",
                        remedy="Add it",
                    )
                )
            else:
                what, expected = item["msg"].removeprefix("Value error, "), ""
                if what.startswith(_SHOULD):
                    what, expected = "the value cannot be used", what.removeprefix(_SHOULD)
                bare = item["input"] == {"record": None}
                found.append(
                    Problem(
                        self.where(path),
                        what,
                        expected=expected,
                        got=_told(item["input"]),
                        remedy=_QUOTE if bare else "Correct the value",
                    )
                )
        return found

    def parse(self, model: type[ModelT]) -> ModelT:
        """Validate the whole document.

        Raises:
            ConfigError: With every problem at once.
        """
        return self.parse_part(self.data, model, ())

    def parse_part(self, data: Any, model: type[ModelT], prefix: KeyPath) -> ModelT:
        """Validate one part of the document that sits at `prefix`.

        Raises:
            ConfigError: With every problem at once.
        """
        try:
            return model.model_validate(data)
        except ValidationError as error:
            raise ConfigError(*self.problems(error, model, prefix)) from None


def _told(value: Any) -> str:
    """Return a value of a description in a few words; descriptions hold no patient's data."""
    if isinstance(value, dict | list | tuple):
        return f"{'keys and values' if isinstance(value, dict) else 'a list'} ({len(value)})"
    return f"{value!r:.60}"


def _known_keys(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    """Return the field names of the model reached from `model` along `path`."""
    for key in path:
        info = model.model_fields.get(str(key))
        annotation = info.annotation if info is not None else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return list(model.model_fields)


def read_recipe(path: Path, tables: Mapping[str, Registry[Any]]) -> Recipe:
    """Read a recipe and check the options of its table entries.

    Args:
        path: A YAML file.
        tables: Table of each entry (`imputer`, `backbone`, `selector`) or list of entries
            (`comparators`); its classes have an `Options` model.

    Raises:
        ConfigError: With every problem at once.
    """
    document = Document(path)
    recipe = document.parse(Recipe)
    problems: list[Problem] = []
    for part, table in tables.items():
        named: list[Named] | Named | None = getattr(recipe, part)
        entries: list[tuple[KeyPath, Named]] = []
        if isinstance(named, list):
            entries = [((part, i), entry) for i, entry in enumerate(named)]
        elif named is not None:
            entries = [((part,), named)]
        seen: set[str] = set()
        for key, entry in entries:
            where = document.where((*key, "name"))
            if entry.name not in table:
                problems.append(
                    Problem(
                        where,
                        f"there is no {table.noun} called '{entry.name}'",
                        expected="a name from the table",
                        remedy=nearest(entry.name, list(table)),
                    )
                )
                continue
            if entry.name in seen:
                problems.append(
                    Problem(
                        where,
                        f"{table.noun} '{entry.name}' is named twice",
                        expected="each once",
                        remedy="Remove one of them",
                    )
                )
            seen.add(entry.name)
            try:
                document.parse_part(entry.options, table[entry.name].Options, key)
            except ConfigError as error:
                problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return recipe
