"""The reference of every key of a plan and of a site file, from the models that read them."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from client.site_config import SiteConfig
from semisam_core.aggregation import RULES
from semisam_core.configuration import NAME_PATTERN
from semisam_core.generalists.registry import generalist_names
from semisam_core.plan import Plan
from semisam_core.regularizers import NONE, REGULARIZERS
from semisam_core.specialists import SPECIALISTS

# Keys whose values are names in a registry, which their types do not say.
REGISTRIES: Mapping[str, Sequence[str]] = {
    "specialist.name": tuple(SPECIALISTS),
    "regularizer.name": (*REGULARIZERS, NONE),
    "aggregation.rule": tuple(RULES),
    "pseudo_labels.generalists": generalist_names(),
}
ATTRIBUTES = re.compile(r"\n*^Attributes:\n((?:    .*\n?|\n)+)", re.MULTILINE)
ENTRY = re.compile(r"^    (\w+): (.*(?:\n {5,}.*)*)", re.MULTILINE)
SECTION = "a section"


def plan_reference() -> str:
    """Return every key of a plan, section by section, then the arguments of each specialist, as Markdown."""
    parts = [*_sections(Plan, "")]
    for name, spec in sorted(SPECIALISTS.items()):
        parts += _section(spec.arguments, f"specialist.arguments of {name}", "specialist.arguments.")
    return "\n".join(parts)


def site_reference() -> str:
    """Return every key of a site file, section by section, as Markdown."""
    return "\n".join(_sections(SiteConfig, ""))


def described_keys(model: type[BaseModel]) -> dict[str, str]:
    """Return key -> its description: its entry in the docstring, or else its section's first sentence."""
    below = {key: _models(field.annotation) for key, field in model.model_fields.items()}
    found = {key: _first_sentence(models[0]) for key, models in below.items() if models}
    for each in reversed(model.__mro__):
        if each is not BaseModel and (entries := ATTRIBUTES.search(f"{inspect.getdoc(each)}\n")) is not None:
            found |= {name: " ".join(text.split()) for name, text in ENTRY.findall(entries[1])}
    described = {key: text for key, text in found.items() if key in model.model_fields}
    return {key: re.sub(r"\bNone\b", "`null`", text[:1].upper() + text[1:]) for key, text in described.items()}


def sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield (dotted key, its model) of a model and of all sections in it, outermost first; `` for the model itself."""
    yield prefix, model
    for key, field in model.model_fields.items():
        for below in _models(field.annotation):
            yield from sections(below, f"{prefix}.{key}".lstrip("."))


def _sections(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for key, each in sections(model, prefix):
        yield from _section(each, key or "Top level", f"{key}." if key else "")


def _section(model: type[BaseModel], title: str, prefix: str) -> Iterator[str]:
    described, schema = described_keys(model), model.model_json_schema()
    yield from (f"## {title}", "", ATTRIBUTES.sub("\n", f"{inspect.getdoc(model)}\n").strip(), "")
    yield from ("| key | accepted | default | |", "| --- | --- | --- | --- |")
    for key, field in model.model_fields.items():
        accepted = _accepted(schema["properties"][key], schema.get("$defs", {}))
        if names := REGISTRIES.get(prefix + key):
            accepted = f"{'list of ' if accepted.startswith('list') else ''}{_either(names)}"
        if _models(field.annotation):
            accepted = accepted.replace(SECTION, f"[{prefix}{key}](#{_anchor(prefix + key)})")
        cells = (f"`{key}`", accepted, _default(field.default, field.default_factory), described.get(key, ""))
        yield "| " + " | ".join(each.replace("|", "\\|") for each in cells) + " |"
    yield ""


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for each in get_args(annotation) for model in _models(each)]


def _first_sentence(model: type[BaseModel]) -> str:
    return re.split(r"(?<=\.)\s", inspect.getdoc(model) or "", maxsplit=1)[0].replace("\n", " ")


def _anchor(key: str) -> str:
    return key.replace(".", "")


def _default(value: Any, factory: Any) -> str:
    if factory is not None:
        value = factory()
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return ""  # each of its keys has one
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    return json.dumps(value, default=str).strip('"')


def _accepted(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """Return in words what a key takes, by its JSON schema."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
        return _either(schema["enum"]) if "enum" in schema else SECTION
    if "anyOf" in schema:
        return " or ".join(_accepted(each, definitions) for each in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return _either(schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "array":
        return _list(schema, definitions)
    if kind == "object":
        values = schema.get("additionalProperties")
        below = _accepted(values, definitions) if isinstance(values, dict) else "any value"
        return f"mapping of names to {below}"
    if kind in ("integer", "number"):
        return ("whole number" if kind == "integer" else "number") + _bounds(schema)
    words = {"boolean": "`true` or `false`", "null": "`null`"}
    if kind == "string":
        return _text(schema)
    return words.get(str(kind), "any value")


def _text(schema: Mapping[str, Any]) -> str:
    if schema.get("format") == "path":
        return "path"
    pattern = schema.get("pattern")
    if pattern is None:
        return "text"
    return "name" if pattern == NAME_PATTERN.pattern else f"text like `{pattern}`"


def _list(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])}: {_accepted(schema['prefixItems'][0], definitions)}"
    least, most = schema.get("minItems", 0), schema.get("maxItems")
    size = f", {least} to {most}" if most else ", at least 1" if least else ""
    return f"list of {_accepted(schema['items'], definitions)}{size}"


def _bounds(schema: Mapping[str, Any]) -> str:
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    found = [f"{word} {_number(schema[name])}" for name, word in words.items() if name in schema]
    return f" {', '.join(found)}".replace(", to", " to") if found else ""


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"


def _either(values: Sequence[Any]) -> str:
    return ", ".join(f"`{_yaml(each)}`" for each in values)
