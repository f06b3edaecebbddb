"""recipes/ + Lock → `DrvGraph`, purely: no network, no clock, no environment, no file outside the workspace.

Recipe modules import only other recipes, `vzrepro` and a list of pure standard modules (a clock or the environment is
out of plain reach), and an audit hook (`sys.addaudithook`) refuses sockets, processes and foreign files whatever way
they are reached. docs/recipes.md says what that guarantees; `confined` has the kernel guarantee it, and `repeat` finds
more. The files that were read are kept: the evaluation cache of `vzrepro.noop` depends on exactly them.
"""

from __future__ import annotations

import builtins
import importlib
import os
import sys
import threading
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import vzrepro
from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.recipe import declaring, dsl
from vzrepro.recipe.declaring import EvaluationContext
from vzrepro.recipe.graph import DrvGraph
from vzrepro.recipe.lock import Lock

PURE_MODULES = frozenset(
    {
        "__future__",
        "abc",
        "base64",
        "collections",
        "collections.abc",
        "copy",
        "dataclasses",
        "enum",
        "functools",
        "hashlib",
        "itertools",
        "json",
        "math",
        "operator",
        "re",
        "string",
        "textwrap",
        "tomllib",
        "types",
        "typing",
    }
)
"""What a recipe may import besides `vzrepro` and `recipes.*`."""

_LIBRARY = "vzrepro.recipes"

_WHY_NOT = {
    "datetime": "it reads the clock",
    "os": "it reads the environment and the file system",
    "pathlib": "it reaches files the evaluation cannot see; use local() and read()",
    "platform": "it reads the host",
    "random": "it is not reproducible",
    "secrets": "it is not reproducible",
    "socket": "it opens sockets",
    "subprocess": "it starts processes",
    "sys": "it reads the host's Python",
    "tempfile": "it writes files",
    "time": "it reads the clock",
    "uuid": "it is not reproducible",
}

_FORBIDDEN_EVENTS = (
    "_thread.",
    "ctypes.",
    "ftplib.",
    "gc.",
    "http.",
    "imaplib.",
    "mmap.",
    "os.",
    "poplib.",
    "pty.",
    "shutil.",
    "signal.",
    "smtplib.",
    "socket.",
    "sqlite3.",
    "subprocess.",
    "sys.addaudithook",
    "sys.setprofile",
    "sys.settrace",
    "syslog.",
    "tempfile.",
    "urllib.",
    "webbrowser.",
    "winreg.",
)


def evaluate(root: Path, lock: Lock, platform: str, *, lenient: bool = False) -> DrvGraph:
    """Run every module of `root`/recipes and collect what they declare.

    `platform` is the build platform (`linux/amd64`). `lenient` tolerates missing and outdated pins, for
    `vzrepro lock`. Raises UsageError, one line with `file:line` of the recipe: impurity, unknown import, syntax
    error, import cycle, duplicate or bad name, missing pin, any exception the recipe raises.
    """
    root = root.resolve()
    loader = _Loader(root)
    context = EvaluationContext(root=root, lock=lock, platform=platform, lenient=lenient, trusted=_GUARD.suspended)
    with _GUARD.active(context, loader), loader.installed():
        leave = declaring.enter(context)
        try:
            loader.load_all()
            context.check_seals()
        finally:
            leave()
    nodes = dict(context.parts)
    return DrvGraph(
        root=root,
        targets=dict(sorted(context.nodes.items())),
        nodes=nodes,
        wants=tuple(context.wants[key] for key in sorted(context.wants)),
        reads=frozenset(context.reads | loader.reads),
    )


class _Guard:
    """The purity guard: one audit hook for the life of the process, awake only inside an evaluation's thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._installed = False
        self._thread: int | None = None
        self._context: EvaluationContext | None = None
        self._suspended = 0

    @contextmanager
    def active(self, context: EvaluationContext, loader: _Loader) -> Iterator[None]:
        """Guard the calling thread; evaluations in other threads wait."""
        with self._lock:
            if not self._installed:
                sys.addaudithook(self._hook)
                self._installed = True
            self._context, self._suspended, self._thread = context, 0, threading.get_ident()
            try:
                yield
            finally:
                self._thread = None
                self._context = None

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let vzrepro's own code read files."""
        self._suspended += 1
        try:
            yield
        finally:
            self._suspended -= 1

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self._thread != threading.get_ident() or self._suspended or self._context is None:
            return
        if event == "open":
            self._check_open(self._context, args)
        elif event.startswith(_FORBIDDEN_EVENTS):
            raise UsageError(f"{self._context.place()}: a recipe may not do this ({event}): evaluation is pure")

    def _check_open(self, context: EvaluationContext, args: tuple[Any, ...]) -> None:
        path, _mode, flags = args
        if isinstance(path, int):
            raise UsageError(f"{context.place()}: a recipe may not open a file descriptor")
        name = os.fsdecode(path)
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise UsageError(f"{context.place()}: a recipe may not write to {name!r}")
        # Resolved, so that neither `..` nor a symbolic link leads out of the workspace.
        with self.suspended():
            real = Path(os.path.realpath(name))
        if not Path(name).is_absolute() or not real.is_relative_to(context.root):
            raise UsageError(
                f"{context.place()}: a recipe may not read {name!r}: it is outside the workspace",
                hint="read files beside the recipe with read('name')",
            )
        context.reads.add(Path(name))


_GUARD = _Guard()


