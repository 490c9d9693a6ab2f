"""Configuration: a tree of frozen dataclasses, filled from its defaults, an optional TOML file and the command line.

Every part of the program defines the dataclass of its own options; the training scripts in `examples/` compose them.
Environment variables are not read, and names that are not fields are errors.

    torchrun examples/sft.py --config my.toml --steps 200 optimizer.lr=1e-4 --dry-run
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")


class ConfigError(ValueError):
    """An option that does not exist or has the wrong type; the message says what came and what was expected."""


def load_config(config_class: type[T], arguments: Sequence[str] = (), default: T | None = None) -> T:
    """Defaults, overridden by the TOML file after `--config`, overridden by the other arguments.

    Defaults are the values of `default`, or if it is None those of `config_class`.

    Arguments are `--optimizer.lr 1e-4`, `--optimizer.lr=1e-4` or `optimizer.lr=1e-4`; a bool needs no value
    (`--dry-run`). Dashes in names mean underscores. Values are TOML (`[1, 2]`, `[{path = "a"}]`); strings need no
    quotes, `none` clears an optional value, and a list of strings can be written as `a,b`, as can a list of tables that
    need only one key: `--data.sources a.jsonl,b.jsonl`.

    Raises:
        ConfigError: an unknown name (the message has the nearest valid one), a wrong type, or an unreadable file.
    """
    tree: dict[str, Any] = {}
    for _, settings in given(config_class, arguments):
        tree = _merge(tree, settings)
    return _build(config_class, tree, config_class() if default is None else default, "")


def given(config_class: type[Any], arguments: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """(origin, tree of values) of every TOML file and of the command line; the later ones win.

    Names are checked, values are not.

    Raises:
        ConfigError: an unknown name on the command line, or an unreadable file.
    """
    words = list(arguments)
    files: list[tuple[str, dict[str, Any]]] = []
    from_arguments: dict[str, Any] = {}
    while words:
        name, annotation, value = _take_argument(config_class, words)
        if name == "config":
            files.append((f"from {Path(value).name}", _read_toml(Path(value))))
        else:
            from_arguments = _merge(from_arguments, _branch(name, _parse(annotation, value)))
    return [*files, ("from the command line", from_arguments)]


def resolve(
    config_class: type[T],
    arguments: Sequence[str],
    layers: Callable[[Mapping[str, Any]], Iterable[tuple[str, Mapping[str, Any]]]],
) -> tuple[T, dict[str, str]]:
    """`load_config` on top of settings that depend on what the user has given.

    Args:
        layers: called with dotted name -> unchecked value of what the user has given, it returns (origin, dotted name
            -> value) of further settings. They replace the defaults, the later ones win, and the user's win over all.

    Returns:
        (the configuration, dotted name -> origin of every value that is not a default).

    Raises:
        ConfigError: as `load_config`.
    """
    by_user = given(config_class, arguments)
    known = {name: value for _, settings in by_user for name, value in _flatten(config_class, settings)}
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, values in layers(known):
        for name, value in values.items():
            tree = _merge(tree, _branch(name, value))
            origins[name] = origin
    for origin, settings in by_user:
        tree = _merge(tree, settings)
        origins |= {name: origin for name, _ in _flatten(config_class, settings)}
    return _build(config_class, tree, config_class(), ""), origins


def _branch(name: str, value: Any) -> dict[str, Any]:
    """The tree with one value."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def _flatten(config_class: type[Any], tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of the options in a tree; names that do not exist are left out."""
    for field in option_fields(config_class):
        inner = _unwrap(_hints(config_class)[field.name])[0]
        value = tree.get(field.name)
        if dataclasses.is_dataclass(inner) and isinstance(value, Mapping):
            yield from _flatten(typing.cast(type, inner), value, f"{prefix}{field.name}.")
        elif field.name in tree:
            yield prefix + field.name, value


def _take_argument(config_class: type[Any], words: list[str]) -> tuple[str, Any, str]:
    """Remove the first argument from `words`: its dotted name, the annotation of the option, and the value as text."""
    word = words.pop(0)
    name, equals, value = word.partition("=")
    if not equals and not word.startswith("--"):
        raise ConfigError(f"argument {word!r} is neither `--key value` nor `key=value`")
    name = name.removeprefix("--").replace("-", "_")
    if name.replace(".", "_") in {field.name for field in option_fields(config_class)}:
        name = name.replace(".", "_")  # --resume.data is resume_data: "resume" is an option itself
    annotation = str if name == "config" else _find(config_class, name)
    if not equals:
        ends = not words or words[0].startswith("--")
        is_flag = _unwrap(annotation)[0] is bool and (ends or "=" in words[0])
        if ends and not is_flag:
            raise ConfigError(f"--{name} needs a value of type {_type_name(annotation)}")
        value = "true" if is_flag else words.pop(0)
    return name, annotation, value


def not_an_option(default: T) -> T:
    """Default of a dataclass field that callers may pass to the constructor, but that is not an option."""
    return dataclasses.field(default=default, metadata={"option": False})


