"""Read a YAML file into a typed model, with one sentence per mistake."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeGuard, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from semisam_core.errors import ConfigError

NAME_PATTERN = re.compile(r"^[a-z0-9][a-z0-9-]{0,62}$")
SHOWN_MISTAKES = 50
NAME_ACCEPTED = "lowercase letters, digits and dashes, at most 63, the first not a dash"

Name = Annotated[str, Field(pattern=NAME_PATTERN.pattern)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _a_spacing(value: tuple[float, float, float]) -> tuple[float, float, float]:
    if not all(0.05 <= side <= 20 for side in value):
        raise ValueError("each spacing is in millimetres, between 0.05 and 20")
    return value


Spacing = Annotated[tuple[float, float, float], AfterValidator(_a_spacing)]


def is_name(text: object) -> TypeGuard[str]:
    """Return whether a text may name a site, a study or a run; such a name is also safe as a folder's."""
    return isinstance(text, str) and NAME_PATTERN.fullmatch(text) is not None


class StrictModel(BaseModel):
    """Base of plan and site files: frozen, unknown keys are errors, values are not coerced.

    Attributes:
        omitted_defaults: keys whose default is not written out. A key added when plans are already in use belongs here,
            so that plans without it keep their hashes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    omitted_defaults: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _without_omitted_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        unused = {key for key in self.omitted_defaults if getattr(self, key) == fields[key].default}
        return {key: each for key, each in serialize(self).items() if key not in unused}


Model = TypeVar("Model", bound=StrictModel)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a duplicate key is an error instead of a silent override."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                raise yaml.YAMLError(f"the key on line {line} is a list or mapping; a word or number is expected")
            if key in seen:
                raise yaml.YAMLError(f"the key {key!r} is given twice (again on line {line})")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, unreadable, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the file cannot be read ({error}).") from None
    return yaml_mapping(text, str(path))


def yaml_mapping(text: str, origin: str) -> dict[str, Any]:
    """Return the mapping in a YAML text.

    Args:
        text: the YAML.
        origin: name of the source for messages, usually the file's path.

    Raises:
        ConfigError: it is not YAML, or not a mapping.
    """
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader)  # a SafeLoader: builds plain values only
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: this is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{origin}: a mapping of keys to values is expected, found {type(content).__name__}.")
    return content


def parse(model: type[Model], content: dict[str, Any], origin: str) -> Model:
    """Validate a mapping against a model.

    Args:
        model: the pydantic model.
        content: the mapping, as read from YAML or JSON.
        origin: name of the source for messages, usually the file's path.

    Raises:
        ConfigError: one line per mistake: file, key, value, and what is accepted.
    """
    try:
        # Via JSON: strict mode then accepts a list as a tuple, but neither "3" as 3 nor true as 1.
        text = json.dumps(content, default=str)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{origin}: only words, numbers, lists and mappings of words to these are accepted ({error})."
        ) from None
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        mistakes = error.errors()
        lines = [_sentence(origin, dict(mistake)) for mistake in mistakes[:SHOWN_MISTAKES]]
        if more := len(mistakes) - len(lines):
            lines.append(f"{origin}: {more} further mistakes are not listed.")
        raise ConfigError("\n".join(lines)) from None


def _sentence(origin: str, mistake: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in mistake["loc"]) or "(whole file)"
    if mistake["type"] == "extra_forbidden":
        return f"{origin}: {key}: unknown key. Remove it or correct its spelling."
    if mistake["type"] == "missing":
        return f"{origin}: {key}: this key is required and missing."
    message = str(mistake["msg"]).removeprefix("Value error, ")
    value = mistake["input"]
    shown = "" if isinstance(value, dict) else f" = {value!r}"
    return f"{origin}: {key}{shown}: {message}{'' if message.endswith('.') else '.'}"


def override(content: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Return a copy of `content` with dotted assignments such as ``training.rounds=3`` applied.

    Values are read as YAML. Unknown keys are left to the model, which refuses them.

    Raises:
        ConfigError: an assignment is not of the form key=value, or its path leads through a single value.
    """
    result: dict[str, Any] = yaml.safe_load(yaml.safe_dump(content))
    for assignment in assignments:
        dotted, separator, text = assignment.partition("=")
        if not separator or not dotted.strip():
            raise ConfigError(f"--set {assignment}: expected key=value, for example training.rounds=3.")
        try:
            value = yaml.load(text, Loader=_UniqueKeyLoader)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {assignment}: the value is not valid YAML: {error}") from None
        *parents, last = dotted.strip().split(".")
        target = result
        for parent in parents:
            nested = target.setdefault(parent, {})
            if not isinstance(nested, dict):
                raise ConfigError(f"--set {assignment}: {parent} is a single value and has no keys below it.")
            target = nested
        target[last] = value
    return result


def flow_yaml(value: Any) -> str:
    """Return a plain value (word, number, list, mapping) as YAML on one line that reads back as the same value.

    Words that YAML would read as something else (`yes`, `0007`, `a: b`, `x,y`) are quoted, so the text may be put into
    a list or a mapping.
    """
    text = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, sort_keys=False, width=math.inf)
    if len(text.splitlines()) > 1:  # a line break inside a word: only double quotes can escape it
        text = yaml.safe_dump([value], default_flow_style=True, default_style='"', sort_keys=False, width=math.inf)
    return text.rstrip("\n")[1:-1]