class _Loader:
    """Imports recipe modules under the names `recipes.*`, from source, into a `sys.modules` that is put back."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.reads: set[Path] = set()
        self._modules: dict[str, types.ModuleType] = {}
        self._loading: list[str] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """`dataclasses` and `enum` look modules up in sys.modules: keep ours there while recipes run."""
        before = {name: module for name, module in sys.modules.items() if _is_recipe(name)}
        for name in before:
            del sys.modules[name]
        try:
            yield
        finally:
            for name in self._modules:
                sys.modules.pop(name, None)
            sys.modules.update(before)

    def load_all(self) -> None:
        """Load `recipes/*.py` and `recipes/*/__init__.py`, in the order of their names."""
        folder = self.root / "recipes"
        with _GUARD.suspended():
            if not folder.is_dir():
                raise UsageError(f"{self.root} has no recipes/ directory", hint="run in a workspace, or pass -C DIR")
            self.reads.add(folder)
            names = []
            for entry in sorted(folder.iterdir()):
                if entry.suffix == ".py" and entry.stem != "__init__":
                    names.append(entry.stem)
                elif (entry / "__init__.py").is_file():
                    self.reads.add(entry)
                    names.append(entry.name)
        for name in names:
            self._load(f"recipes.{name.replace('-', '_')}", "recipes")

    def _load(self, name: str, place: str) -> types.ModuleType:
        if name in self._modules:
            if name in self._loading:
                chain = " → ".join([*self._loading[self._loading.index(name) :], name])
                raise UsageError(f"{place}: recipes import each other in a cycle: {chain}")
            return self._modules[name]
        module = types.ModuleType(name)
        if name == "recipes":
            self._modules[name] = sys.modules[name] = module
            module.__path__ = ["recipes"]
            return module
        parent = name.rpartition(".")[0]
        if parent not in self._modules:
            self._load(parent, place)
        path, is_package = self._find(name, place)
        self._modules[name] = sys.modules[name] = module
        # As the workspace has it: where a clone is must not get into what a recipe declares.
        module.__file__ = path.relative_to(self.root).as_posix()
        if is_package:
            module.__path__ = [path.parent.relative_to(self.root).as_posix()]
        module.__package__ = name if is_package else parent
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": self._import, "input": None, "breakpoint": None}
        self._loading.append(name)
        try:
            self._run(module, path)
        finally:
            self._loading.pop()
        setattr(self._modules[parent], name.rpartition(".")[2], module)
        return module

    def _find(self, name: str, place: str) -> tuple[Path, bool]:
        # A folder may have dashes, as artifacts' names do (`guest-agent`); in an import they are underscores.
        plain = self.root.joinpath(*name.split("."))
        dashed = self.root.joinpath("recipes", *name.replace("_", "-").split(".")[1:])
        with _GUARD.suspended():
            for base in (plain, dashed):
                for path, is_package in ((base / "__init__.py", True), (base.with_suffix(".py"), False)):
                    if path.is_file():
                        return path, is_package
        raise UsageError(f"{place}: there is no recipe module {name}")

    def _run(self, module: types.ModuleType, path: Path) -> None:
        shown = path.relative_to(self.root).as_posix()
        self.reads.add(path)
        try:
            with _GUARD.suspended():
                code = compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
            exec(code, vars(module))
        except VzreproError:
            raise
        except SyntaxError as error:
            raise UsageError(f"{shown}:{error.lineno}: syntax error: {error.msg}") from error
        except RecursionError as error:
            raise UsageError(f"{shown}: the recipe recurses without end") from error
        except KeyboardInterrupt:
            raise
        except (SystemExit, GeneratorExit) as error:
            what = f"{type(error).__name__}: a recipe may not end the evaluation"
            raise UsageError(f"{self._blame(error, shown)}: {what}") from error
        except BaseException as error:
            raise UsageError(f"{self._blame(error, shown)}: {type(error).__name__}: {error}") from error

    def _blame(self, error: BaseException, fallback: str) -> str:
        with _GUARD.suspended():
            frames = traceback.extract_tb(error.__traceback__)
        for frame in reversed(frames):
            if frame.filename.startswith(str(self.root / "recipes")):
                return f"{Path(frame.filename).relative_to(self.root).as_posix()}:{frame.lineno}"
        return fallback

    def _import(
        self,
        name: str,
        globals_: Mapping[str, Any] | None = None,
        locals_: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> types.ModuleType:
        """`__import__` for recipes: recipes from the workspace, pure modules from the standard library, no other."""
        place = declaring.place(self.root)
        if level:
            package = str((globals_ or {}).get("__package__") or "recipes")
            stem = package.rsplit(".", level - 1)[0] if level > 1 else package
            name = f"{stem}.{name}" if name else stem
        if _is_recipe(name):
            module = self._load(name, place)
            for item in fromlist or ():
                if not hasattr(module, item) and hasattr(module, "__path__"):
                    setattr(module, item, self._load(f"{name}.{item}", place))
            return module if fromlist else self._modules["recipes"]
        if name in ("vzrepro", "vzrepro.recipe.dsl", _LIBRARY):
            with _GUARD.suspended():
                module = importlib.import_module(_LIBRARY) if name == _LIBRARY else dsl
                known = getattr(module, "__all__", vzrepro.DSL)
                for item in fromlist or ():
                    if item not in known:
                        raise UsageError(
                            f"{place}: {name} has nothing called {item!r} for recipes",
                            hint=f"there are: {', '.join(known)}; a newer vzrepro may have more (vzrepro --version)",
                        )
            return module if fromlist else vzrepro
        if name in PURE_MODULES:
            with _GUARD.suspended():
                return builtins.__import__(name, None, None, fromlist or (), 0)
        top = name.partition(".")[0]
        why = _WHY_NOT.get(top, "evaluation is pure")
        raise UsageError(
            f"{place}: a recipe may not import {name}: {why}",
            hint=f"recipes import vzrepro, recipes.* and: {', '.join(sorted(PURE_MODULES))}",
        )


def _is_recipe(name: str) -> bool:
    return name == "recipes" or name.startswith("recipes.")
