"""Tasks for lm-eval: by name, from a YAML file, or all of a folder.

lm-eval looks for a task's local data files below the working directory; here they lie beside the task's YAML file.
"""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from trifold.compress.files import reason
from trifold.core import embedded
from trifold.core.errors import InputError
from trifold.eval.harness import Tasks

_IGNORED = {"__pycache__", ".ipynb_checkpoints"}
_ADVICE = "`lm-eval ls tasks` lists lm-eval's own; yours are YAML files in --tasks-path"

_ELSEWHERE = {  # what is not done here
    "unsafe_code": "runs code that a model wrote",
    "doc_to_image": "shows images",
    "doc_to_audio": "plays sound",
}


def build(tasks: Iterable[str | os.PathLike[str]], tasks_path: Sequence[str | os.PathLike[str]]) -> Tasks:
    """See `trifold.eval.resolve_tasks`."""
    folders = [_folder(path) for path in tasks_path]
    for folder in folders:
        _definitions(folder)  # lm-eval skips what it cannot read
    names: list[str] = []
    files: dict[str, Path] = {}
    for each in tasks:
        path = Path(each or os.devnull).expanduser()  # "" is not the working directory
        if each == embedded.NAME and not path.exists():
            path = embedded.TASKS
        if path.is_dir() and next(path.rglob("*.yaml"), None):
            folders.append(path.resolve())
            names += _top_level(_definitions(path))
        elif path.is_file() and _looks_like_path(os.fspath(each)):
            name = _name(_read(path))
            if name is None:
                raise InputError(f"{path}: names no `task:` or `group:`; give a file that defines one")
            if files.setdefault(name, path.resolve()) != path.resolve():
                raise InputError(f"{path}: task {name!r} is also defined in {files[name]}; rename one of them")
            names.append(name)
        elif isinstance(each, str) and each and not _looks_like_path(each):
            names.append(each)
        else:
            what = "a folder without *.yaml" if path.is_dir() else "no such file or folder"
            raise InputError(f"--tasks {os.fspath(each)!r}: {what}; give names, YAML files or folders of them")
    if not names:
        raise InputError(f"--tasks: no task is named; {_ADVICE}")
    manager = _manager(names, folders, files)
    specs = dict.fromkeys(spec for name in names for spec in _matching(name, manager))
    for name in _missing(manager, specs):
        raise InputError(_unknown(name, manager))
    try:
        loaded = manager.load(list(specs))
    except InputError:
        raise
    except Exception as error:  # the same task twice; whatever a wrong group leads to
        advice = "name it once" if str(error).startswith("Duplicate") else "mend its definition or data"
        raise InputError(f"--tasks: {reason(error)}; {advice}") from error
    groups = loaded.get("groups", {})
    inner = {name for group in groups.values() for name in group.child_names}
    roots = [item for name, item in {**groups, **loaded["tasks"]}.items() if name not in inner]
    return Tasks(tuple(roots), dict(loaded["tasks"]), manager)


class _Factory(TaskFactory):
    """Finds data beside the YAML file, and says which task could not be built and why."""

    def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            config = super()._load_full_config(entry, overrides)
        except Exception as error:  # also from Python that the file names
            raise InputError(f"{entry.yaml_path}: cannot be read as a task ({reason(error)}); mend it") from error
        return config if entry.yaml_path is None else _beside(config, Path(entry.yaml_path).parent)

    def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Any:
        found = _read(Path(entry.yaml_path)) if entry.yaml_path else entry.cfg or {}
        for key, what in _ELSEWHERE.items():
            if found.get(key):
                raise InputError(f"task {entry.name!r} {what}; leave it out here and use lm-eval itself")
        config = self._load_full_config(entry, overrides)
        try:
            return super()._build_task(entry, overrides)
        except ImportError as error:
            raise InputError(f"task {entry.name!r} needs a package ({reason(error)}); install it") from error
        except (ConnectionError, DatasetNotFoundError) as error:
            raise InputError(_unreachable(entry.name, config)) from error
        except OSError as error:
            raise InputError(f"task {entry.name!r}: its data cannot be read ({reason(error)})") from error
        except Exception as error:  # whatever a wrong definition or damaged data leads to
            why = f"{type(error).__name__}: {reason(error)}"
            where = entry.yaml_path or entry.name
            raise InputError(f"{where}: lm-eval cannot build the task ({why}); mend its definition or data") from error


