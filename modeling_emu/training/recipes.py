"""Recipes: YAML files over TrainingArguments' own names, with what Emu needs besides. Nothing unknown is let through."""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser

from ..configuration_emu import EmuConfig
from .arguments import EmuTrainingArguments


PACKAGED_RECIPES = Path(__file__).with_name("recipes")
OBJECTIVE_KEYS = (
    "text_loss_weight",
    "regression_loss_weight",
    "regression_loss",
    "normalize_regression_targets",
    "supervise_image_start",
)
# What YAML gives, and how a message calls it. Texts are not among them: what a text may say, its reader knows.
KINDS_OF_VALUES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "keys with values",
    NoneType: "null",
}


def is_text(value: Any) -> bool:
    """Whether a value is a text that is not empty."""
    return isinstance(value, str) and value != ""


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and not a truth value."""
    return type(value) in (int, float) and math.isfinite(value)


# By the key of a source: what tells whether a value can be, and how a message calls it.
SOURCE_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "kind": (is_text, "a text"),
    "files": (
        lambda value: is_text(value) or (isinstance(value, list) and value != [] and all(map(is_text, value))),
        "a text or a list of texts",
    ),
    "media": (lambda value: value is None or is_text(value), "a text or null"),
    "name": (lambda value: value is None or is_text(value), "a text or null"),
    "max_broken_fraction": (lambda value: is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "weight": (lambda value: is_number(value) and value > 0, "a positive number"),
    "batch_size": (lambda value: type(value) is int and value > 0, "a positive whole number"),
}

Arguments = TypeVar("Arguments")


@dataclass
class DataArguments:
    """Which model a recipe trains, and on what.

    Raises:
        ValueError: for unknown keys, an objective that cannot be, no source, or batch sizes that fit neither each other
            nor packing.
    """

    model: str = field(metadata={"help": "Folder or Hub id of the model to start from."})
    sources: list[dict] = field(
        metadata={"help": "Per source: kind and files, as in EmuSource, and its weight or batch_size in the mixture."}
    )
    eval_sources: list[dict] = field(
        default_factory=list, metadata={"help": "Sources to evaluate on, once through; as sources."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of the weights: float32, bfloat16 or auto."})
    attn_implementation: str | None = field(default=None, metadata={"help": "As in from_pretrained."})
    objective: dict = field(
        default_factory=dict, metadata={"help": f"Fields of EmuConfig to change: {', '.join(OBJECTIVE_KEYS)}."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Most tokens of a row; None is the model's context."}
    )
    packing: bool = field(default=True, metadata={"help": "Several documents per row instead of padding."})
    sample_prompts: list[Any] = field(
        default_factory=list,
        metadata={
            "help": "Texts, or lists of parts; at each evaluation the tracker gets what the model makes of them."
        },
    )

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources: got none, expected at least one")
        check_keys(self.objective, OBJECTIVE_KEYS, "objective")
        try:
            EmuConfig(**self.objective)
        except StrictDataclassError as error:
            raise ValueError(f"objective: {error}") from error
        for source in (*self.sources, *self.eval_sources):
            check_source(source, tuple(SOURCE_VALUES))
        sized = ["batch_size" in source for source in self.sources]
        if any(sized) != all(sized):
            raise ValueError("batch_size of the sources: got it for some, expected it for all or none")
        if any(sized) and self.packing:
            raise ValueError("packing: got true with a batch_size per source, expected false")


@dataclass
class PretrainArguments(DataArguments):
    """What a pretraining recipe may say besides `EmuTrainingArguments`."""


@dataclass
class InstructArguments(DataArguments):
    """What a recipe of instruction tuning may say besides `EmuTrainingArguments`.

    Answers alone are learned, unless `objective.regression_loss_weight` says otherwise: with it, and with documents to
    learn as a whole among the sources, a model keeps drawing while it learns to answer.

    Raises:
        ValueError: if the adapter is to be merged into quantised weights.
    """

    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapter's scale, times its rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter."})
    merge_adapter: bool = field(default=False, metadata={"help": "Save the model with the adapter merged into it."})
    quantization: str | None = field(default=None, metadata={"help": "nf4: the language model in 4 bits (CUDA)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantization not in (None, "nf4"):
            raise ValueError(f"quantization: got {self.quantization!r}, expected nf4 or nothing")
        if self.quantization and self.merge_adapter:
            raise ValueError("merge_adapter: got true, expected false with quantised weights, which would be rounded")


class RecipeLoader(yaml.SafeLoader):
    """YAML as recipes write it: `no` is a word, as in `save_strategy: no`, and 1e-5 is a number."""


BOOL_TAG, FLOAT_TAG = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
RecipeLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != BOOL_TAG]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver(BOOL_TAG, re.compile("^(?:true|True|false|False)$"), list("tTfF"))
RecipeLoader.add_implicit_resolver(FLOAT_TAG, re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def check_keys(got: Iterable[str], expected: Sequence[str], what: str) -> None:
    """Refuse a key that is not expected, with the nearest one that is.

    Raises:
        ValueError: naming it.
    """
    for key in got:
        if key not in expected:
            nearest = difflib.get_close_matches(str(key), expected, n=1, cutoff=0)
            raise ValueError(f"key of the {what}: got {key!r}, expected a known one; the nearest is {nearest[0]!r}")


def check_source(source: dict[str, Any], expected: Sequence[str]) -> None:
    """Refuse a source that cannot be, before anything is read.

    Args:
        expected: keys that it may have.

    Raises:
        ValueError: for an unknown key, a missing one, or a value that cannot be.
    """
    check_keys(source, expected, "source")
    if missing := [key for key in ("kind", "files") if key not in source]:
        raise ValueError(f"source: got none of {missing}, expected both kind and files")
    for key, value in source.items():
        can_be, description = SOURCE_VALUES[key]
        if not can_be(value):
            raise ValueError(f"{key} of the source: got {value!r}, expected {description}")


def check_values(recipe: dict[str, Any], types: dict[str, Any]) -> None:
    """Refuse a value that is no number, list or truth value where one is needed: `packing: no` would be true.

    Args:
        types: by key, as annotated.

    Raises:
        ValueError: naming the key.
    """
    for name, value in recipe.items():
        kinds: tuple[Any, ...] = get_args(types[name]) if isinstance(types[name], UnionType) else (types[name],)
        plain = {get_origin(kind) or kind for kind in kinds}
        if not plain <= KINDS_OF_VALUES.keys():
            continue
        is_known = type(value) in (plain | {int} if float in plain else plain)
        if is_known and list in plain and value is not None:
            [item] = [get_args(kind)[0] for kind in kinds if get_origin(kind) is list]
            is_known = item is Any or all(type(entry) is item for entry in value)
        if not is_known:
            expected = " or ".join(text for kind, text in KINDS_OF_VALUES.items() if kind in plain)
            raise ValueError(f"{name}: got {value!r}, expected {expected}")


def find_recipe(name: str) -> Path:
    """Give the file of a recipe: a path, or the name of one that comes along.

    Raises:
        ValueError: if there is none.
    """
    for path in (Path(name), PACKAGED_RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in PACKAGED_RECIPES.glob("*.yaml")))
    raise ValueError(f"recipe: got {name!r}, expected a file, or one of {known}")


def read_recipe(name: str, settings: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe's keys and values.

    Args:
        name: see `find_recipe`.
        settings: `key=value`, the value in YAML, which replace the recipe's; `objective.text_loss_weight=2` reaches
            into a mapping.

    Raises:
        ValueError: if it is no mapping, it or a setting is no YAML, or a setting has no `=`.
    """
    path = find_recipe(name)
    try:
        recipe = yaml.load(path.read_text(), RecipeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {path}: got broken YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"recipe {path}: got {type(recipe).__name__}, expected keys with values")
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set: got {setting!r}, expected key=value")
        *folders, last = key.split(".")
        target = recipe
        for folder in folders:
            target = target.setdefault(folder, {})
            if not isinstance(target, dict):
                raise ValueError(f"--set: got {key!r}, but {folder!r} holds no keys, expected a key of a mapping")
        try:
            target[last] = yaml.load(value, RecipeLoader)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {key}: got broken YAML in {value!r}: {error}") from error
    return recipe