def option_fields(config: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass, or of an instance, that are options or sections of options."""
    return [field for field in dataclasses.fields(config) if field.metadata.get("option", True)]


def check_positive(**values: float) -> None:
    """Raise ValueError for an option that is not a finite number above 0; the message has its name."""
    for name, value in values.items():
        if isinstance(value, bool) or not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}; expected a number above 0")


def check_at_least(least: float, **values: float) -> None:
    """Raise ValueError for an option that is not a finite number of at least `least`; the message has its name."""
    for name, value in values.items():
        if isinstance(value, bool) or not least <= value < float("inf"):
            raise ValueError(f"{name} is {value}; expected at least {least:g}")


def check_order(**values: float) -> None:
    """Raise ValueError if the first option is larger than the second; the message has both names."""
    (low, least), (high, most) = values.items()
    if least > most:
        raise ValueError(f"{low} is {least} and {high} is {most}; expected {low} <= {high}")


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every option of a dataclass instance, in the order of definition.

    A tuple of dataclasses (such as the list of data sources) is one option.
    """
    for field in option_fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def render(config: Any, origins: Mapping[str, str] | None = None) -> str:
    """The resolved configuration, one `name = value` line per option; `*` marks values that differ from the default.

    Args:
        origins: from `resolve`; then every line ends with the origin of its value.
    """
    default = dict(leaves(type(config)()))
    rows = [(name, json.dumps(_plain(value), ensure_ascii=False), value) for name, value in leaves(config)]
    width = max(len(name) for name, _, _ in rows)
    lines = []
    for name, text, value in rows:
        line = f"{'*' if default.get(name) != value else ' '} {name:<{width}} = {text}"
        lines.append(line if origins is None else f"{line}  # {origins.get(name, 'default')}")
    return "\n".join(lines)


def to_dict(config: Any) -> dict[str, Any]:
    """A JSON-able dict of the options of the tree; `from_dict` is its inverse."""
    return _plain(config)


def from_dict(config_class: type[T], values: Mapping[str, Any]) -> T:
    """The configuration of a dict from `to_dict`, with the checks of `load_config`."""
    return _build(config_class, values, config_class(), "")


def usage(config_class: type[Any]) -> str:
    """Help text: every option with its type, its default, and its entry in the docstring of its dataclass."""
    lines = []
    for name, value in leaves(config_class()):
        *sections, last = name.split(".")
        owner = config_class
        for section in sections:
            owner = _unwrap(_hints(owner)[section])[0]
        default = "none" if value is None else json.dumps(_plain(value))
        lines.append(f"  --{name} <{_type_name(_hints(owner)[last])}>  (default {default})")
        text = _attribute_help(owner, last)
        if text:
            lines.append(f"      {text[0].upper()}{text[1:]}")
    return "\n".join(lines)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}; expected a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not valid TOML: {error}") from None


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = _merge(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged


def _hints(cls: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _names(cls: type[Any], prefix: str = "") -> Iterator[str]:
    for field in option_fields(cls):
        inner = _unwrap(_hints(cls)[field.name])[0]
        if dataclasses.is_dataclass(inner):
            yield from _names(typing.cast(type, inner), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def _unknown(root: type[Any], name: str, prefix: str = "") -> ConfigError:
    known = list(_names(root, prefix))
    last = name.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6) or [k for k in known if k.rsplit(".", 1)[-1] == last]
    if not near:
        tails = {k.rsplit(".", 1)[-1]: k for k in known}
        near = [tails[t] for t in difflib.get_close_matches(last, tails, n=1, cutoff=0.5)]
    hint = f"; did you mean {near[0]!r}?" if near else f"; the options are {', '.join(known)}"
    return ConfigError(f"unknown option {name!r}{hint}")


def _find(root: type[Any], name: str) -> Any:
    """Annotation of the option with this dotted name; ConfigError if it does not exist."""
    annotation: Any = root
    for part in name.split("."):
        cls = _unwrap(annotation)[0]
        tables = [kind for kind in typing.get_args(cls) if typing.get_origin(kind) is dict]
        if typing.get_origin(cls) in (Union, types.UnionType) and tables:  # `str | dict[str, str]`
            cls = tables[0]
        if typing.get_origin(cls) is dict:
            annotation = typing.get_args(cls)[1]
            continue
        if not dataclasses.is_dataclass(cls) or part not in {f.name for f in option_fields(cls)}:
            raise _unknown(root, name)
        annotation = _hints(typing.cast(type, cls))[part]
    if dataclasses.is_dataclass(annotation):
        inside = ", ".join(f"{name}.{f.name}" for f in option_fields(annotation))
        raise ConfigError(f"{name!r} is a section, not an option; set one of {inside}")
    return annotation


def _unwrap(annotation: Any) -> tuple[Any, bool]:
    """`X | None` -> (X, True); anything else -> (itself, False)."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        inner = [a for a in typing.get_args(annotation) if a is not type(None)]
        if len(inner) == 1:
            return inner[0], len(inner) < len(typing.get_args(annotation))
    return annotation, False


def _type_name(annotation: Any) -> str:
    inner, optional = _unwrap(annotation)
    origin = typing.get_origin(inner)
    args = typing.get_args(inner)
    if origin is Literal:
        text = " | ".join(repr(a) for a in args)
    elif origin in (Union, types.UnionType):
        text = " | ".join(_type_name(a) for a in args)
    elif origin is not None:
        shown = ", ".join("..." if a is Ellipsis else _type_name(a) for a in args)
        text = f"{getattr(origin, '__name__', 'union')}[{shown}]"
    else:
        text = getattr(inner, "__name__", str(inner))
    return f"{text} | None" if optional else text


def _parse(annotation: Any, raw: str) -> Any:
    """The value of a command-line word, before its type is checked."""
    inner, optional = _unwrap(annotation)
    if optional and raw.lower() == "none":
        return None
    if inner in (str, Path) or (typing.get_origin(inner) is Literal and raw in typing.get_args(inner)):
        return raw
    table = _only_key(inner)
    if table and raw[:1] not in ("[", "{"):
        return [{table: word} for word in raw.split(",") if word]
    text = raw.lower() if raw in ("True", "False") else raw
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if typing.get_origin(inner) in (tuple, list) and typing.get_args(inner)[0] is str and raw[:1] != "[":
            return [word for word in raw.split(",") if word]
        return raw


def _only_key(annotation: Any) -> str | None:
    """The key of a list of tables whose only required key is a string, so that words can stand for tables."""
    args = typing.get_args(annotation)
    if typing.get_origin(annotation) not in (tuple, list) or not dataclasses.is_dataclass(args[0]):
        return None
    needed = [f.name for f in option_fields(args[0]) if f.default is f.default_factory is dataclasses.MISSING]
    return needed[0] if len(needed) == 1 and _hints(typing.cast(type, args[0]))[needed[0]] is str else None


def _build(cls: type[T], values: Mapping[str, Any], default: T, prefix: str) -> T:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.')} is a section of options; got {_shown(values)}")
    known = {f.name for f in option_fields(cls)}
    hints = _hints(cls)
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise _unknown(cls, prefix + key, prefix)
        where = prefix + key
        annotation = hints[key]
        if dataclasses.is_dataclass(annotation):
            changes[key] = _build(typing.cast(type, annotation), value, getattr(default, key), where + ".")
        else:
            changes[key] = _convert(annotation, value, where)
    try:
        return dataclasses.replace(typing.cast(Any, default), **changes)
    except (TypeError, ValueError) as error:  # from the checks in __post_init__ of the dataclass
        raise ConfigError(f"{prefix.rstrip('.') or cls.__name__}: {error}") from None


def _convert(annotation: Any, value: Any, where: str) -> Any:
    inner, optional = _unwrap(annotation)
    origin = typing.get_origin(inner)
    args = typing.get_args(inner)
    if value is None and (optional or inner in (Any, type(None))):
        return None
    if inner is Any:
        return value
    if dataclasses.is_dataclass(inner):
        return _build(typing.cast(type, inner), value, typing.cast(type, inner)(), where + ".")
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
    elif origin in (Union, types.UnionType):
        for option in args:
            try:
                return _convert(option, value, where)
            except ConfigError:
                continue
    elif origin in (tuple, list):
        if isinstance(value, (list, tuple)):
            if origin is list or (len(args) == 2 and args[1] is Ellipsis):
                return origin(_item(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
            if len(value) == len(args):
                return tuple(_item(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    elif origin is dict:
        if isinstance(value, Mapping):
            return {str(k): _item(args[1], v, f"{where}.{k}") for k, v in value.items()}
    elif inner is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif inner is Path and isinstance(value, (str, Path)):
        return Path(value)
    elif type(value) is inner:
        return value
    raise ConfigError(f"{where} must be {_type_name(annotation)}; got {_shown(value)}")


def _item(annotation: Any, value: Any, where: str) -> Any:
    """One element of a list. A dataclass element starts from its own defaults; its required fields must be given."""
    if not dataclasses.is_dataclass(annotation):
        return _convert(annotation, value, where)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a table of {annotation.__name__} options; got {_shown(value)}")  # type: ignore[union-attr]
    cls = typing.cast(type, annotation)
    known = {f.name: f for f in option_fields(cls)}
    hints = _hints(cls)
    for key in value:
        if key not in known:
            raise _unknown(cls, f"{where}.{key}", f"{where}.")
    required = [
        n for n, f in known.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [n for n in required if n not in value]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}, which {cls.__name__} requires")
    given = {k: _convert(hints[k], v, f"{where}.{k}") for k, v in value.items()}
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:  # from the checks in __post_init__ of the dataclass
        raise ConfigError(f"{where}: {error}") from None


def _shown(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in option_fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _attribute_help(cls: type[Any], name: str) -> str:
    """The `name: text` entry in the "Attributes:" section of the class docstring, on one line."""
    found: list[str] = []
    start = 0
    for line in (cls.__doc__ or "").splitlines():
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if found and (not stripped or indent <= start):
            break
        if found:
            found.append(stripped)
        elif ": " in stripped and name in stripped.split(": ")[0].split(", "):
            start = indent
            found.append(stripped.split(": ", 1)[1])
    return " ".join(found)
