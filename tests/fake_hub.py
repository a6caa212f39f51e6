"""A small Hugging Face hub on 127.0.0.1: what huggingface_hub asks of the real one, in memory.

    with FakeHub() as hub:
        hub.add("models", "org/tiny", {"config.json": b"..."})
        hub.add("datasets", "org/words", {"data/a.parquet": b"..."})

Files are served whole and by ranges. Commits are taken as the hub takes them: modes of upload, the
large files through the batch interface of git-lfs, then one list of what is added and deleted.
"""

import base64
import collections
import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from refine_jax.base import remote

LARGE = (".safetensors", ".parquet", ".bin", ".model")  # what is uploaded by git-lfs
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/([^/]+)(?:/(.*))?)?)?")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_BATCH = re.compile(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch")


class FakeHub:
    """A server with repositories.

    Attributes:
        endpoint: its address, for HF_ENDPOINT.
        commits: {(kind, name): {commit: {path: content}}}.
        heads: {(kind, name): {branch or tag: commit}}.
        asked: "METHOD path" of every request, in order; of those with the token, `tokens` counts.
        sent: bytes of files that were sent, by path.
        status: answers every request with this error, unless it is None.
        every: one request of so many is answered with 503; 0: none. faults: how many were.
        gated: names that only `token` may read.
        token: what may write.
    """

    def __init__(self):
        self.commits, self.heads, self.objects = {}, {}, {}
        self.asked, self.sent, self.tokens = [], collections.Counter(), collections.Counter()
        self.status, self.gated, self.token = None, set(), "hf_the_token_that_may_write"
        self.every, self.faults = 0, 0
        self.private = {}
        hub = self

        class Handler(_Handler):
            """Answers for this hub."""

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def add(self, kind, name, files, branch="main"):
        """Make a commit with these files, {path: content}, and no others; returns its hash."""
        content = repr((kind, name, sorted(files.items()), len(self.commits.get((kind, name), {}))))
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.commits.setdefault((kind, name), {})[commit] = dict(files)
        self.heads.setdefault((kind, name), {})[branch] = commit
        return commit

    def add_folder(self, kind, name, folder):
        """Make a commit of a folder's files."""
        folder = Path(folder)
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
        return self.add(kind, name, files)

    def files(self, kind, name, revision="main"):
        """The files of a revision, {path: content}."""
        key = (kind, name)
        return self.commits[key][self.heads[key].get(revision, revision)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_):
        pass

    def _answer(self, status, body=b"", headers=()):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), **dict(headers)}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):  # the client has seen enough
                self.wfile.write(body)

    def _fail(self, status, code):
        said = {"X-Error-Code": code, "X-Error-Message": f"{code} {self._authorization()}"}
        self._answer(status, {"error": said["X-Error-Message"]}, said)

    def _authorization(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _handle(self):
        hub = self.hub
        url = urllib.parse.urlsplit(self.path)
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        path = urllib.parse.unquote(url.path)
        hub.asked.append(f"{self.command} {path}")
        hub.tokens[self._authorization()] += 1
        if hub.every and len(hub.asked) % hub.every == 0:
            hub.faults += 1
            self._fail(503, "TryAgain")
        elif hub.status is not None:
            self._fail(hub.status, "NoReason")
        elif match := _FILE.fullmatch(path):
            kind = "datasets" if match[1] else "models"
            if (found := self._files(kind, match[2], match[3])) is not None:
                self._file(*found, match[4])
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif match := _BATCH.fullmatch(path):
            self._batch(json.loads(body))
        elif path.startswith("/objects/"):
            self.hub.objects[path.removeprefix("/objects/")] = body
            self._answer(200)
        elif match := _API.fullmatch(path):
            kind, name, what, revision, rest = match.groups()
            if self.command == "POST" and not self._may_write():
                return
            if (found := self._files(kind, name, revision or "main")) is not None:
                getattr(self, f"_{(what or 'info').replace('-', '_')}", self._unknown)(
                    (kind, name), *found, revision or "main", rest or "", body
                )
        else:
            self._fail(404, "NotHere")

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _may_write(self):
        if self._authorization() == self.hub.token:
            return True
        self._fail(403 if self._authorization() else 401, "Forbidden")
        return False

    def _files(self, kind, name, revision):
        key = (kind, name)
        if key not in self.hub.heads:
            return self._fail(401, "RepoNotFound")
        if name in self.hub.gated and self._authorization() != self.hub.token:
            return self._fail(403, "GatedRepo")
        commit = self.hub.heads[key].get(revision, revision)
        if commit not in self.hub.commits[key]:
            return self._fail(404, "RevisionNotFound")
        return commit, self.hub.commits[key][commit]

    def _unknown(self, *_):
        self._fail(404, "NotHere")

    def _info(self, key, commit, files, *_):
        siblings = [{"rfilename": path, "size": len(files[path])} for path in sorted(files)]
        fields = {"id": key[1], "sha": commit, "private": False, "siblings": siblings}
        self._answer(200, fields | {"tags": [], "downloads": 0, "likes": 0})

    _revision = _info

    def _tree(self, key, commit, files, revision, rest, _body):
        prefix = f"{rest}/" if rest else ""
        inside = {path: files[path] for path in sorted(files) if path.startswith(prefix)}
        if rest and not inside:
            return self._fail(404, "EntryNotFound")
        entries, folders = [], set()
        recursive = "recursive=true" in self.path.lower()
        for path in inside:
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)):
                folders.add(prefix + "/".join(parts[:depth]))
            if recursive or len(parts) == 1:
                entries.append(_entry(path, files[path]))
        shown = [f for f in folders if recursive or "/" not in f.removeprefix(prefix)]
        entries += [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in shown]
        self._answer(200, entries)

    def _paths_info(self, key, commit, files, revision, rest, body):
        asked = urllib.parse.parse_qs(body.decode()).get("paths")
        asked = json.loads(body)["paths"] if asked is None else asked
        self._answer(200, [_entry(path, files[path]) for path in asked if path in files])

    def _preupload(self, key, commit, files, revision, rest, body):
        answers = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": answers})

    def _commit(self, key, commit, files, revision, rest, body):
        files = dict(files)
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.hub.add(*key, files, revision)
        url = f"{self.hub.endpoint}/{key[1]}/commit/{commit}"
        self._answer(200, {"commitUrl": url, "commitOid": commit, "pullRequestUrl": None})

    def _create(self, asked):
        if not self._may_write():
            return
        name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        key = (asked.get("type", "model") + "s", name)
        url = f"{self.hub.endpoint}/{name}"
        if key in self.hub.heads:
            return self._answer(409, {"error": "it exists", "url": url})
        self.hub.private[name] = asked.get("private", asked.get("visibility") == "private")
        self.hub.add(*key, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._answer(200, {"url": url, "id": name, "name": name})

    def _batch(self, asked):
        if not self._may_write():
            return
        objects = []
        for item in asked["objects"]:
            actions = {"upload": {"href": f"{self.hub.endpoint}/objects/{item['oid']}"}}
            known = item["oid"] in self.hub.objects
            objects.append(item if known else item | {"actions": actions})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _file(self, commit, files, path):
        if path not in files:
            return self._fail(404, "EntryNotFound")
        content = files[path]
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
        }
        status, wanted = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            last = min(last, len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            status, content = 206, content[first : last + 1]
        if self.command == "HEAD":
            headers["Content-Length"] = str(len(content))
        else:
            self.hub.sent[path] += len(content)
        self._answer(status, content, headers)


def _entry(path, content):
    digest = hashlib.sha256(content).hexdigest()
    fields = {"type": "file", "path": path, "size": len(content), "oid": digest[:40]}
    if path.endswith(LARGE):
        fields["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
    return fields


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that huggingface_hub talks to in this process, with a cache of its own, no token."""
    from huggingface_hub import HfFileSystem, constants

    def forget_stores():  # they keep the address of their hub
        remote._file_system.cache_clear()
        HfFileSystem.clear_instance_cache()

    with FakeHub() as server:
        values = {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": f"{server.endpoint}/"
            "{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
            "HF_HOME": str(tmp_path / "hub-home"),
            "HF_TOKEN_PATH": str(tmp_path / "hub-home" / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,  # the fake has git-lfs alone
        }
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        forget_stores()
        yield server
    forget_stores()