def parse_recipe(
    name: str, settings: Sequence[str], arguments_class: type[Arguments]
) -> tuple[Arguments, EmuTrainingArguments]:
    """Read a recipe into its two kinds of arguments.

    Args:
        arguments_class: `PretrainArguments` or `InstructArguments`.

    Raises:
        ValueError: for an unknown key, with the nearest one, a missing one, or a value that cannot be.
    """
    return parse_as(name, settings, arguments_class, EmuTrainingArguments)


def parse_as(name: str, settings: Sequence[str], *classes: Any) -> tuple[Any, ...]:
    """Read a recipe into one object of each of these dataclasses; see `parse_recipe`."""
    recipe = read_recipe(name, settings)
    fields = [field for parsed in classes for field in dataclasses.fields(parsed) if field.init]
    check_keys(recipe, [field.name for field in fields], "recipe")
    # The fields' own types will not do: HfArgumentParser changes them.
    check_values(recipe, {name: kind for parsed in classes for name, kind in get_type_hints(parsed).items()})
    needed = {
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if missing := sorted((needed | {"output_dir"}) - recipe.keys()):
        raise ValueError(f"recipe {name!r}: got none of the keys {missing}, expected them (--set key=value)")
    return HfArgumentParser(classes).parse_dict(recipe)
