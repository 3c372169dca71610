"""JSON Schema (2020-12) of each message, from the types that decode or make it.

One source each: structure and bounds are those of the types (msgspec), rules and descriptions those
of `fields.py`. The schemas describe the plain objects of a message, whether msgpack or JSON.
What they cannot say is listed in docs/protocol/README.md.
"""

from collections.abc import Mapping
from typing import Any, Final, cast

import msgspec

from schemas.codec import OPTIONAL_REPLY_KEYS, CommandKeys, ReplyKeys
from schemas.envelopes import Event
from schemas.protocol import fields, queries
from schemas.protocol.details import DETAILS, DoneDetail, ErrorDetail, PongDetail, Shortened
from schemas.protocol.ids import SCHEMA_VERSION, answer_name, request_name, schema_id
from schemas.protocol.state import DeadHeaders, HostValue, InstanceState, NetworkState
from schemas.serde import REQUEST, RESPONSE
from schemas.tagged import Tagged
from schemas.unpack import COMMAND

Schema = dict[str, Any]

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
REF: Final = "#/$defs/{name}"
TRACE: Final = frozenset({"traceparent", "tracestate"})  # left out if there is none
STATES: Final = {"instance": InstanceState, "network": NetworkState, "host": HostValue}


class Undescribed(Exception):
    """A field of a message that `fields.MEANINGS` does not know."""


def documents() -> dict[str, Schema]:
    """All schemas, by name: `command`, `reply`, `event`, `state.<lane kind>`, `dead.headers`,
    `ask.<verb>.request` and `ask.<verb>.answer`.

    Raises:
        Undescribed: a field has no description.
    """
    made = {
        "command": _command(),
        "reply": _reply(),
        "event": _event(),
        "dead.headers": _one_of("dead.headers", (DeadHeaders,)),
    }
    for kind, value in STATES.items():
        made[f"state.{kind}"] = _one_of(f"state.{kind}", (value,))
    for verb in queries.REQUESTS:
        made[request_name(verb)] = _one_of(request_name(verb), (queries.REQUESTS[verb],))
        made[answer_name(verb)] = _answer(verb)
    return made


def closed(schema: Schema) -> Schema:
    """The same schema, which also refuses the fields that it does not name.

    For checks of hostd itself: a reader has to ignore unknown fields, a newer hostd adds some.
    """
    return cast("Schema", _closed(schema))


def _closed(node: object) -> object:
    if isinstance(node, list):
        return [_closed(each) for each in cast("list[object]", node)]
    if not isinstance(node, dict):
        return node
    made = {key: _closed(each) for key, each in cast("Schema", node).items()}
    if made.get("type") == "object" and "properties" in made:
        made.setdefault("additionalProperties", False)
    return made


# -- documents -------------------------------------------------------------------------------------


def _command() -> Schema:
    defs = _components((CommandKeys, *REQUEST.variants))
    defs["HostdRequest"] = _tagged(REQUEST, defs)
    envelope = defs.pop("CommandKeys")
    envelope["properties"]["request"] |= {"$ref": REF.format(name="HostdRequest")}
    envelope["maxProperties"] = COMMAND.items
    return _document("command", envelope, defs)


def _reply() -> Schema:
    defs = _components((ReplyKeys, *RESPONSE.variants, PongDetail, DoneDetail, ErrorDetail))
    defs["HostdResponse"] = _tagged(RESPONSE, defs)
    defs["ErrorDetail"]["additionalProperties"] = True
    envelope = defs.pop("ReplyKeys")
    properties = envelope["properties"]
    properties["response"] |= {"$ref": REF.format(name="HostdResponse")}
    envelope["required"] = [name for name in properties if name not in OPTIONAL_REPLY_KEYS]
    for name in properties:
        properties[name].pop("default", None)
    envelope["allOf"] = [
        {
            "if": {"properties": {"response": {"const": "Pong"}}},
            "then": _detail("PongDetail"),
            "else": {
                "if": {"properties": {"code": {"const": "ok"}}},
                "then": _detail("DoneDetail"),
                "else": _detail("ErrorDetail"),
            },
        }
    ]
    return _document("reply", envelope, defs)


def _event() -> Schema:
    details = (each for kinds in DETAILS.values() for each in kinds)
    defs = _components((Event, Shortened, *details))
    envelope = defs.pop("Event")
    properties = envelope["properties"]
    for name, value in properties.items():  # what is not set is left out
        value.pop("default", None)
        properties[name] = _without_null(value)
    properties["v"]["enum"] = [1]
    optional = {"tenant_id", "pool_id", "instance_id", "from", "to", "command_id", "reason"}
    optional |= TRACE
    envelope["required"] = [name for name in properties if name not in optional]
    envelope["allOf"] = [
        {
            "if": {"properties": {"kind": {"const": kind.value}}},
            "then": _detail(*(each.__name__ for each in types), Shortened.__name__),
        }
        for kind, types in DETAILS.items()
    ]
    return _document("event", envelope, defs)


