"""Recipes are evaluated purely, and every mistake in one is a line with its place."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Workspace
from vzrepro.base.errors import UsageError
from vzrepro.base.model import FileHash, NarHash, origin_digest
from vzrepro.recipe.evaluate import PURE_MODULES, evaluate
from vzrepro.recipe.graph import DrvGraph, Node
from vzrepro.recipe.lock import Lock, PinnedFile, PinnedTree, SourcePin

Declare = Callable[..., DrvGraph]

TOOLS = """
from vzrepro import build, debian_image, local, read, text
TOOLS = debian_image("tools", suite="trixie", packages=["dash"])
"""
ONE = TOOLS + 'A = build("a", image=TOOLS, command=["true"], inputs={"t": text("t", "hello")})\n'


def test_targets_and_closure(declare: Declare) -> None:
    graph = declare(
        a=ONE,
        b="from recipes.a import A, TOOLS\nfrom vzrepro import build\n"
        'build("b", image=TOOLS, command=["true"], inputs={"a": A}, version="2")',
    )
    assert list(graph.targets) == ["a", "b", "debs-tools", "image-tools"]
    order = [node.target for node in graph.closure([graph.find("b")])]
    assert order.index("debs-tools") < order.index("image-tools") < order.index("a") < order.index("b")
    assert order.index("t") < order.index("a")
    assert graph.find("b").path.name == "b-2"
    assert graph.find("b").place == "recipes/b/__init__.py:3"


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("\nimport os\n", "b/__init__.py:2: a recipe may not import os: it reads the environment"),
        ("import time", "may not import time: it reads the clock"),
        ("from datetime import datetime", "may not import datetime: it reads the clock"),
        ("import os.path", "may not import os.path"),
        ("import socket", "may not import socket"),
        ("import subprocess", "may not import subprocess"),
        ("import numpy", "may not import numpy"),
        ("from pathlib import Path", "may not import pathlib"),
        ("\n\nopen('/etc/passwd')", "b/__init__.py:3: a recipe may not read '/etc/passwd'"),
        ("open('relative')", "may not read 'relative'"),
        ("open(__file__ + '.new', 'w')", "may not write to"),
        ("open(0)", "may not open a file descriptor"),
        ("import json\nopen(__file__ + '/../../../../out')", "outside the workspace"),
        # Ways around the importer, which the audit hook closes.
        ("import json\njson.decoder.scanner.__builtins__['__import__']('socket').socket()", "2: a recipe may not"),
        ("import json\njson.codecs.sys.modules['os'].listdir('/')", "2: a recipe may not do this (os.listdir)"),
        ("import json\njson.codecs.sys.modules['os'].system('true')", "2: a recipe may not do this (os.system)"),
        ("x = 1\ny = 1 / 0", "b/__init__.py:2: ZeroDivisionError"),
        ("def f(:\n", "b/__init__.py:1: syntax error"),
        ("from recipes.c import X", "there is no recipe module recipes.c"),
        ("from vzrepro import nix", "vzrepro has nothing called 'nix' for recipes"),
        ("from vzrepro import local\nlocal('nope')", "b/__init__.py:2: recipes/b/nope: no such file"),
        ("from vzrepro import local\nlocal('../a')", "must be a relative path"),
        ("from vzrepro import read\nread('/etc/passwd')", "must be a relative path"),
        (
            "from recipes.a import TOOLS\nfrom vzrepro import build\n\n"
            "build('a', image=TOOLS, command=['x'], inputs={})",
            "b/__init__.py:4: 'a' is already the name of the recipe at recipes/a/__init__.py:4",
        ),
        (
            "from recipes.a import TOOLS\nfrom vzrepro import build\n"
            "build('a b', image=TOOLS, command=['x'], inputs={})",
            "b/__init__.py:3: 'a b' is not a valid store name",
        ),
        (
            "from recipes.a import TOOLS\nfrom vzrepro import build\nbuild('b', image=TOOLS, command=[], inputs={})",
            "empty command",
        ),
        (
            "from recipes.a import TOOLS\nfrom vzrepro import build\n"
            "build('b', image=TOOLS, command=['x'], inputs={'i': 1})",
            "input 'i' is int",
        ),
        (
            "from recipes.a import A\nfrom vzrepro import build\nbuild('b', image=A, command=['x'], inputs={})",
            "is not an image",
        ),
        ("from vzrepro import crate_source\ncrate_source()", "b/__init__.py:2: TypeError"),
    ],
)
def test_mistakes_are_one_line_with_their_place(declare: Declare, source: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        declare(a=ONE, b=source)
    assert complaint in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.message.startswith("recipes/b/__init__.py:")


def test_import_cycle(declare: Declare) -> None:
    with pytest.raises(UsageError, match=r"recipes\.a → recipes\.b → recipes\.a"):
        declare(a="from recipes.b import B\nA = 1", b="from recipes.a import A\nB = 1")


def test_link_out_of_the_workspace(workspace: Workspace, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    root = workspace(a="open(__file__.replace('__init__.py', 'link'))")
    (root / "recipes/a/link").symlink_to(secret)
    with pytest.raises(UsageError, match="outside the workspace"):
        evaluate(root, Lock(), "linux/amd64")


def test_unknown_target_names_the_nearest(declare: Declare) -> None:
    with pytest.raises(UsageError) as caught:
        declare(a=ONE).find("image-tool")
    assert caught.value.reason is not None
    assert "image-tools" in caught.value.reason


def test_missing_and_outdated_pins(workspace: Workspace) -> None:
    root = workspace(a=ONE)
    with pytest.raises(UsageError, match=r"recipes/a/__init__.py:3: lock.toml has no image 'tools'"):
        evaluate(root, Lock(), "linux/amd64")


def test_reads_are_known(workspace: Workspace) -> None:
    opened = "[path] = local('more.py').tree.values()\nopen(path).read()"
    root = workspace(a=f"{ONE}local('dir', 'file')\nread('text')\n{opened}")
    folder = root / "recipes/a"
    (folder / "dir").mkdir()
    for name in ("dir/inner", "file", "text", "more.py"):
        (folder / name).write_text("")
    graph = evaluate(root, Lock(), "linux/amd64", lenient=True)
    assert graph.reads == {
        root / "recipes",
        *(folder / name for name in ("", "__init__.py", "dir", "dir/inner", "file", "text", "more.py")),
    }


def test_local_hash_sees_content_names_and_executable_bits_only(workspace: Workspace) -> None:
    root = workspace(a=ONE + "L = local('dir')\nbuild('l', image=TOOLS, command=['x'], inputs={'l': L})")
    folder = root / "recipes/a/dir"
    folder.mkdir()
    file = folder / "f"
    file.write_text("1")

    def path() -> str:
        return evaluate(root, Lock(), "linux/amd64", lenient=True).find("l").path.base

    first = path()
    file.touch()
    (folder / "__pycache__").mkdir()
    file.chmod(0o640)
    assert path() == first
    file.chmod(0o755)
    executable = path()
    file.chmod(0o644)
    file.write_text("2")
    assert len({first, executable, path()}) == 3


def test_versions_from_outside_give_usable_names(workspace: Workspace) -> None:
    root = workspace(
        a=TOOLS
        + "from vzrepro import debian_source\nS = debian_source('containerd', series='1.7', suite='trixie')\n"
        + "for name, version in (('a', S.version), ('b', 'v1:2/ä'), ('c', '1' * 300), ('d', '1.0+b~1')):\n"
        + "    build(name, version=version, image=TOOLS, command=['x'], inputs={'s': S})",
    )
    request = next(
        want.request for want in evaluate(root, Lock(), "linux/amd64", lenient=True).wants if want.name[0] == "c"
    )
    file = PinnedFile("mirror://debian/pool/main/c/containerd/containerd_1.7.24~ds1.orig.tar.xz", FileHash.of(b""), 1)
    lock = Lock({"containerd": SourcePin(request, "1.7.24~ds1", file)})
    graph = evaluate(root, lock, "linux/amd64", lenient=True)
    assert graph.find("source-containerd").path.name == "containerd_1.7.24_ds1.orig.tar.xz"
    assert [graph.find(name).path.name for name in "abcd"] == [
        "a-1.7.24_ds1",
        "b-v1_2__",
        "c-" + "1" * 209,
        "d-1.0+b_1",
    ]
    # What the derivation records, and the build key follows, is the version itself.
    assert graph.find("a").drv.version == graph.find("a").version == "1.7.24~ds1"


def test_links_of_an_image_are_in_its_hash_and_an_image_without_keeps_its_own(declare: Declare) -> None:
    def image(more: str = "") -> Node:
        return declare(a=TOOLS.replace('["dash"]', f'["dash"]{more}')).find("image-tools")

    plain = image()
    assert plain.drv.env == {"image_format": "1"}
    linked = image(', alternatives=True, links={"/usr/bin/vi": "/usr/bin/vim"}')
    assert linked.drv.env == {"image_format": "1", "alternatives": "1", "links": '{"/usr/bin/vi":"/usr/bin/vim"}'}
    assert image(", alternatives=False, links={}") == plain
    for path in ("usr/bin/vi", "/usr/../vi", "/"):
        with pytest.raises(UsageError, match=r"recipes/a/__init__\.py:3: link's path .* must be a"):
            image(f", links={{{path!r}: '/usr/bin/vim'}}")


def test_a_file_name_that_is_not_utf_8_is_refused(workspace: Workspace) -> None:
    root = workspace(a=TOOLS + "local('dir')")
    folder = root / "recipes/a/dir" / os.fsdecode(b"caf\xe9")
    folder.mkdir(parents=True)
    (folder / "f").touch()
    with pytest.raises(UsageError, match=r"recipes/a/__init__.py:4: the name 'dir/caf\\udce9/f' is not UTF-8"):
        evaluate(root, Lock(), "linux/amd64", lenient=True)


def test_limits_and_urls_stay_outside_the_hash(declare: Declare) -> None:
    plain = declare(a=ONE).find("a")
    limited = declare(a=ONE.replace("command=", "timeout_secs=5, memory_gib=1, disk_gib=2, command=")).find("a")
    assert limited.path == plain.path
    assert (limited.timeout_secs, limited.memory_bytes, limited.disk_bytes) == (5, 1 << 30, 2 << 30)


@pytest.mark.parametrize("statement", ["exit()", "raise SystemExit(0)", "raise GeneratorExit", "quit(3)"])
def test_a_recipe_cannot_end_the_evaluation(declare: Declare, statement: str) -> None:
    with pytest.raises(UsageError, match=r"^recipes/a/__init__.py:\d+: \w+Exit: a recipe may not end the evaluation$"):
        declare(a=f"{ONE}\n{statement}\n")


def test_an_exception_of_no_known_kind_names_its_place(declare: Declare) -> None:
    with pytest.raises(UsageError, match=r"recipes/a/__init__.py:\d+: Odd: so"):
        declare(a=f"{ONE}\nclass Odd(BaseException): pass\nraise Odd('so')\n")


def test_evaluation_leaves_the_process_as_it_was(declare: Declare) -> None:
    before = set(sys.modules)
    declare(a=ONE)
    assert not {name for name in set(sys.modules) - before if name.startswith("recipes")}
    Path("/etc/passwd").read_text()


def test_dashes_in_folders_are_underscores_in_imports(workspace: Workspace) -> None:
    root = workspace(**{"my-tool": ONE, "b": "from recipes.my_tool import A\nassert A.target == 'a'"})
    assert "a" in evaluate(root, Lock(), "linux/amd64", lenient=True).targets


@pytest.mark.parametrize("module", sorted(PURE_MODULES))
def test_pure_modules_can_be_imported(declare: Declare, module: str) -> None:
    declare(a=f"import {module}" if module != "__future__" else "from __future__ import annotations")


def test_a_package_imports_its_own_modules(workspace: Workspace) -> None:
    root = workspace(a="from recipes.a.data import X\nfrom .data import X as Y\nassert X is Y")
    (root / "recipes/a/data.py").write_text("X = object()")
    evaluate(root, Lock(), "linux/amd64")


@pytest.mark.parametrize(
    "change",
    [
        'object.__setattr__(A.drv, "command", ("sh", "-c", "echo EVIL > /out/tool"))',
        'object.__setattr__(A.drv, "env", {"EVIL": "yes"})',
        'object.__setattr__(A.drv.inputs["t"], "hex", "0" * 64)',
        'object.__setattr__(A, "drv_hash", TOOLS.drv_hash)',
        'object.__setattr__(A.path, "name", "evil")',
        'object.__setattr__(A, "timeout_secs", 1)',
        'object.__setattr__(T, "tree", {"": b"evil"})',
        'object.__setattr__(A, "drv", None)',
        'object.__delattr__(A, "path")',
        'class X(type(A.drv)):\n    __slots__ = ()\n    command = ("evil",)\nobject.__setattr__(A.drv, "__class__", X)',
        'class X:\n    def __eq__(self, other):\n        other["EVIL"] = "yes"\nA.drv.env == X()',
        'import dataclasses\nA = dataclasses.replace(A, target="b")\nimport json\n'
        'json.codecs.sys.modules["vzrepro.recipe.declaring"].add(A)',
    ],
)
def test_a_declaration_is_final(declare: Declare, change: str) -> None:
    with pytest.raises(UsageError, match=r"recipes/a/__init__.py:\d+: '[abt]'.* (was changed|no recipe function)"):
        declare(
            a=TOOLS + 'T = text("t", "hello")\n'
            'A = build("a", image=TOOLS, command=["true"], inputs={"t": T}, env={"A": "b"})\n' + change
        )


SHA = "ab" * 32


def test_a_url_with_its_hash_needs_no_lock(declare: Declare) -> None:
    urls = '"https://a.example/t-{version}.tar", "https://b.example/x"'
    graph = declare(
        a="from vzrepro import url_source\n"
        f'url_source("t", {urls}, version="1~2", sha256="{SHA}")\n'
        f'url_source("u", "https://a.example/get?what=u%2F", sha256="{SHA}", unpack=True)\n'
    )
    assert graph.wants == ()
    node = graph.find("source-t")
    assert (node.path.name, node.version) == ("t-1_2.tar", "1~2")
    assert node.files[""] == PinnedFile("https://a.example/t-1~2.tar", FileHash(SHA), None, ("https://b.example/x",))
    assert node.origin == origin_digest({"": "https://a.example/t-1~2.tar https://b.example/x"})
    unpacked = graph.find("source-u")
    assert (unpacked.path.name, dict(unpacked.drv.env), unpacked.version) == ("u", {"unpack": "1"}, "")
    assert unpacked.download_bytes == 0


def test_a_hash_in_capitals_is_the_same_hash(declare: Declare) -> None:
    graph = declare(
        a="from vzrepro import url_source\n"
        f'url_source("s", "https://a.example/x", sha256="{SHA}")\n'
        f'url_source("t", "https://a.example/x", sha256="{SHA.upper()}")\n'
        f'url_source("u", "https://a.example/x", sha256="sha256:{SHA.upper()}")\n'
    )
    assert len({graph.find(f"source-{name}").path for name in "stu"}) == 1


def test_a_fifo_beside_a_recipe_is_not_waited_for(workspace: Workspace) -> None:
    root = workspace(a='from vzrepro import read\nread("pipe")\n')
    os.mkfifo(root / "recipes/a/pipe")
    with pytest.raises(UsageError, match=r"recipes/a/__init__.py:2: recipes/a/pipe is no file"):
        evaluate(root, Lock(), "linux/amd64")


def test_sources_that_are_locked(workspace: Workspace) -> None:
    root = workspace(
        a="from vzrepro import git_source, pypi_source, url_source\n"
        'G = git_source("g", "https://a.example/g", tag="v*")\n'
        'P = pypi_source("p", series="1")\n'
        'U = url_source("u", "https://a.example/u-{version}.zip", "https://b.example/{version}", series="1")\n'
    )
    wants = {want.name: want.request for want in evaluate(root, Lock(), "linux/amd64", lenient=True).wants}
    tree = PinnedTree("https://a.example/g", "cd" * 20, NarHash(SHA), 7)
    file = PinnedFile("https://a.example/u-1.5.zip", FileHash(SHA), 9)
    wheel = PinnedFile("mirror://pypi/p/p-1.2.tar.gz", FileHash(SHA), 9)
    pins = {
        "g": SourcePin(wants["g"], "1.2", tree),
        "p": SourcePin(wants["p"], "1.2", wheel),
        "u": SourcePin(wants["u"], "1.5", file),
    }
    graph = evaluate(root, Lock(pins), "linux/amd64")
    node = graph.find("source-g")
    assert (node.path.name, node.checkout, node.drv.content) == ("g-1.2", tree, {"": NarHash(SHA)})
    assert (node.origin, node.download_bytes) == (origin_digest({"": f"git+https://a.example/g@{'cd' * 20}"}), 7)
    node.check()
    assert graph.find("source-p").path.name == "p-1.2.tar.gz"
    assert graph.find("source-u").files[""].others == ("https://b.example/1.5",)
    for change in (
        "G.checkout, 'commit', '0' * 40",
        "G.checkout.nar_hash, 'hex', '0' * 64",
        "U.files[''], 'others', ()",
    ):
        evil = workspace(evil=f"from recipes.a import G, U\nobject.__setattr__({change})\n")
        with pytest.raises(UsageError, match="was changed after it was declared"):
            evaluate(evil, Lock(pins), "linux/amd64")


def test_a_pin_of_another_kind(workspace: Workspace) -> None:
    tree = PinnedTree("https://a.example/g", "cd" * 20, NarHash(SHA), 7)
    file = PinnedFile("https://a.example/g", FileHash(SHA), 9)
    for call, wrong in (
        ('git_source("g", "https://a.example/g", tag="v1")', file),
        ('url_source("g", "https://a.example/g")', tree),
        ('crate_source("g", series="1")', tree),
    ):
        root = workspace(a=f"from vzrepro import crate_source, git_source, url_source\n{call}\n")
        (want,) = evaluate(root, Lock(), "linux/amd64", lenient=True).wants
        with pytest.raises(UsageError, match=f"has something else than a {want.kind} as 'g'") as caught:
            evaluate(root, Lock({"g": SourcePin(want.request, "1", wrong)}), "linux/amd64")
        assert "remove [source.g]" in (caught.value.hint or "")
        # One that was locked for another kind of source is only out of date.
        outdated = Lock({"g": SourcePin("0" * 64, "1", wrong)})
        evaluate(root, outdated, "linux/amd64", lenient=True)
        with pytest.raises(UsageError, match=r"lock\.toml (has no|is out of date)"):
            evaluate(root, outdated, "linux/amd64")


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        ('url_source("t")', "has no URL"),
        ('url_source("t", "ftp://x/y")', "is not a URL of http, https, file, mirror"),
        ('url_source("t", "https://x/a b")', "is not a URL"),
        ('url_source("t", "https://[/")', "is not a URL"),
        ('url_source("t", "https://me:secret@x.example/y")', "the URL of x.example holds a user or password"),
        ('url_source("t", "https://x/{version}")', "has {version} in it"),
        ('url_source("t", "https://x/y", series="1")', "series= of 't' is for a URL with {version} in it"),
        (
            f'url_source("t", "https://x/{{version}}", series="1", sha256="{SHA}")',
            "whose version and hash are not given",
        ),
        ('url_source("t", "https://x/y", sha256="abc")', "sha256 of 't'"),
        ('url_source("t", ["https://x/y", "https://z/y"])', "a URL of 't' is list, not text"),
        ('url_source("t", "https://x:99999/y")', "is not a URL"),
        ('url_source("t", "https://x:port/y")', "is not a URL"),
        ('url_source("t", "https:///y")', "is not a URL"),
        ('url_source("t", "https://me:secret@x.example:99999/y")', "the URL of x.example holds a user or password"),
        ('url_source("t", "https://x/{vers}", version="1")', "has {vers} in it, and only {version} stands"),
        ('url_source("t", "https://x/{version}/{", version="1")', "has { in it"),
        ('url_source("t", "https://x/}", version="1")', "has } in it"),
        ('url_source("t", "https://x/y", signature="https://x/{v}", key="k")', "has {v} in it"),
        ('url_source("t", "https://x/{version}", version=1.10)', "version is 1.1, which is float, not text"),
        ('url_source(7, "https://x/y")', "name is 7, which is int, not text"),
        ('git_source("t", ["https://x/y"], tag="v1")', "url is ['https://x/y'], which is list, not text"),
        ('git_source("t", "https://x:99999/y", tag="v1")', "is not a URL"),
        ('git_source("t", "https://x/y", rev=1234567)', "rev is 1234567, which is int, not text"),
        ('pypi_source("t", series=3.10)', "series is 3.1, which is float, not text"),
        ('crate_source("t", series=1)', "series is 1, which is int, not text"),
        ('debian_image("t", suite="trixie", packages="gcc")', "packages is text, not a list of texts"),
        (
            'build("t", image=debian_image("i", suite="s", packages=["x"]), command="make", inputs={})',
            "command is text",
        ),
        ('url_source("t", "https://x/y", key="k")', "only one of signature= and key="),
        ('url_source("t", "https://x/y", signature="https://x/y.sig", key="../k")', "key file '../k'"),
        ('url_source("t", "https://x/y", signature="https://x/y.sig", key="k")', "No such file"),
        ('git_source("t", "https://x/y")', "needs one of rev= and tag="),
        ('git_source("t", "https://x/y", rev="main")', "is not the full id of a commit"),
        ('git_source("t", "https://x/y", rev="abcdef")', "is not the full id of a commit"),
        ('git_source("t", "git@x:y", tag="v1")', "is not a URL"),
        ('git_source("t", "ext::sh -c x", tag="v1")', "is not a URL"),
        ('git_source("t", "--upload-pack=x", tag="v1")', "is not a URL"),
        ('git_source("t", "https://x/y", tag="--all")', "is no name of a tag"),
        ('git_source("t", "https://x/y", tag="a..b")', "is no name of a tag"),
        ('git_source("t", "https://x/y", tag="a b")', "is no name of a tag"),
        ('url_source("t/u", "https://x/y")', "is not a valid store name"),
    ],
)
def test_sources_that_are_declared_wrongly(declare: Declare, call: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        names = "build, crate_source, debian_image, git_source, pypi_source, url_source"
        declare(a=f"from vzrepro import {names}\n{call}")
    assert complaint in caught.value.message
    assert caught.value.message.startswith("recipes/a/__init__.py:2: ")


@pytest.mark.parametrize("change", ['A.drv.env["EVIL"] = "yes"', "A.drv.inputs.clear()", 'A.tree["x"] = b"evil"'])
def test_what_a_derivation_holds_is_read_only(declare: Declare, change: str) -> None:
    with pytest.raises(UsageError, match=r"recipes/a/__init__.py:5: (TypeError|AttributeError)"):
        declare(a=ONE + change)


def test_a_kind_of_text_says_to_the_builder_what_it_said_to_the_hash(declare: Declare) -> None:
    evil = 'class Evil(str):\n    def __format__(self, how):\n        return "evil"\n'
    graph = declare(
        a=TOOLS + evil + 'build("a", image=TOOLS, command=[Evil("x")], inputs={}, env={Evil("k"): Evil("v")})',
    )
    drv = graph.find("a").drv
    assert {type(word) for word in (*drv.command, *drv.env, *drv.env.values())} == {str}
    with pytest.raises(UsageError, match=r"recipes/b/__init__.py:2: a value in env is int, not text"):
        declare(b='from recipes.a import TOOLS, build\nbuild("b", image=TOOLS, command=["x"], inputs={}, env={"k": 1})')


def test_an_input_that_no_recipe_function_made(declare: Declare) -> None:
    forged = 'import dataclasses\nF = dataclasses.replace(A, drv_hash=type(A.drv_hash)("0" * 64))\n'
    with pytest.raises(UsageError, match=r"recipes/a/__init__.py:7: 'b', or an input of it, was made by no recipe"):
        declare(a=ONE + forged + 'build("b", image=TOOLS, command=["true"], inputs={"f": F})')


def test_what_changes_after_evaluation_is_not_made(declare: Declare) -> None:
    node = declare(a=ONE).find("a")
    node.check()
    object.__setattr__(node.drv, "command", ("false",))
    with pytest.raises(UsageError, match=r"recipes/a/__init__.py:4: 'a' was changed after its hash had been taken"):
        node.check()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.11 tells nobody of a new thread")
def test_a_recipe_starts_no_thread(declare: Declare) -> None:
    with pytest.raises(UsageError, match=r"recipes/a/__init__.py:2: a recipe may not do this \(_thread"):
        declare(a="import json\njson.codecs.sys.modules['_thread'].start_new_thread(print, ())")


def test_a_recipe_is_not_told_where_the_workspace_is(declare: Callable[..., DrvGraph]) -> None:
    source = """
from vzrepro import text
text("t", repr([globals().get("__file__"), globals().get("__path__"), __name__, __package__]))
"""
    [node] = declare(a=source).nodes.values()
    assert node.tree[""] == b"['recipes/a/__init__.py', ['recipes/a'], 'recipes.a', 'recipes.a']"
