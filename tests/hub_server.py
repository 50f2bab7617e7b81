"""A Hub server on loopback for huggingface_hub's read and publish requests, with real revisions and injected faults."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

from tests import xet

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclasses.dataclass
class Repository:
    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Make a commit that holds exactly these files, and give its 40-hex revision."""
        content = json.dumps([self.refs.get(ref), len(self.commits), {name: sha256(files[name]) for name in files}])
        revision = hashlib.sha1(content.encode(), usedforsecurity=False).hexdigest()
        self.commits[revision] = dict(files)
        self.refs[ref] = revision
        return revision

    def resolve(self, revision: str) -> str | None:
        revision = self.refs.get(revision, revision)
        return revision if revision in self.commits else None


@dataclasses.dataclass
class Fault:
    """A fault to inject into a request.

    Attributes:
        method: Method of affected requests: ``HEAD``, ``GET``, ``POST`` or ``PUT``.
        path: Regular expression to search for in the path.
        times: Number of requests to affect; None for all.
        status: Answer with this status instead.
        delay: Seconds to wait before the answer.
        cut: Announce the whole body, but close the connection after this many bytes.
        stall: Seconds to wait before that.
        reset: The same, with a reset instead of an orderly close.
        short: Announce and send this many bytes fewer.
        corrupt: Flip one bit of the byte at this position; the length does not change.
        drop: Close the connection without an answer.
        call: Function to call before the request is processed.
        lose: Process the request, then close the connection without an answer.
        body: With `status`, the body of that answer.
        header: Headers to replace in the answer; None removes one.
    """

    method: str = "GET"
    path: str = ""
    times: int | None = 1
    status: int | None = None
    delay: float = 0.0
    cut: int | None = None
    stall: float = 0.0
    reset: int | None = None
    short: int = 0
    corrupt: int | None = None
    drop: bool = False
    call: Callable[[], object] | None = None
    lose: bool = False
    body: bytes = b"fault"
    header: dict[str, str | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None


class HubServer:
    """Serves repositories on a free loopback port; `requests` logs the requests.

    Large files have another host name and port, like the real Hub's storage provider. Clients treat URLs on other hosts
    differently; in particular, they must not send their token there.

    Attributes:
        part_size: Larger files are uploaded in parts of this many bytes; None for single requests.
        xet: Xet's storage; None for a server without Xet.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.committing = threading.Lock()
        self._servers = [_Server(("127.0.0.1", 0), _Handler) for _ in range(2)]
        ports = [server.server_address[1] for server in self._servers]
        self.endpoint, self.storage = f"http://127.0.0.1:{ports[0]}", f"http://localhost:{ports[1]}"
        for server in self._servers:
            server.hub = self
        self.reset()

    def start(self) -> None:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def reset(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.ranges = True
        self.token: str | None = None
        self.objects: dict[str, bytes] = {}
        self.part_size: int | None = None
        self.parts: dict[tuple[str, int], bytes] = {}
        self.xet: xet.Storage | None = None

    def create(self, repo_id: str, files: dict[str, bytes]) -> str:
        """Add a repository with one commit on main, and give the commit's revision."""
        self.repositories[repo_id] = Repository()
        return self.repositories[repo_id].commit(files)

    def fail(self, **settings: object) -> None:
        """Arm a fault; the settings are those of `Fault`."""
        self.faults.append(Fault(**settings))

    def count(self, method: str, path: str) -> int:
        """Count the requests so far whose path contains a match of this expression."""
        return sum(request.method == method and re.search(path, request.path) is not None for request in self.requests)

    def take_fault(self, request: Request) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.method == request.method and re.search(fault.path, request.path) and fault.times != 0:
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None

    def blob(self, oid: str) -> bytes | None:
        """Return a large file that was uploaded or is in a commit."""
        if oid in self.objects:
            return self.objects[oid]
        for repository in list(self.repositories.values()):
            for files in list(repository.commits.values()):
                for content in files.values():
                    if sha256(content) == oid:
                        return content
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    hub: HubServer

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that disconnect during a response, which some tests do on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise every response takes 40 ms, because headers and body are sent separately
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Do nothing, because `HubServer.requests` is the log."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.hub = self.server.hub
        self.fault = (
            self.hub.take_fault(
                Request(self.command, self.path, self.headers.get("Range"), self.headers.get("Authorization"))
            )
            or Fault()
        )
        time.sleep(self.fault.delay)
        if self.fault.call is not None:
            self.fault.call()
        if self.fault.drop:
            self.close_connection = True
            return
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        if len(self.body) < length:  # the client disconnected
            self.close_connection = True
            return
        if self.fault.status is not None:
            self._send(self.fault.status, {}, self.fault.body)
            return
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        routes: list[tuple[str, Callable[..., None]]] = [
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", self._tree),
            (r"/api/models/([^/]+/[^/]+)/refs", self._refs),
            (r"/api/models/([^/]+/[^/]+)/revision/(.+)", self._info),
            (r"/api/models/([^/]+/[^/]+)", self._info),
            (r"/api/resolve-cache/models/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", self._small),
            (r"/lfs/([0-9a-f]{64})", self._large),
            (r"/api/models/([^/]+/[^/]+)/xet-(read|write)-token/([^/]+)", self._xet_token),
            (r"/cas/v1/reconstructions/([0-9a-f]{64})", self._xet_reconstruction),
            (r"/cas/xorb/([0-9a-f]{64})", self._xet_range),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ]
        if self.command == "PUT":
            routes = [
                (r"/lfs/([0-9a-f]{64})", self._store),
                (r"/parts/([0-9a-f]{64})/([0-9]+)", self._store_part),
            ]
        elif self.command == "POST" and "Signature=" in parts.query:
            routes = [(r"/complete/([0-9a-f]{64})", self._complete)]
        elif self.command == "POST" and path.startswith("/cas/"):
            if self.headers.get("Authorization") != f"Bearer {xet.TOKEN}":
                self._error(401, "", "not the token of the storage")
                return
            routes = [(r"/cas/v1/xorbs/default/([0-9a-f]{64})", self._xet_xorb), (r"/cas/v1/shards", self._xet_shard)]
        elif self.command == "POST":
            if self.hub.token is not None and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
                self._error(401, "", "Invalid username or password.")
                return
            routes = [
                (r"/api/repos/create", self._create),
                (r"/api/validate-yaml", self._validate),
                (r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", self._preupload),
                (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
                (r"/([^/]+/[^/]+)\.git/info/lfs/objects/verify", self._verify),
                (r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self._commit),
            ]
        for pattern, handler in routes:
            match = re.fullmatch(pattern, path)
            if match:
                handler(*match.groups(), **({"query": parse_qs(parts.query)} if handler == self._tree else {}))
                return
        self._error(404, "", "no such page")

    def _files(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the commit and its files, or send an error."""
        repository = self.hub.repositories.get(repo_id)
        if repository is None:
            self._error(404, "RepoNotFound", "Repository not found")
            return None
        if repository.gated and not self.headers.get("Authorization"):
            self._error(403, "GatedRepo", "Access to this model is restricted")
            return None
        commit = repository.resolve(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", "Invalid rev id")
            return None
        return commit, repository.commits[commit]

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        found = self._files(repo_id, revision)
        if found is None:
            return
        commit, files = found
        if path not in files:
            self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return
        content = files[path]
        if not path.endswith(LFS_SUFFIXES):
            self._send(307, {"Location": f"/api/resolve-cache/models/{repo_id}/{commit}/{quote(path)}"}, b"")
            return
        headers = {
            "X-Repo-Commit": commit,
            "X-Linked-Etag": f'"{sha256(content)}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"{self.hub.storage}/lfs/{sha256(content)}?X-Amz-Signature=secret",
        }
        file = None if self.hub.xet is None else self.hub.xet.by_sha256.get(sha256(content))
        if file is not None:
            headers["X-Xet-Hash"] = file
            headers["X-Xet-Refresh-Route"] = f"{self.hub.endpoint}/api/models/{repo_id}/xet-read-token/{commit}"
        self._send(302, headers, b"Found")

    def _small(self, repo_id: str, commit: str, path: str) -> None:
        content = self.hub.repositories[repo_id].commits[commit][path]
        self._send_content(content, {"X-Repo-Commit": commit, "ETag": f'"{git_oid(content)}"'})

    def _large(self, oid: str) -> None:
        content = self.hub.blob(oid)
        if content is None:
            self._error(404, "", "no such object")
            return
        self._send_content(content, {"ETag": f'"{oid}"'})

    def _info(self, repo_id: str, revision: str = "main") -> None:
        found = self._files(repo_id, revision)
        if found is None:
            return
        commit, files = found
        private = self.hub.repositories[repo_id].private
        siblings = [{"rfilename": name, "size": len(files[name]), "blobId": git_oid(files[name])} for name in files]
        self._send_json({"id": repo_id, "sha": commit, "siblings": siblings, "tags": [], "private": private})

    def _refs(self, repo_id: str) -> None:
        found = self._files(repo_id, "main")
        if found is None:
            return
        refs = self.hub.repositories[repo_id].refs
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": refs[name]} for name in refs]
        self._send_json({"branches": branches, "tags": [], "converts": []})

    def _tree(self, repo_id: str, revision: str, folder: str, query: dict[str, list[str]]) -> None:
        """Send the listing with two entries per page, to test paging."""
        found = self._files(repo_id, revision)
        if found is None:
            return
        commit, files = found
        names = sorted(name for name in files if name.startswith(folder))
        start = int(query.get("cursor", ["0"])[0])
        entries = []
        for name in names[start : start + 2]:
            content = files[name]
            entry = {"type": "file", "path": name, "oid": git_oid(content), "size": len(content)}
            if name.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        headers = {}
        if start + 2 < len(names):
            page = f"{self.hub.endpoint}/api/models/{repo_id}/tree/{commit}?recursive=true&cursor={start + 2}"
            headers["Link"] = f'<{page}>; rel="next"'
        self._send_json(entries, headers)

    def _create(self) -> None:
        """Create a repository with an initial commit, as on the real Hub."""
        wanted = json.loads(self.body)
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        known = repo_id in self.hub.repositories
        if not known:
            self.hub.create(repo_id, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
            self.hub.repositories[repo_id].private = wanted.get("visibility") == "private"
        self._send_json({"url": f"{self.hub.endpoint}/{repo_id}"}, status=409 if known else 200)

    def _validate(self) -> None:
        parts = json.loads(self.body)["content"].split("---\n")
        try:
            metadata = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0] else None
        except yaml.YAMLError:
            metadata = None
        valid = isinstance(metadata, dict)
        errors = [] if valid else [{"message": "the metadata is not a YAML mapping"}]
        self._send_json({"errors": errors, "warnings": []}, status=200 if valid else 400)

    def _preupload(self, repo_id: str, revision: str) -> None:
        found = self._files(repo_id, revision)
        if found is None:
            return
        answers = []
        for file in json.loads(self.body)["files"]:
            name, content = file["path"], found[1].get(file["path"])
            large = name.endswith(LFS_SUFFIXES)
            oid = None if content is None else sha256(content) if large else git_oid(content)
            mode = "lfs" if large else "regular"
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send_json({"files": answers})

    def _batch(self, repo_id: str) -> None:
        answers = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if self.hub.blob(wanted["oid"]) is None:
                answer["actions"] = {
                    "upload": self._upload_action(wanted["oid"], wanted["size"]),
                    "verify": {"href": f"{self.hub.endpoint}/{repo_id}.git/info/lfs/objects/verify"},
                }
            answers.append(answer)
        self._send_json({"transfer": "basic", "objects": answers})

    def _upload_action(self, oid: str, size: int) -> dict[str, object]:
        """Return the upload URL of a large file, or one URL per part and one to complete the upload."""
        signature, part_size = "X-Amz-Signature=secret", self.hub.part_size
        if part_size is None or size <= part_size:
            return {"href": f"{self.hub.storage}/lfs/{oid}?{signature}"}
        numbers = range(1, -(-size // part_size) + 1)
        addresses = {str(number): f"{self.hub.storage}/parts/{oid}/{number}?{signature}" for number in numbers}
        header = {"chunk_size": str(part_size), **addresses}
        return {"href": f"{self.hub.endpoint}/complete/{oid}?{signature}", "header": header}

    def _store_part(self, oid: str, number: str) -> None:
        self.hub.parts[oid, int(number)] = self.body
        self._send(200, {"ETag": f'"{git_oid(self.body)}"'}, b"")

    def _complete(self, oid: str) -> None:
        """Assemble a file from its parts, in the order and with the hashes that the client sends."""
        named = [(part["partNumber"], part["etag"]) for part in json.loads(self.body)["parts"]]
        stored = [self.hub.parts.get((oid, number), b"") for number, _ in named]
        content = b"".join(stored)
        if [f'"{git_oid(part)}"' for part in stored] != [etag for _, etag in named] or sha256(content) != oid:
            self._error(400, "", "the parts are not those of the file")
            return
        self.hub.objects[oid] = content
        self._send_json({})

    def _xet_token(self, repo_id: str, kind: str, revision: str) -> None:
        if self.hub.xet is None:
            self._error(404, "", "no Xet here")
        elif self.hub.token is not None and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._error(401, "", "Invalid username or password.")
        else:
            expiry, address = int(time.time()) + 3600, f"{self.hub.storage}/cas"
            headers = {
                "X-Xet-Cas-Url": address,
                "X-Xet-Access-Token": xet.TOKEN,
                "X-Xet-Token-Expiration": str(expiry),
            }
            self._send_json({"accessToken": xet.TOKEN, "exp": expiry, "casUrl": address}, headers)

    def _xet_xorb(self, name: str) -> None:
        assert self.hub.xet is not None
        self.hub.xet.xorbs[name] = self.body
        self._send_json({"was_inserted": True})

    def _xet_shard(self) -> None:
        assert self.hub.xet is not None
        try:
            contents = self.hub.xet.add_shard(self.body)
        except (KeyError, ValueError) as error:
            self._error(400, "", str(error))
            return
        self.hub.objects.update({sha256(content): content for content in contents})
        self._send_json({"result": 1})

    def _xet_reconstruction(self, file: str) -> None:
        assert self.hub.xet is not None
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-")
        if start and int(start[1]) >= len(self.hub.xet.content(file)):
            self._error(416, "", "past the end")
            return
        self._send_json(self.hub.xet.reconstruction(file, f"{self.hub.storage}/cas"))

    def _xet_range(self, name: str) -> None:
        assert self.hub.xet is not None
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        assert match is not None
        start, end = int(match[1]), int(match[2])
        content = self.hub.xet.xorbs[name]
        content_range = f"bytes {start}-{end}/{len(content)}"
        self._send(206, {"Content-Range": content_range}, content[start : end + 1])

    def _store(self, oid: str) -> None:
        if sha256(self.body) != oid:
            self._error(400, "", "the content is not what its name says")
            return
        self.hub.objects[oid] = self.body
        self._send(200, {}, b"")

    def _verify(self, repo_id: str) -> None:
        wanted = json.loads(self.body)
        content = self.hub.blob(wanted["oid"])
        known = content is not None and len(content) == wanted["size"]
        self._send_json({}, status=200 if known else 404)

    def _commit(self, repo_id: str, revision: str) -> None:
        """Commit atomically; reject a commit whose parent is not main's head or whose files were not uploaded."""
        with self.hub.committing:
            found = self._files(repo_id, revision)
            if found is None:
                return
            head, files = found[0], dict(found[1])
            for line in self.body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "header":
                    if value.get("parentCommit") not in (None, head):
                        self._error(412, "", "A commit has happened since. Please refresh and try again.")
                        return
                elif item["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile" and (content := self.hub.blob(value["oid"])) is not None:
                    files[value["path"]] = content
                elif item["key"] == "deletedFile" and value["path"] in files:
                    del files[value["path"]]
                else:
                    self._error(400, "", f"cannot commit {value}")
                    return
            commit = self.hub.repositories[repo_id].commit(files, revision)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{commit}"
        self._send_json({"commitUrl": url, "commitOid": commit, "pullRequestUrl": None})

    def _error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}, b"")

    def _send_json(self, data: object, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self._send(status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(data).encode())

    def _send_content(self, content: bytes, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(match[1]) if match and self.hub.ranges else 0
        if start >= len(content) > 0:
            self._send(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
        elif start:
            content_range = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._send(206, {**headers, "Content-Range": content_range}, content[start:])
        else:
            self._send(200, {**headers, "Accept-Ranges": "bytes"}, content)

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        fault = self.fault
        if fault.lose:
            self.close_connection = True
            return
        if self.command == "GET" and 200 <= status < 300:
            body = body[: len(body) - fault.short]
            if fault.corrupt is not None:
                position = fault.corrupt % len(body)
                body = body[:position] + bytes([body[position] ^ 1]) + body[position + 1 :]
        self.send_response(status)
        merged: dict[str, str | None] = {**headers, "Content-Length": str(len(body)), **fault.header}
        for name, value in merged.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = fault.cut if fault.cut is not None else fault.reset
        if stop is None or status >= 300:
            self.wfile.write(body)
            return
        self.wfile.write(body[:stop])
        self.wfile.flush()
        time.sleep(fault.stall)
        self.close_connection = True
        if fault.reset is not None:
            time.sleep(0.05)
            # Closing with unsent data and no linger makes the kernel send a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
