"""docs/settings.md and docs/schema/*.json: every key with type, default and meaning, written from the Configs.

`make settings` writes them (`python -m attune.config.reference`), and a test holds them equal to the code.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from attune.config import plugins
from attune.config.profile import Generate, Params, Profile, Run, Tracking
from attune.config.schema import SearchRange, StrictModel
from attune.config.search import Config as SearchConfig
from attune.config.settings import (
    AIFeedback,
    Lora,
    MethodConfig,
    Model,
    MovingReference,
    PreferenceConfig,
    Sampling,
    Validation,
)

PAGE, SCHEMAS = Path("docs/settings.md"), Path("docs/schema")
SIGNS = {Ge: ">=", Gt: ">", Le: "<=", Lt: "<"}


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    SCHEMAS.mkdir(exist_ok=True)
    for name, text in schemas().items():
        (SCHEMAS / name).write_text(text, encoding="utf-8")


def page() -> str:
    """docs/settings.md."""
    return "\n".join(_page()) + "\n"


def _page() -> Iterator[str]:
    yield "# Settings\n"
    yield (
        "Written from the code by `make settings`; do not edit. `required` means that there is no default. Defaults of "
        "methods are the papers' values. One value for a run: `dvc exp run -S 'params/tiny.yaml:methods.spo.beta=7'`. "
        "Values of your own machine that are not to be committed go into `params.local.yaml`, by profile: "
        "`tiny: {threads: 4}`. "
        "Editors complete and check the files by the JSON schemas in `docs/schema/`.\n"
    )
    yield from _section("params.yaml", Params)
    yield from _section("tracking", Tracking)
    yield from _section("runs.<name>", Run)
    yield from _section("params/<profile>.yaml", Profile)
    yield from _section("model", Model)
    yield from _section("sampling, generate.sampling, methods.<run>.validation.sampling", Sampling)
    yield from _section("generate", Generate)
    for name in plugins.available("sources"):
        yield from _section(f"data, source: {name}", plugins.config_class("sources", name))
    yield from _section("preference", PreferenceConfig)
    yield from _section("preference.ai_feedback, methods.<run>.ai_feedback", AIFeedback)
    yield from _section("methods.<run>, of every method (whose own defaults are below)", MethodConfig)
    yield from _section("methods.<run>.lora", Lora)
    yield from _section("methods.<run>.validation", Validation)
    yield from _section("methods.<run>.reference", MovingReference)
    for name in plugins.available("methods"):
        yield from _section(f"methods.<run>, method: {name}", _own(plugins.config_class("methods", name)))
    for name in plugins.available("rewards"):
        yield from _section(f"scorers.<name>, scorer: {name}", plugins.config_class("rewards", name))
    yield from _section("search.<run>", SearchConfig)
    yield from _section("search.<run>.space.<key>", SearchRange)


def _own(config: type[StrictModel]) -> dict[str, FieldInfo]:
    """The fields that a method adds, or gives another default."""
    common = MethodConfig.model_fields
    fields = config.model_fields
    return {
        name: field
        for name, field in fields.items()
        if name not in common
        or _default(field) != _default(common[name])
        or field.description != common[name].description
    }


def _section(title: str, fields: type[StrictModel] | Mapping[str, FieldInfo]) -> Iterator[str]:
    found = fields if isinstance(fields, Mapping) else fields.model_fields
    yield f"## {title}\n"
    if not found:
        yield "Nothing of its own.\n"
        return
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    for name, field in found.items():
        cells = (f"`{field.alias or name}`", type_text(field), _default(field), field.description or "")
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"
    yield ""


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    value = field.default
    if isinstance(value, StrictModel):
        value = value.model_dump(exclude_defaults=False)
    return f"`{'null' if value is None else json.dumps(value)}`"


def type_text(field: FieldInfo) -> str:
    """A field's type and its bounds, as a reader of YAML says it."""
    bounds = [f"{SIGNS[type(mark)]} {_bound(mark)}" for mark in field.metadata if type(mark) in SIGNS]
    return ", ".join([_type(field.annotation), *bounds])


def _bound(mark: Any) -> Any:
    return getattr(mark, {Ge: "ge", Gt: "gt", Le: "le", Lt: "lt"}[type(mark)])


def _type(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type(parts[0])
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(part) for part in parts)
    if origin in (list, Sequence):
        return f"list of {_type(parts[0])}"
    if origin in (dict, Mapping, typing.Mapping) or getattr(origin, "__name__", "") == "Mapping":
        return f"mapping to {_type(parts[1])}"
    names = {
        float: "number",
        int: "whole number",
        str: "text",
        bool: "true or false",
        type(None): "null",
        Any: "anything",
    }
    return names.get(kind, "block" if isinstance(kind, type) else str(kind))


def schemas() -> dict[str, str]:
    """File name -> JSON schema, of params.yaml and of a profile."""
    profile = Profile.model_json_schema()
    definitions = profile.setdefault("$defs", {})
    one_of = {"data": "sources", "methods": "methods", "scorers": "rewards"}
    for key, kind in one_of.items():
        blocks = []
        for name in plugins.available(kind):
            schema = plugins.config_class(kind, name).model_json_schema(ref_template=f"#/$defs/{kind}.{name}.{{model}}")
            definitions |= {f"{kind}.{name}.{inner}": value for inner, value in schema.pop("$defs", {}).items()}
            if kind != "methods":
                plugin = "source" if kind == "sources" else "scorer"
                schema["properties"][plugin] = {"const": name}
            definitions[f"{kind}.{name}"] = schema
            blocks.append({"$ref": f"#/$defs/{kind}.{name}"})
        described = {"description": profile["properties"][key].get("description", "")}
        content = {"anyOf": blocks}
        profile["properties"][key] = described | (
            content if key == "data" else {"type": "object", "additionalProperties": content}
        )
    found = {"params.json": Params.model_json_schema(), "profile.json": profile}
    return {name: json.dumps(schema, indent=1, ensure_ascii=False) + "\n" for name, schema in found.items()}


if __name__ == "__main__":
    main()
