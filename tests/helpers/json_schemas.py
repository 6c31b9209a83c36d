"""200 JSON schemas of the kinds that programs send: 40 subjects, each alone and in four common shapes."""

from collections.abc import Callable
from typing import Any, TypeAlias

Schema: TypeAlias = dict[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
YES: Schema = {"type": "boolean"}


def record(**members: Schema) -> Schema:
    """An object of exactly these members; one whose name ends in `_` may be left out."""
    properties = {name.rstrip("_"): schema for name, schema in members.items()}
    required = [name for name in members if not name.endswith("_")]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


def text(most: int, least: int = 0) -> Schema:
    return {"type": "string", "minLength": least, "maxLength": most}


def matching(pattern: str) -> Schema:
    return {"type": "string", "pattern": pattern}


def whole(least: int, most: int) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def formatted(name: str) -> Schema:
    """Bounded: a fraction of a second may have any number of digits, a domain any number of labels."""
    return {"type": "string", "format": name, "maxLength": 48}


def several(items: Schema, most: int, least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


COLOR = matching("^#[0-9a-f]{6}$")
POINT = record(lat={"type": "number", "minimum": -90, "maximum": 90}, lon={"type": "number"})
MONEY = record(amount={"type": "number", "minimum": 0}, currency=one_of("EUR", "USD", "JPY"))

SUBJECTS: dict[str, Schema] = {
    "person": record(name=text(40, 1), age=whole(0, 120), email_=formatted("email")),
    "address": record(street=text(60), postcode=matching("^[0-9]{5}$"), country=matching("^[A-Z]{2}$")),
    "weather": record(city=text(30), unit=one_of("celsius", "fahrenheit"), degrees=NUMBER, rain=YES),
    "order": record(
        id=matching("^ORD-[0-9]{4}$"),
        items=several(record(sku=matching("^[A-Z]{3}[0-9]{2}$"), count=whole(1, 99)), 3, 1),
    ),
    "invoice": record(number=WHOLE, total=MONEY, due=formatted("date"), paid=YES),
    "review": record(stars=one_of(1, 2, 3, 4, 5), text=text(120), spoiler=YES),
    "sentiment": record(label=one_of("positive", "neutral", "negative"), score={"type": "number", "minimum": 0}),
    "entities": record(found=several(record(text=text(30, 1), kind=one_of("PER", "LOC", "ORG")), 4)),
    "event": record(title=text(50, 1), start=formatted("date-time"), guests=several(formatted("email"), 2)),
    "recipe": record(name=text(40), minutes=whole(1, 600), steps=several(text(60, 1), 4, 1), vegan=YES),
    "color": record(name=text(20), hex=COLOR, rgb=several(whole(0, 255), 3, 3)),
    "point": record(
        type={"const": "Point"}, coordinates={"type": "array", "prefixItems": [NUMBER, NUMBER], "items": False}
    ),
    "route": record(stops=several(POINT, 3, 2), mode=one_of("walk", "bike", "train")),
    "issue": record(
        title=text(60, 1), labels=several(one_of("bug", "feature", "docs"), 3), open=YES, assignee=maybe(TEXT)
    ),
    "commit": record(sha=matching("^[0-9a-f]{7,12}$"), message=text(72, 1), files=whole(0, 500)),
    "package": record(name=matching("^[a-z][a-z0-9-]{0,20}$"), version=matching("^\\d+\\.\\d+\\.\\d+$"), private_=YES),
    "job": record(
        **{"runs-on": one_of("ubuntu-latest", "macos-14")}, timeout=whole(1, 360), steps=several(text(40, 1), 3, 1)
    ),
    "log": record(level=one_of("DEBUG", "INFO", "WARN", "ERROR"), at=formatted("date-time"), message=text(80)),
    "sensor": record(id=formatted("uuid"), value=NUMBER, unit=one_of("V", "A", "°C", "Ω"), ok=YES),
    "transfer": record(
        iban=matching("^DE[0-9]{20}$"), amount={"type": "number", "exclusiveMinimum": 0}, note_=text(40)
    ),
    "card": record(
        last4=matching("^\\d{4}$"), expires=matching("^(0[1-9]|1[0-2])/\\d{2}$"), brand=one_of("visa", "amex")
    ),
    "quiz": record(question=text(90, 5), options=several(text(30, 1), 4, 4), answer=one_of("A", "B", "C", "D")),
    "chess": record(move=matching("^([KQRBN]?[a-h]?[1-8]?x?[a-h][1-8][+#]?|O-O(-O)?)$"), mate=YES),
    "translation": record(source=text(80), target=text(80), language=one_of("de", "fr", "ja", "ar")),
    "summary": record(headline=text(80, 1), points=several(text(80, 1), 3, 1)),
    "tool": record(name=one_of("search", "open", "save"), arguments=record(query=text(40), limit_=whole(1, 10))),
    "query": record(
        table=one_of("users", "orders"), where=several(record(column=text(12, 1), op=one_of("=", "<", ">")), 2)
    ),
    "config": record(
        debug=YES, port=whole(1024, 65535), hosts=several(formatted("ipv4"), 2, 1), level_=one_of(0, 1, 2)
    ),
    "flight": record(
        number=matching("^[A-Z]{2}[0-9]{1,4}$"), **{"from": matching("^[A-Z]{3}$")}, delay=maybe(whole(0, 900))
    ),
    "movie": record(title=text(50), year=whole(1888, 2030), cast=several(text(30, 1), 3), rating=maybe(NUMBER)),
    "matrix": record(rows=several(several(whole(-9, 9), 3, 3), 3, 3)),
    "plan": record(thought=text(120), actions=several(record(tool=one_of("grep", "edit"), path=text(40, 1)), 3, 1)),
    "patient": record(
        id=whole(1, 99999), blood=one_of("A+", "A-", "B+", "B-", "AB+", "0+", "0-"), allergies=several(text(20, 1), 2)
    ),
    "product": record(name=text(40, 1), price=MONEY, tags=several(text(12, 1), 3), stock=maybe(whole(0, 9999))),
    "time": record(
        begin=formatted("time"), weekday=one_of("Mon", "Tue", "Wed", "Thu", "Fri"), every_=formatted("duration")
    ),
    "label": record(text=text(60), unicode=one_of("é", "日本", 'a"b', "back\\slash", "line\nend"), count=WHOLE),
    "scores": {"type": "object", "additionalProperties": whole(0, 10), "minProperties": 1, "maxProperties": 3},
    "settings": {"type": "object", "patternProperties": {"^x-[a-z]{1,5}$": text(10)}, "additionalProperties": False},
    "pet": {
        "oneOf": [
            record(kind={"const": "cat"}, lives=whole(1, 9)),
            record(kind={"const": "dog"}, tricks=several(text(12, 1), 2)),
        ]
    },
    "value": {"type": ["integer", "boolean", "null"]},
}


def alone(subject: Schema) -> Schema:
    """The subject itself."""
    return subject


def listed(subject: Schema) -> Schema:
    """Results and their count, the subject as a definition."""
    listing = record(count=whole(0, 5), results=several({"$ref": "#/$defs/item"}, 2, 1))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": {"item": subject}, **listing}


def answered(subject: Schema) -> Schema:
    """The subject or an error."""
    return {"anyOf": [record(ok={"const": True}, data=subject), record(ok={"const": False}, error=text(60, 1))]}


def nested(subject: Schema) -> Schema:
    """A tree of nodes that have the subject and children of the same kind."""
    leaf = several({"$ref": "#/definitions/leaf"}, 2)
    node = record(name=matching("^[a-z]{1,8}$"), value=subject, children=leaf)
    return {"definitions": {"leaf": record(name=text(8, 1), size=whole(0, 100))}, **node}


def enveloped(subject: Schema) -> Schema:
    """The subject among what a message has beside it, in part by `allOf`."""
    return {
        "title": "Envelope",
        "description": "What the service answers.",
        "type": "object",
        "properties": {
            "version": {"const": "1.0"},
            "priority": TEXT,
            "body": subject,
            "trace": maybe(formatted("uuid")),
        },
        "required": ["version", "body"],
        "additionalProperties": False,
        "allOf": [{"properties": {"priority": one_of("low", "high")}, "required": ["priority"]}],
    }


SHAPES: tuple[Callable[[Schema], Schema], ...] = (alone, listed, answered, nested, enveloped)

#: By name, as `order/listed`.
JSON_SCHEMAS: dict[str, Schema] = {
    f"{name}/{shape.__name__}": shape(subject) for name, subject in SUBJECTS.items() for shape in SHAPES
}
