"""A Hugging Face Hub on this machine, for tests: repositories, LFS, commits, tags, tokens, and faults on demand.

Blobs are kept by sha256, commits are lists of files, refs are names of commits. It knows what huggingface_hub asks of a
model repository, from 0.24 on, and no more.
"""

import base64
import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"


class HubServer:
    """The server and its state; use it as a context manager.

    `faults` maps a regular expression over "METHOD path" to what befalls the next requests that match, one of the list
    at a time: a status (503), "drop" (the connection ends in the middle of the body, or before an answer to what is
    sent), "cut" (a shorter body that says its length), "wrong" (as many bytes, one of them another), or None.
    """

    def __init__(self):
        self.repos: dict[str, dict] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: dict[str, list] = {}
        self.log: list[str] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def requests(self, pattern: str = "poolskip|acme|lfs|repos") -> list[str]:
        """ "METHOD path" of the requests so far that match; the client also asks for news of itself."""
        return [line for line in self.log if re.search(pattern, line)]

    def put(self, repo: str, files: dict[str, bytes], tag: str | None = None) -> str:
        """Commit files to a repository, made if missing; return the commit."""
        state = self.repos.setdefault(repo, {"commits": {}, "main": None, "tags": {}, "private": False})
        entries = dict(state["commits"].get(state["main"], {}))
        for name, content in files.items():
            digest = hashlib.sha256(content).hexdigest()
            self.blobs[digest] = content
            entries[name] = digest
        return self.commit(repo, entries, tag)

    def commit(self, repo: str, entries: dict[str, str], tag: str | None = None) -> str:
        state = self.repos[repo]
        # A commit's name depends on what was before, as git's does.
        oid = hashlib.sha1(json.dumps([state["main"], entries], sort_keys=True).encode()).hexdigest()
        state["commits"][oid] = entries
        state["main"] = oid
        if tag:
            state["tags"][tag] = oid
        return oid


