"""Presets and configuration files: YAML to a flat list of (key, value), and back."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml

from ..names import UsageError, unknown
from ..schema import Size, by_any_name, options_of
from .other_tools import flag_hint
from .paths import absolute_paths

PRESETS = Path(__file__).parent.parent / "presets"
# Keys of a file beside options: the verb it is for, and one line about it.
ABOUT_KEYS = ("verb", "about")


class _Loader(yaml.SafeLoader):
    """The safe loader, but a repeated key is an error; YAML would silently use the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {key_node.value} stands twice", key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _TextLoader(_Loader):
    """Keeps values as written, except null; `convert` gives each the type of its option.

    YAML 1.1 would read `off` as false, 010 as 8, 1:30 as 90, and 1e-5 as text.
    """


_KEPT = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
_TextLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag in _KEPT]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_OCTAL = re.compile(r"[+-]?0[0-9_]+")


def preset_names(verb: str) -> list[str]:
    """The names of a verb's presets, from the folder named by the last word of the verb."""
    return sorted(path.stem for path in (PRESETS / verb.split()[-1]).glob("*.yaml"))


def all_presets() -> list[str]:
    """Every preset as method/name."""
    return sorted(f"{path.parent.name}/{path.stem}" for path in PRESETS.glob("*/*.yaml"))


def preset_path(name: str, verb: str) -> Path:
    names = preset_names(verb)
    if name not in names:
        listed = f"there are {', '.join(names)}" if names else "this verb has none"
        raise unknown("preset", name, names, otherwise=listed)
    return PRESETS / verb.split()[-1] / f"{name}.yaml"


def config_path(name: str, verb: str) -> Path:
    """A configuration file, or the `config.yaml` of a run folder or of a folder inside one, such as a checkpoint."""
    path = Path(name).expanduser()
    if path.is_dir():
        places = [path, *path.resolve().parents[:2]]
        found = next((place / "config.yaml" for place in places if (place / "config.yaml").is_file()), None)
        if found is None:
            raise UsageError(f"--config {name}: the folder holds no config.yaml")
        return found
    if not path.is_file():
        if path.suffix == ".py":
            raise UsageError(f"--config {name}: a Python configuration is a program; write its options as YAML")
        near = ", a preset has this name: use --preset" if name in preset_names(verb) else ""
        raise UsageError(f"--config {name}: no such file{near}")
    return path


def read_yaml(path: Path, *, as_text: bool = False) -> dict[str, Any]:
    """The mapping in a YAML file; `as_text` keeps every value except null as it was written.

    Raises:
        UsageError: not YAML (with line and column), or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, Loader=_TextLoader) if as_text else yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(f"{path}:{place} {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a YAML file: {str(error).splitlines()[0]}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected `key: value` lines, found {type(content).__name__}")
    return content


def settings_of(content: dict[str, Any], options_class: type, verb: str, origin: str) -> list[tuple[str, Any]]:
    """The settings in a file as (key, value), sections flattened.

    Raises:
        UsageError: the file is for another verb, or has an unknown key (with the nearest valid one).
    """
    if content.get("verb", verb) != verb:
        raise UsageError(f"{origin}: written for `{content['verb']}`, not for `{verb}`")
    sections = {described.section for described in options_of(options_class).values()}
    names = by_any_name(options_class)
    settings: list[tuple[str, Any]] = []
    for key, value in content.items():
        if key in ABOUT_KEYS:
            continue
        if key in sections and (value is None or isinstance(value, dict)):
            settings += [(f"{key}.{name}", inner) for name, inner in (value or {}).items()]
        elif isinstance(value, dict):
            raise _in(origin, unknown("section", str(key), sections, otherwise=f"there are {', '.join(sections)}"))
        else:
            settings.append((str(key), value))
    for key, value in settings:
        if key not in names:
            raise _in(origin, unknown_key(key, options_class, verb))
        if names[key].kind in (int, float, Size) and isinstance(value, str) and _OCTAL.fullmatch(value):
            plain = value.replace("_", "").lstrip("+-0") or "0"
            raise UsageError(f"{origin}: {names[key].key} {value} would be octal in YAML: write {plain}")
    return settings


def unknown_key(key: str, options_class: type, verb: str) -> UsageError:
    """The error for a dotted key; for a known name in a wrong section it names the right one."""
    names = by_any_name(options_class)
    candidates = [name for name in names if "." in name or "." not in key]
    bare = key.rpartition(".")[2]
    if bare in names:
        return UsageError(f"unknown key {key}; did you mean {names[bare].section}.{bare}?")
    if (hint := flag_hint(key, names) or flag_hint(bare, names)) is not None:
        return UsageError(f"unknown key {key}; {hint}")
    return unknown("key", key, candidates, otherwise=f"`diffusion-align {verb} --help` lists them all")


def _in(origin: str, error: UsageError) -> UsageError:
    return UsageError(f"{origin}: {error}")


def to_yaml(options: Any, verb: str, *, absolute: bool = False) -> str:
    """The resolved options by section, in the format of --config, without options that are not saved (`Option.saved`).

    `absolute`: make relative paths absolute, for a file that is read from other folders.
    """
    content: dict[str, Any] = {"verb": verb}
    values = dataclasses.asdict(options)
    for described in options_of(type(options)).values():
        if described.saved:
            value = values[described.name]
            value = absolute_paths(described, value) if absolute else value
            value = list(value) if isinstance(value, tuple) else value
            content.setdefault(described.section, {})[described.name] = value
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