def _beside(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`config` with the relative local paths of its data made absolute where they exist below `folder`."""

    def absolute(value: Any) -> Any:
        if isinstance(value, str):
            return str(folder / value) if glob.glob(os.path.join(glob.escape(str(folder)), value)) else value
        if isinstance(value, Mapping):
            return {key: absolute(each) for key, each in value.items()}
        return [absolute(each) for each in value] if isinstance(value, list) else value

    if isinstance(config.get("task"), list):  # a group, which may define tasks
        config["task"] = [_beside(dict(each), folder) if isinstance(each, Mapping) else each for each in config["task"]]
    path = config.get("dataset_path")
    if isinstance(path, str) and path.startswith("."):
        config["dataset_path"] = absolute(path)
    arguments = config.get("dataset_kwargs")
    if isinstance(path, str) and "/" not in path and isinstance(arguments, Mapping):  # org/name: paths inside it
        changed = {key: absolute(arguments[key]) for key in ("data_files", "data_dir") if key in arguments}
        config["dataset_kwargs"] = {**arguments, **changed}
    return config


def _unreachable(name: str, config: Mapping[str, Any]) -> str:
    dataset = ":".join(str(config[key]) for key in ("dataset_path", "dataset_name") if config.get(key))
    where = (
        "it is not in the cache, and HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub is not reached"
    )
    return (
        f"task {name!r}: its dataset {dataset!r} cannot be had ({where}); run it once with network access, which "
        "fills the cache, or give a YAML task with local data (docs/evaluation.md)"
    )


def _manager(names: Sequence[str], folders: Sequence[Path], files: Mapping[str, Path]) -> TaskManager:
    """Knows the tasks of the folders and files; lm-eval's own, slow to read, only if one is named."""

    def knowing(everything: bool) -> TaskManager:
        manager = TaskManager(include_path=[str(each) for each in folders], include_defaults=everything)
        for name, path in files.items():
            manager.task_index.pop(name, None)
            TaskIndex.process_cfg(_read(path), path, manager.task_index)
        return manager

    manager = knowing(everything=False)
    if _missing(manager, names):
        manager = knowing(everything=True)
    manager._factory = _Factory(meta=None)
    return manager


def _missing(manager: TaskManager, names: Iterable[str]) -> list[str]:
    """What of these names, and of the groups among them, the manager does not know."""
    found: list[str] = []
    for name in names:
        entry = manager.task_index.get(name)
        found += [name] if entry is None else _missing(manager, _members(entry.cfg or {}))
    return found


def _matching(name: str, manager: TaskManager) -> list[str]:
    """The names that a pattern stands for; a plain name stands for itself."""
    return manager.match_tasks([name]) or [name] if "*" in name else [name]


def _unknown(name: str, manager: TaskManager) -> str:
    close = " or ".join(difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6))
    return f"unknown task {name!r}; " + (f"did you mean {close}?" if close else _ADVICE)


def _definitions(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> definition of every task and group below `folder`; files without either are templates."""
    found: dict[str, dict[str, Any]] = {}
    sources: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.yaml")):
        if _IGNORED.intersection(path.parts):
            continue
        config = _read(path)
        name = _name(config)
        if name is None:
            continue
        if name in found:
            raise InputError(f"{path}: task {name!r} is also defined in {sources[name]}; rename one of them")
        found[name], sources[name] = config, path
    return found


def _top_level(definitions: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Groups and tasks that no group here contains."""
    inner = {member for config in definitions.values() for member in _members(config)}
    return [name for name in definitions if name not in inner]


def _members(config: Mapping[str, Any]) -> list[str]:
    """Names of the tasks and groups that a group refers to, at any depth; nothing for a task."""
    found: list[str] = []
    for member in config["task"] if isinstance(config.get("task"), list) else ():
        if isinstance(member, str):
            found.append(member)
        elif isinstance(member, Mapping):
            inner = _members(member)
            found += inner if inner or "dataset_path" in member else [str(member.get("task") or member.get("group"))]
    return found


def _name(config: Mapping[str, Any]) -> str | None:
    """Of the task or group that a file defines; None if it is a template for others."""
    name = config.get("group") or config.get("task")
    return name if isinstance(name, str) else None


def _read(path: Path) -> dict[str, Any]:
    """A task file, without importing the functions that it names. Raises InputError if it cannot be read."""
    try:
        return dict(load_yaml(path, resolve_func=False))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({reason(error)}); mend it") from error
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as a task ({reason(error)}); mend it") from error


def _folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        raise InputError(f"--tasks-path {os.fspath(path)}: no such folder")
    return folder


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "~")) or "/" in name or name.endswith((".yaml", ".yml"))
