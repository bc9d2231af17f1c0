"""Random JSON schemas of everything that constraints support: schema(seed) gives the same one again."""
import random

WORDS = ["name", "age", "città", "id", "tags", "value", "kind", "x", "note", "unit price", "a\"b", "日本"]
PATTERNS = [r"^[a-z]{2,6}$", r"^\d{3}-\d{2}$", r"^(foo|bar)+$", r"^#[0-9a-f]{6}$", r"^\S{1,12}$", r"^[^\d\s]{3}$", r"^.{0,20}$"]
FORMATS = ["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"]
LEAVES = ["string", "pattern", "format", "integer", "range", "multiple", "number", "bounds", "boolean", "null", "enum", "const", "types"]
BRANCHES = ["object", "object", "object", "array", "tuple", "anyOf", "oneOf", "ref", "map", "allOf"]


def leaf(rng):
    kind = rng.choice(LEAVES)
    low = rng.randint(-1000, 1000)
    return {
        "string": lambda: {"type": "string", "maxLength": rng.randint(0, 30), "minLength": 0},
        "pattern": lambda: {"type": "string", "pattern": rng.choice(PATTERNS)},
        "format": lambda: {"type": "string", "format": rng.choice(FORMATS)},
        "integer": lambda: {"type": "integer"},
        "range": lambda: {"type": "integer", rng.choice(["minimum", "exclusiveMinimum"]): low,
                          rng.choice(["maximum", "exclusiveMaximum"]): low + rng.randint(2, 5000)},
        "multiple": lambda: {"type": "integer", "multipleOf": rng.randint(1, 60)},
        "number": lambda: {"type": "number"},
        "bounds": lambda: {"type": "number", rng.choice(["minimum", "exclusiveMinimum"]): round(rng.uniform(-50, 50), rng.randint(0, 3)),
                           rng.choice(["maximum", "exclusiveMaximum"]): round(rng.uniform(51, 5000), rng.randint(0, 3))},
        "boolean": lambda: {"type": "boolean"},
        "null": lambda: {"type": "null"},
        "enum": lambda: {"enum": rng.sample(["a", "ab", "ç", 1, 2.5, True, None, "x\ny", {"k": [1, "v"]}], rng.randint(1, 5))},
        "const": lambda: {"const": rng.choice(["only", 7, -1.25, None, [], {"a": {}}])},
        "types": lambda: {"type": rng.sample(["boolean", "null", "integer"], rng.randint(1, 3))},
    }[kind]()


def obj(rng, depth, extra=None):
    names = rng.sample(WORDS, rng.randint(0, 5))
    out = {"type": "object", "properties": {name: node(rng, depth + 1) for name in names}}
    out["required"] = [name for name in names if rng.random() < 0.6]
    if rng.random() < 0.7:
        out["additionalProperties"] = False
    elif rng.random() < 0.3:
        out["additionalProperties"] = {"type": "boolean"}
    out.update(extra or {})
    return out


def node(rng, depth):
    if depth >= 4 or rng.random() < 0.45:
        return leaf(rng)
    kind = rng.choice(BRANCHES)
    if kind == "object":
        return obj(rng, depth, {"description": "d", "title": "t"})
    if kind == "array":
        low = rng.randint(0, 2)
        return {"type": "array", "items": node(rng, depth + 1), "minItems": low, "maxItems": low + rng.randint(0, 3)}
    if kind == "tuple":
        items = [node(rng, depth + 1) for _ in range(rng.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": rng.randint(0, len(items))}
    if kind == "anyOf":
        return {"anyOf": [node(rng, depth + 1) for _ in range(rng.randint(1, 3))]}
    if kind == "oneOf":
        return {"oneOf": [{"type": "object", "properties": {"type": {"const": word}, "v": leaf(rng)}, "required": ["type"],
                           "additionalProperties": False} for word in ("one", "two")]}
    if kind == "ref":
        return {"$ref": "#/$defs/tree"}
    if kind == "map":
        return {"type": "object", "additionalProperties": leaf(rng)}
    return {"allOf": [node(rng, depth + 1)]}


def schema(seed):
    rng = random.Random(seed)
    out = obj(rng, 0)
    out["$defs"] = {"tree": {"type": "object", "properties": {"v": leaf(rng), "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]}},
                             "required": ["v", "next"], "additionalProperties": False}}
    return out