def _answer(verb: str) -> Schema:
    name = answer_name(verb)
    made = _one_of(name, (*queries.ANSWERS[verb], queries.ErrorAnswer))
    if verb == "result":  # whole here, too: a reader needs one file per message
        reply = _reply()
        made["$defs"] |= reply.pop("$defs")
        made["$defs"]["Reply"] = {
            name: each for name, each in reply.items() if not name.startswith("$")
        }
        made["$defs"]["ResultAnswer"]["properties"]["reply"] |= {"$ref": REF.format(name="Reply")}
    return made


def _one_of(name: str, types: tuple[type, ...]) -> Schema:
    defs = _components(types)
    if len(types) == 1:
        return _document(name, defs.pop(types[0].__name__), defs)
    refs = [{"$ref": REF.format(name=each.__name__)} for each in types]
    return _document(name, {"title": name, "anyOf": refs}, defs)


def _document(name: str, body: Schema, defs: Schema) -> Schema:
    head = {
        "$schema": DIALECT,
        "$id": schema_id(name),
        "$comment": f"hostd protocol {SCHEMA_VERSION}; generated by `make protocol`",
    }
    return {**head, **body, "title": name, **({"$defs": defs} if defs else {})}


def _detail(*names: str) -> Schema:
    refs = [{"$ref": REF.format(name=name)} for name in names]
    return {"properties": {"detail": refs[0] if len(refs) == 1 else {"anyOf": refs}}}


# -- types -----------------------------------------------------------------------------------------


def _components(types: tuple[type, ...]) -> dict[str, Schema]:
    """The definition of each type, and of those in it, with descriptions and rules."""
    _, components = msgspec.json.schema_components(types, ref_template=REF)
    defs = cast("dict[str, Schema]", components)
    for kind, definition in defs.items():
        for name, value in definition.get("properties", {}).items():
            meaning = _of(fields.MEANINGS, kind, name)
            if meaning is None:
                raise Undescribed(f"{kind}.{name}: add what it means to schemas/protocol/fields.py")
            value["description"] = meaning
            if value.get("enum") == [1]:  # the version: without it 1.0 is one, too
                value["type"] = "integer"
            if rule := _of(fields.RULES, kind, name):
                _value_of(value).update(cast("Schema", rule))
    return defs


def _of(table: Mapping[str, object], kind: str, name: str) -> object:
    return table.get(f"{kind}.{name}", table.get(name))


def _value_of(schema: Schema) -> Schema:
    """The part of it that is not null."""
    for each in schema.get("anyOf", ()):
        if each != {"type": "null"}:
            return cast("Schema", each)
    return schema


def _without_null(schema: Schema) -> Schema:
    value = _value_of(schema)
    return schema if value is schema else {**value, "description": schema["description"]}


def _tagged(tagged: Tagged[Any], defs: dict[str, Schema]) -> Schema:
    """The enum as serde writes it; its structs, and those in them, become named or compact."""
    variants: list[Schema] = []
    for kind in tagged.variants:
        name = cast("type", kind).__name__
        if msgspec.structs.fields(kind):
            variants.append(_variant(name, {"$ref": REF.format(name=name)}))
            _both_forms(kind, defs)
        else:
            del defs[name]
            variants += [{"const": name}, _variant(name, {"type": "null"})]
    return {"title": tagged.name, "anyOf": variants}


def _variant(name: str, fields_of_it: Schema) -> Schema:
    return {
        "type": "object",
        "properties": {name: fields_of_it},
        "required": [name],
        "additionalProperties": False,
    }


def _both_forms(kind: type[msgspec.Struct], defs: dict[str, Schema]) -> None:
    """A map, or an array in declaration order, of which the end may be left out if optional."""
    name = kind.__name__
    named = defs[name]
    if "anyOf" in named:
        return
    infos = msgspec.structs.fields(kind)
    for info in infos:
        for inner in getattr(info.type, "__args__", (info.type,)):
            if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
                _both_forms(inner, defs)
    properties = named["properties"]
    compact = {
        "type": "array",
        "prefixItems": [properties[info.name] for info in infos],
        "items": False,
        "minItems": sum(info.required for info in infos),
    }
    description = named.pop("description", f"Fields of `{name}`.")
    del named["title"]
    forms = [{**named, "additionalProperties": False}, compact]
    defs[name] = {"title": name, "description": description, "anyOf": forms}