def set_client(monkeypatch, **settings) -> None:
    """Change settings of the client, which it reads from the environment when it is imported.

    Its older versions have copies of them in several modules.
    """
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "huggingface_hub":
            for key, value in settings.items():
                if key in vars(module):
                    monkeypatch.setattr(module, key, value)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.hub.lock:
            self.hub.log.append(f"{self.command} {path}")
            self.fault = next(
                (
                    left.pop(0)
                    for pattern, left in self.hub.faults.items()
                    if left and re.search(pattern, f"{self.command} {path}")
                ),
                None,
            )
            if self.fault == "drop" and self.command in ("POST", "PUT"):
                self.close_connection = True
                return None
            if isinstance(self.fault, int):
                return self.reply(self.fault, {"error": "a fault of the test"})
            for method, pattern, name in _ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method:
                    return getattr(self, name)(body, *found.groups())
        return self.reply(404, {"error": f"no route for {self.command} {path}"})

    def reply(self, status, content=b"", headers=None):
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})}
        if self.fault == "cut":
            content = content[:-10]
        if self.fault == "wrong":
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        if self.fault == "drop":
            self.send_header("Connection", "close")
            content, self.close_connection = content[: len(content) // 2], True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, kind, status=404):
        return self.reply(status, {"error": kind}, {"X-Error-Code": kind})

    def allowed(self, write=True):
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.reply(401, {"error": "Invalid credentials in Authorization header" if write else "RepoNotFound"})
        return False

    def repo(self, name):
        state = self.hub.repos.get(name)
        if state is None or (state["private"] and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self.missing("RepoNotFound", 401 if state is None else 404)
            return None
        return state

    def resolve(self, name, revision):
        state = self.repo(name)
        if state is None:
            return None, None
        oid = {"main": state["main"], **state["tags"]}.get(revision, revision)
        if oid not in state["commits"]:
            self.missing("RevisionNotFound")
            return None, None
        return oid, state["commits"][oid]

    # --- reading

    def get_file(self, _, name, revision, file):
        oid, entries = self.resolve(name, revision)
        if entries is None:
            return None
        if file not in entries:
            return self.reply(404, {"error": "EntryNotFound"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
        digest = entries[file]
        content = self.hub.blobs[digest]
        etag = digest if file.endswith(".safetensors") else git_oid(content)
        headers = {"X-Repo-Commit": oid, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start and int(start[1]):
            return self.reply(206, content[int(start[1]) :], headers)
        return self.reply(200, content, headers)

    def model_info(self, _, name, revision="main"):
        oid, entries = self.resolve(name, revision or "main")
        if entries is None:
            return None
        return self.reply(
            200, {"id": name, "modelId": name, "sha": oid, "siblings": [{"rfilename": f} for f in entries], "tags": []}
        )

    def tree(self, _, name, revision):
        _, entries = self.resolve(name, revision)
        if entries is None:
            return None
        rows = []
        for file, digest in entries.items():
            content = self.hub.blobs[digest]
            row = {"type": "file", "path": file, "size": len(content), "oid": git_oid(content)}
            if file.endswith(".safetensors"):
                row["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
            rows.append(row)
        return self.reply(200, rows)

    def refs(self, _, name):
        state = self.repo(name)
        if state is None:
            return None
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": state["main"]}
        tags = [{"name": t, "ref": f"refs/tags/{t}", "targetCommit": oid} for t, oid in state["tags"].items()]
        return self.reply(200, {"branches": [branch], "tags": tags, "converts": []})

    # --- writing

    def create(self, body):
        if not self.allowed():
            return None
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        url = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repos:
            return self.reply(409, {"error": "You already created this model repo", **url})
        self.hub.put(name, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self.hub.repos[name]["private"] = asked.get("visibility") == "private" or bool(asked.get("private"))
        return self.reply(200, url)

    def validate_yaml(self, body):
        return self.reply(200, {"errors": [], "warnings": []})

    def preupload(self, body, name, revision):
        _, entries = self.resolve(name, revision) if self.allowed() else (None, None)
        if entries is None:
            return None
        rows = []
        for file in json.loads(body)["files"]:
            lfs = file["path"].endswith(".safetensors")
            digest = entries.get(file["path"])
            oid = None if digest is None else digest if lfs else git_oid(self.hub.blobs[digest])
            row = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}
            rows.append(row)
        return self.reply(200, {"files": rows})

    def lfs_batch(self, body, name):
        if not self.allowed():
            return None
        objects = []
        for one in json.loads(body)["objects"]:
            done = one["oid"] in self.hub.blobs
            href = f"{self.hub.url}/lfs/{one['oid']}"
            objects.append({**one, **({} if done else {"actions": {"upload": {"href": href}}})})
        return self.reply(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body, digest):
        if hashlib.sha256(body).hexdigest() != digest:
            return self.reply(400, {"error": "other bytes than announced"})
        self.hub.blobs[digest] = body
        return self.reply(200)

    def make_commit(self, body, name, revision):
        _, entries = self.resolve(name, revision) if self.allowed() else (None, None)
        if entries is None:
            return None
        entries = dict(entries)
        for line in body.splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "file":
                content = base64.b64decode(value["content"])
                entries[value["path"]] = hashlib.sha256(content).hexdigest()
                self.hub.blobs[entries[value["path"]]] = content
            elif row["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return self.reply(400, {"error": f"{value['path']} was not uploaded"})
                entries[value["path"]] = value["oid"]
        oid = self.hub.commit(name, entries)
        url = f"{self.hub.url}/{name}/commit/{oid}"
        return self.reply(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def make_tag(self, body, name, revision):
        oid, entries = self.resolve(name, revision) if self.allowed() else (None, None)
        if entries is None:
            return None
        tags, tag = self.hub.repos[name]["tags"], json.loads(body)["tag"]
        if tag in tags:
            return self.reply(409, {"error": "Tag reference exists already"})
        tags[tag] = oid
        return self.reply(200)


_REPO = r"([^/]+/[^/]+)"
_ROUTES = [
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("POST", f"/api/models/{_REPO}/preupload/([^/]+)", "preupload"),
    ("POST", f"/api/models/{_REPO}/commit/([^/]+)", "make_commit"),
    ("POST", f"/api/models/{_REPO}/tag/([^/]+)", "make_tag"),
    ("POST", f"/{_REPO}.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", "/lfs/([0-9a-f]+)", "lfs_put"),
    ("GET", f"/api/models/{_REPO}/refs", "refs"),
    ("GET", f"/api/models/{_REPO}/tree/([^/]+)", "tree"),
    ("GET", f"/api/models/{_REPO}(?:/revision/([^/]+))?", "model_info"),
    ("GET HEAD", f"/{_REPO}/resolve/([^/]+)/(.+)", "get_file"),
]
