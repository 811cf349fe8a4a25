"""A Hub on loopback: enough of the real one's HTTP API for huggingface_hub's own client to create, push and download.

Repositories, branches, pull requests, regular and large files (LFS batch API) live in memory. `faults` makes the next
matching requests fail: with a status, or with a connection that breaks before ("drop") or after ("lose") the work is done.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "x" * 34
LARGE = (".safetensors", "tokenizer.json")
ATTRIBUTES = {".gitattributes": b"*.safetensors filter=lfs\n"}


@dataclass
class Repo:
    """Files by branch. A branch is (commit id, files)."""

    private: bool = False
    branches: dict[str, tuple[str, dict[str, bytes]]] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    pulls: int = 0

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(f"{branch}{len(self.messages)}{sorted(files)}".encode()).hexdigest()
        self.branches[branch] = (oid, files)
        self.commits[oid] = files
        self.messages.append(message)
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision in self.commits:
            return revision, self.commits[revision]
        return self.branches.get(revision)


@dataclass
class Fault:
    """Fails the next `times` requests whose "METHOD path" matches. `what`: a status, "drop" or "lose"."""

    pattern: str
    what: int | str
    times: int = 1


class FakeHub:
    """The state of the server; `url` is its address."""

    def __init__(self, url: str):
        self.url = url
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        self.owners = {"me", "my-org"}
        self.lock = threading.RLock()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return self.repos[repo].branches[revision][1]

    def make(self, repo: str, private: bool = False) -> Repo:
        made = self.repos[repo] = Repo(private)
        made.commit("main", dict(ATTRIBUTES), "initial commit")
        return made

    def fault(self, request: str) -> int | str | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault.what
        return None


class Answer(Exception):  # noqa: N818  (raised to end a request early)
    """A response: status, JSON or bytes, headers."""

    def __init__(self, status: int, body: object = None, **headers: str):
        self.status, self.body, self.headers = status, body, headers


def refuse(status: int, words: str, code: str = "") -> Answer:
    headers = {"X-Error-Message": words, **({"X-Error-Code": code} if code else {})}
    return Answer(status, {"error": words}, **headers)


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        self.handle_one()

    do_GET = do_HEAD = do_PUT = do_POST  # noqa: N815

    def handle_one(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        url = urlsplit(self.path)
        request = f"{self.command} {url.path}"
        with self.hub.lock:
            self.hub.requests.append(request)
            self.hub.bodies.append(body)
        fault = self.hub.fault(request)
        if fault == "drop":
            return self.hang_up()
        if isinstance(fault, int):
            return self.send(refuse(fault, "as the test asked"))
        try:
            with self.hub.lock:
                answer = self.route(unquote(url.path), parse_qs(url.query), body)
        except Answer as raised:
            answer = raised
        if fault == "lose":
            return self.hang_up()
        return self.send(answer)

    def hang_up(self):
        self.close_connection = True
        self.connection.close()

    def send(self, answer: Answer):
        content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # ---- what the Hub knows

    def signed_in(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise refuse(401, "Invalid username or password.")

    def repo(self, name: str, write: bool = False) -> Repo:
        found = self.hub.repos.get(name)
        if write:
            self.signed_in()
            if found and name.partition("/")[0] not in self.hub.owners:
                raise refuse(403, "You don't have the rights to write to this repository")
        if not found or (found.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            raise refuse(404, "Repository not found", "RepoNotFound")
        return found

    def revision(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]]:
        found = repo.at(revision)
        if found is None:
            raise refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def route(self, path: str, query: dict, body: bytes) -> Answer:
        name = r"(?P<repo>[\w.-]+/[\w.-]+)"
        routes = [
            ("GET", "/api/whoami-v2", self.whoami),
            ("POST", "/api/validate-yaml", lambda *_: Answer(200, {"errors": [], "warnings": []})),
            ("POST", "/api/repos/create", self.create),
            ("GET", f"/api/models/{name}(?:/revision/(?P<rev>.+))?", self.info),
            ("POST", f"/api/models/{name}/branch/(?P<rev>.+)", self.branch),
            ("GET", f"/api/models/{name}/tree/(?P<rev>[^/]+)(?P<inner>/.*)?", self.tree),
            ("POST", f"/api/models/{name}/preupload/(?P<rev>.+)", self.preupload),
            ("POST", f"/api/models/{name}/commit/(?P<rev>.+)", self.commit),
            ("POST", f"/{name}.git/info/lfs/objects/batch", self.batch),
            ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", self.store),
            ("GET|HEAD", f"/{name}/resolve/(?P<rev>[^/]+)/(?P<file>.+)", self.resolve),
        ]
        for methods, pattern, handler in routes:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split("|"):
                return handler(match.groupdict(), query, body)
        return refuse(404, f"the fake Hub has no {self.command} {path}")

    def whoami(self, *_) -> Answer:
        self.signed_in()
        return Answer(200, {"type": "user", "name": "me", "orgs": [{"name": "my-org"}], "auth": {"accessToken": {}}})

    def create(self, _, __, body) -> Answer:
        self.signed_in()
        asked = json.loads(body)
        owner = asked.get("organization") or "me"
        if owner not in self.hub.owners:
            raise refuse(403, f"You don't have the rights to create a model under the namespace {owner}")
        name = f"{owner}/{asked['name']}"
        if name in self.hub.repos:
            raise Answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        self.hub.make(name, asked.get("visibility") == "private" or bool(asked.get("private")))
        return Answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def info(self, match, *_) -> Answer:
        repo = self.repo(match["repo"])
        oid, files = self.revision(repo, match["rev"] or "main")
        return Answer(200, {"id": match["repo"], "modelId": match["repo"], "private": repo.private, "sha": oid, "tags": [],
                            "downloads": 0, "likes": 0, "siblings": [{"rfilename": file} for file in files]})  # fmt: skip

    def branch(self, match, *_) -> Answer:
        repo = self.repo(match["repo"], write=True)
        if match["rev"] in repo.branches:
            raise refuse(409, "Reference already exists")
        repo.branches[match["rev"]] = repo.branches["main"]
        return Answer(200, {})

    def tree(self, match, *_) -> Answer:
        _, files = self.revision(self.repo(match["repo"]), match["rev"])
        return Answer(200, [self.entry(file, content) for file, content in sorted(files.items())])

    def entry(self, file: str, content: bytes) -> dict:
        found = {"type": "file", "path": file, "size": len(content), "oid": git_oid(content)}
        if file.endswith(LARGE):
            found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return found

    def preupload(self, match, query, body) -> Answer:
        repo = self.repo(match["repo"], write="create_pr" not in query)
        _, here = self.revision(repo, match["rev"])
        files = []
        for entry in json.loads(body)["files"]:
            file = entry["path"]
            held = here.get(file)
            oid = held and (hashlib.sha256(held).hexdigest() if file.endswith(LARGE) else git_oid(held))
            mode = "lfs" if file.endswith(LARGE) else "regular"
            files.append({"path": file, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Answer(200, {"files": files})

    def batch(self, match, _, body) -> Answer:
        self.signed_in()  # whoever may open a pull request may upload for it
        self.repo(match["repo"])
        objects = []
        for entry in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}", "header": {}}}
            objects.append({**entry, **({} if entry["oid"] in self.hub.large else {"actions": upload})})
        return Answer(200, {"transfer": "basic", "objects": objects})

    def store(self, match, _, body) -> Answer:
        if hashlib.sha256(body).hexdigest() != match["oid"]:
            raise refuse(400, "checksum mismatch")
        self.hub.large[match["oid"]] = body
        return Answer(200, {})

    def commit(self, match, query, body) -> Answer:
        repo = self.repo(match["repo"], write="create_pr" not in query)
        self.signed_in()
        oid, held = self.revision(repo, match["rev"])
        files, message = dict(held), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        branch, pull = match["rev"], None
        if "create_pr" in query:
            repo.pulls += 1
            branch = f"refs/pr/{repo.pulls}"
            pull = f"{self.hub.url}/{match['repo']}/discussions/{repo.pulls}"
        oid = repo.commit(branch, files, message)
        url = f"{self.hub.url}/{match['repo']}/commit/{oid}"
        return Answer(200, {"success": True, "commitUrl": url, "commitOid": oid, "pullRequestUrl": pull})

    def resolve(self, match, *_) -> Answer:
        oid, files = self.revision(self.repo(match["repo"]), match["rev"])
        if match["file"] not in files:
            raise refuse(404, "Entry not found", "EntryNotFound")
        content = files[match["file"]]
        tag = hashlib.sha256(content).hexdigest() if match["file"].endswith(LARGE) else git_oid(content)
        return Answer(200, content, ETag=f'"{tag}"', X_Repo_Commit=oid, Accept_Ranges="bytes")


def git_oid(content: bytes) -> str:
    """The git object id of a file with that content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running():
    """A fake Hub on a free port of loopback, for as long as the context is open."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {}))
    server.daemon_threads = True
    hub = server.RequestHandlerClass.hub = FakeHub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
