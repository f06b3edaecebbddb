"""Real git repositories for tests, and a real server in front of them: git's own `http-backend`."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_WHO = {
    "GIT_AUTHOR_NAME": "A",
    "GIT_AUTHOR_EMAIL": "a@example.com",
    "GIT_AUTHOR_DATE": "1700000000 +0000",
    "GIT_COMMITTER_NAME": "A",
    "GIT_COMMITTER_EMAIL": "a@example.com",
    "GIT_COMMITTER_DATE": "1700000000 +0000",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
}


@dataclass(frozen=True)
class Repository:
    """A bare repository at `path`. Commits are made of objects, so that any tree can be, also one no checkout holds."""

    path: Path

    def git(self, *words: str, data: bytes = b"") -> str:
        """What a command says, stripped."""
        done = subprocess.run(["git", *words], cwd=self.path, input=data, capture_output=True, check=False, env=_env())
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().strip()

    @property
    def url(self) -> str:
        return f"file://{self.path}"

    def blob(self, content: bytes) -> str:
        return self.git("hash-object", "-w", "--stdin", data=content)

    def tree(self, *rows: tuple[str, str, bytes]) -> str:
        """The tree of these rows (mode, object id, name), written as they are: git itself would refuse some."""
        size = len(rows[0][1]) // 2 if rows else 20
        assert all(len(row[1]) == 2 * size for row in rows)
        raw = b"".join(mode.encode() + b" " + name + b"\0" + bytes.fromhex(found) for mode, found, name in rows)
        return self.git("hash-object", "-t", "tree", "-w", "--stdin", "--literally", data=raw)

    def files(self, files: Mapping[str, bytes]) -> str:
        """The tree of these files; names with slashes make directories. A name that ends with ! may be run, one that
        ends with @ is a link."""
        below: dict[str, dict[str, bytes]] = {}
        rows = []
        for name, content in files.items():
            folder, slash, rest = name.partition("/")
            if slash:
                below.setdefault(folder, {})[rest] = content
                continue
            mode = {"!": "100755", "@": "120000"}.get(name[-1:], "100644")
            rows.append((mode, self.blob(content), name.rstrip("!@").encode()))
        rows += [("40000", self.files(inside), name.encode()) for name, inside in below.items()]
        return self.tree(*sorted(rows, key=lambda row: row[2] + (b"/" if row[0] == "40000" else b"")))

    def commit(self, tree: str | Mapping[str, bytes], *, branch: str = "main", parent: str | None = None) -> str:
        """A commit of a tree, at the tip of the branch."""
        made = tree if isinstance(tree, str) else self.files(tree)
        found = self.git("commit-tree", made, "-m", "x", *(["-p", parent] if parent else []))
        self.git("update-ref", f"refs/heads/{branch}", found)
        return found

    def tag(self, name: str, commit: str, *, annotated: bool = False) -> None:
        self.git("tag", "--force", *(["-a", "-m", "x"] if annotated else []), name, commit)


def _env() -> dict[str, str]:
    return {**os.environ, **_WHO}


def make(path: Path, *options: str) -> Repository:
    """A new, empty repository."""
    path.mkdir(parents=True)
    repository = Repository(path)
    repository.git("init", "--quiet", "--bare", "--initial-branch=main", *options, ".")
    return repository


@dataclass
class GitServer:
    """`git http-backend` for all below `root`. `redirect` maps a first part of the path to the URL it has moved to;
    `forbidden` are paths where a password is asked for."""

    root: Path
    redirect: dict[str, str] = field(default_factory=dict)
    forbidden: set[str] = field(default_factory=set)
    fail_once: int = 0
    requests: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def serving(root: Path) -> Iterator[GitServer]:
    """Serve the repositories below `root` over HTTP until the end of the block."""
    server = GitServer(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_args: object) -> None:
            return

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path, _, query = self.path.partition("?")
            server.requests.append(self.path)
            first = path.split("/")[1]
            length = int(self.headers.get("Content-Length") or 0)
            data = self.rfile.read(length) if self.headers.get("Transfer-Encoding") != "chunked" else self._chunks()
            if server.fail_once:
                server.fail_once -= 1
                self._say(503)
            elif first in server.redirect:
                where = server.redirect[first] + path[len(first) + 1 :] + (f"?{query}" if query else "")
                self._say(301, Location=where)
            elif first in server.forbidden:
                self._say(401, **{"WWW-Authenticate": 'Basic realm="x"'})
            else:
                self._backend(path, query, data)

        def _say(self, code: int, **headers: str) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _chunks(self) -> bytes:
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data

        def _backend(self, path: str, query: str, data: bytes) -> None:
            environ = {
                **_env(),
                "GIT_PROJECT_ROOT": str(root),
                "GIT_HTTP_EXPORT_ALL": "1",
                "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
                "PATH_INFO": path,
                "QUERY_STRING": query,
                "REQUEST_METHOD": self.command,
                "CONTENT_TYPE": self.headers.get("Content-Type", ""),
                "CONTENT_LENGTH": str(len(data)),
                "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            }
            done = subprocess.run(["git", "http-backend"], input=data, env=environ, capture_output=True, check=False)
            head, _, body = done.stdout.partition(b"\r\n\r\n")
            told = [line.partition(": ")[::2] for line in head.decode().split("\r\n")]
            code = next((int(value.split()[0]) for name, value in told if name == "Status"), 200)
            self.send_response(code)
            for name, value in told:
                if name not in ("Status", ""):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        server.url = f"http://127.0.0.1:{http.server_address[1]}"
        yield server
        http.shutdown()
