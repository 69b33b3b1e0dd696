"""A Hugging Face hub on the loopback interface that answers what the real ``huggingface_hub`` asks.

Repositories may be gated, private or removed, requests are recorded and their bytes counted, and the whole hub can be
switched off. Weights are sent as the real hub sends them: by a redirect to another host.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LARGE = ".safetensors"
GRANTED = "hf_granted"
"""The token that may read gated and private repositories and write."""


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def resolve(self, revision: str) -> str | None:
        commit = self.refs.get(revision, revision)
        return commit if commit in self.commits else None


@dataclass
class Refusal(Exception):  # noqa: N818  (it is an answer)
    """An answer that is no success, with the header by which ``huggingface_hub`` tells it from others."""

    status: int
    code: str = ""
    message: str = ""
    commit: str = ""


class Hub:
    """The hub. ``url`` is its endpoint.

    Attributes:
        repos: By ``owner/name``.
        requests: (method, path) of every request, in order.
        sent: ``owner/name/file`` -> bytes of it that were sent.
        failing: Answer everything with this status, if it is not 0.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.sent: Counter[str] = Counter()
        self.large: dict[str, bytes] = {}
        self.failing = 0
        self._server: ThreadingHTTPServer | None = None
        self._port = 0
        self.on()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def on(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), type("Handler", (_Handler,), {"hub": self}))
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def off(self) -> None:
        """Nobody listens any more."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()
        self._server = None

    def add(self, repo: str, folder: Path, revision: str = "main", commit: str = "", **kind: bool) -> str:
        """Publish the files of a folder under a branch, and return the commit."""
        return self.commit(
            repo,
            {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()},
            revision,
            commit,
            **kind,
        )

    def commit(self, repo: str, files: dict[str, bytes], revision: str = "main", commit: str = "", **kind: bool) -> str:
        name = (
            commit
            or hashlib.sha1(repr(sorted((n, hashlib.sha1(b).digest()) for n, b in files.items())).encode()).hexdigest()
        )
        there = self.repos.setdefault(repo, Repo())
        there.commits[name] = files
        there.refs[revision] = name
        for key, value in kind.items():
            setattr(there, key, value)
        return name

    def forget(self) -> None:
        """Start counting anew."""
        self.requests.clear()
        self.sent.clear()

    def downloaded(self, repo: str) -> set[str]:
        """Files of a repository of which anything was sent."""
        return {name.removeprefix(repo + "/") for name, n in self.sent.items() if n and name.startswith(repo + "/")}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self) -> None:
        hub, path = self.hub, urlsplit(self.path).path
        parts = [unquote(part) for part in path.strip("/").split("/")]
        hub.requests.append((self.command, unquote(path)))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        try:
            if hub.failing:
                raise Refusal(hub.failing)
            if parts[:2] == ["api", "models"] and self.command == "GET":
                self._info("/".join(parts[2:4]), *parts[4:])
            elif "resolve" in parts:
                self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            elif parts[0] == "cdn":
                if self.token:
                    raise Refusal(400, message="a signed URL must not be sent the hub's token")
                repo, commit, file = "/".join(parts[1:3]), parts[3], "/".join(parts[4:])
                self._send_file(f"{repo}/{file}", hub.repos[repo].commits[commit][file])
            elif self.command in ("POST", "PUT"):
                self._write(parts)
            else:
                raise Refusal(404, message=f"this hub does not know {self.command} {path}")
        except Refusal as refusal:
            headers = {
                "X-Error-Code": refusal.code,
                "X-Error-Message": refusal.message,
                "X-Repo-Commit": refusal.commit,
            }
            self._send(
                refusal.status, json.dumps({"error": refusal.message}).encode(), {k: v for k, v in headers.items() if v}
            )

    # Reading.

    def _repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.token != GRANTED):
            raise Refusal(404 if self.token else 401, "RepoNotFound", "Repository not found")
        return repo

    def _commit(self, repo: Repo, revision: str) -> str:
        commit = repo.resolve(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _info(self, name: str, what: str = "revision", revision: str = "main") -> None:
        repo = self._repo(name)
        commit = self._commit(repo, revision)
        if what == "tree":
            files = [
                {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for n, b in repo.commits[commit].items()
            ]
            return self._send(200, json.dumps(files).encode())
        siblings = [{"rfilename": file} for file in sorted(repo.commits[commit])]
        gated = "manual" if repo.gated else False
        info = {
            "id": name,
            "modelId": name,
            "sha": commit,
            "private": repo.private,
            "gated": gated,
            "siblings": siblings,
            "tags": [],
        }
        self._send(200, json.dumps(info).encode())

    def _file(self, name: str, revision: str, file: str) -> None:
        repo = self._repo(name)
        commit = self._commit(repo, revision)
        if repo.gated and self.token != GRANTED:
            raise Refusal(403 if self.token else 401, "GatedRepo", f"Access to model {name} is restricted")
        if file not in repo.commits[commit]:
            raise Refusal(404, "EntryNotFound", "Entry not found", commit)
        data = repo.commits[commit][file]
        if file.endswith(LARGE):
            tag = hashlib.sha256(data).hexdigest()
            there = f"http://localhost:{self.hub._port}/cdn/{name}/{commit}/{file}"
            self._send(
                302,
                b"",
                {
                    "Location": there,
                    "X-Repo-Commit": commit,
                    "X-Linked-ETag": f'"{tag}"',
                    "X-Linked-Size": str(len(data)),
                },
            )
        else:
            self._send_file(f"{name}/{file}", data, {"X-Repo-Commit": commit})

    def _send_file(self, name: str, data: bytes, headers: dict[str, str] | None = None) -> None:
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes", **(headers or {})}
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET":
            self.hub.sent[name] += len(data) - start
        self._send(206 if asked else 200, data[start:], headers)

    # Writing.

    def _write(self, parts: list[str]) -> None:
        hub = self.hub
        if parts[0] == "lfs":
            if hashlib.sha256(self.body).hexdigest() != parts[1]:
                raise Refusal(400, message="the content has another hash than its name")
            hub.large[parts[1]] = self.body
            return self._send(200, b"")
        if parts == ["api", "validate-yaml"]:
            return self._validate(json.loads(self.body)["content"])
        if not self.token:
            raise Refusal(401, message="Invalid username or password.")
        if self.token != GRANTED:
            raise Refusal(403, message="You don't have the rights to create a model under this namespace")
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(self.body))
        if parts[-3:] == ["lfs", "objects", "batch"]:
            objects = json.loads(self.body)["objects"]
            actions = [o | {"actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}} for o in objects]
            return self._send(200, json.dumps({"transfer": "basic", "objects": actions}).encode())
        name, what = "/".join(parts[2:4]), parts[4]
        self._repo(name)
        if what == "preupload":
            paths = [file["path"] for file in json.loads(self.body)["files"]]
            modes = [
                {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}
                for path in paths
            ]
            return self._send(200, json.dumps({"files": modes}).encode())
        if what == "branch":
            return self._branch(hub.repos[name], parts[5])
        return self._push(name, parts[5])

    def _push(self, name: str, revision: str) -> None:
        """A commit on a branch, or on a pull request that starts from it."""
        hub, repo = self.hub, self.hub.repos[name]
        files = dict(repo.commits[self._commit(repo, revision)])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        answer: dict[str, Any] = {"success": True}
        if "create_pr=1" in urlsplit(self.path).query:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{hub.url}/{name}/discussions/{number}"
        commit = hub.commit(name, files, revision)
        answer |= {"commitOid": commit, "commitUrl": f"{hub.url}/{name}/commit/{commit}"}
        self._send(200, json.dumps(answer).encode())

    def _branch(self, repo: Repo, branch: str) -> None:
        if branch in repo.refs:
            raise Refusal(409, message="Reference already exists")
        repo.refs[branch] = repo.refs["main"]
        self._send(200, b"{}")

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        there = name in self.hub.repos
        if not there:
            self.hub.commit(name, {".gitattributes": b""}, private=asked.get("visibility") == "private")
        self._send(409 if there else 200, json.dumps({"url": f"{self.hub.url}/{name}", "name": name}).encode())

    def _validate(self, card: str) -> None:
        front = yaml.safe_load(card.split("---")[1]) if card.startswith("---\n") else None
        if not isinstance(front, dict) or "license" not in front:
            return self._send(
                400,
                json.dumps(
                    {"errors": [{"message": "the card has no front matter with a license"}], "warnings": []}
                ).encode(),
            )
        return self._send(200, b'{"errors": [], "warnings": []}')

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
