"""A small hub on 127.0.0.1: what the real client asks of one to make a repository and commit files to it."""

import base64
import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import yaml

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz0123456789"
LICENSES = {"apache-2.0", "mit", "llama3.2", "other"}
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class Repository:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict] = field(default_factory=list)


@dataclass
class Fault:
    """What the next `times` requests whose "METHOD path" matches meet: a status, or "drop" (the line goes dead while
    the body is read) or "drop_after" (the work is done and the answer lost)."""

    request: str
    kind: int | str
    times: int = 1
    message: str = ""
    headers: dict[str, str] = field(default_factory=dict)


class FakeHub:
    def __init__(self):
        hub = self

        class Handler(_Handler):
            def setup(self):
                super().setup()
                self.hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.reset()

    def reset(self):
        self.lock = threading.RLock()
        self.repositories: dict[str, Repository] = {}
        self.models = {"org/base": {"license": "apache-2.0"}}
        self.writable = {"me", "team"}
        self.role = "write"
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.bodies: list[bytes] = []

    def fail(self, request: str, kind: int | str, times: int = 1, message: str = "", **headers):
        self.faults.append(Fault(request, kind, times, message, headers))

    def count(self, request: str) -> int:
        return sum(bool(re.search(request, line)) for line in self.requests)

    def close(self):
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._serve()

    do_POST = do_PUT = do_GET

    def _serve(self):
        hub, path = self.hub, urlsplit(self.path).path
        line = f"{self.command} {path}"
        with hub.lock:
            hub.requests.append(line)
            fault = next((f for f in hub.faults if f.times > 0 and re.search(f.request, line)), None)
            if fault:
                fault.times -= 1
        if fault and fault.kind == "drop":
            self.rfile.read(min(16, int(self.headers.get("Content-Length") or 16)))
            return self._hang_up()
        body = self._body()
        with hub.lock:
            hub.bodies.append(body)
            if fault and fault.kind != "drop_after":
                return self._answer(fault.kind, {"error": fault.message} if fault.message else None, **fault.headers)
            authorised = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if not authorised and not path.startswith("/large/"):
                return self._error(401, "Invalid credentials in Authorization header")
            answer = self._route(path, body)
        if fault:
            return self._hang_up()
        self._answer(*answer)

    def _route(self, path, body):
        hub = self.hub
        for method, pattern, handle in (
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate),
            ("GET", r"/api/models/(.+)/auth-check/write", self._check_write),
            ("POST", r"/api/models/(.+)/preupload/main", self._preupload),
            ("POST", r"/api/models/(.+)/commit/main", self._commit),
            ("GET", r"/api/models/(.+)/revision/main", self._head),
            ("GET", r"/api/models/(.+)", self._info),
            ("POST", r"/(.+)\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/large/(\w+)", self._store),
            ("POST", r"/large-verify", self._verify),
        ):
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                names = match.groups()
                if "preupload" in pattern or "commit" in pattern or "batch" in pattern:
                    if names[0] not in hub.repositories:
                        return 404, {"error": "Repository not found"}, "RepoNotFound"
                    if not self._may_write(names[0]):
                        return 403, {"error": "You don't have write access"}
                return handle(*names, body)
        return 404, {"error": f"no such place: {path}"}

    def _may_write(self, repo_id):
        return repo_id.split("/")[0] in self.hub.writable

    def _whoami(self, body):
        return 200, {"name": "me", "type": "user", "auth": {"accessToken": {"role": self.hub.role}}}

    def _create(self, body):
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not self._may_write(repo_id):
            owner = repo_id.split("/")[0]
            return 403, {"error": f'You don\'t have the rights to create a model under the namespace "{owner}"'}
        url = f"{self.hub.endpoint}/{repo_id}"
        if repo_id in self.hub.repositories:
            return 409, {"error": "You already created this model repo", "url": url}
        self.hub.repositories[repo_id] = Repository(private=asked.get("visibility") == "private")
        return 200, {"url": url, "name": repo_id}

    def _validate(self, body):
        content = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        metadata = yaml.safe_load(match[1]) if match else {}
        errors = []

        def check(good, text):
            if not good:
                errors.append({"message": text})

        for name in ("base_model", "datasets"):
            values = metadata.get(name, [])
            for value in values if isinstance(values, list) else [values]:
                check(
                    isinstance(value, str) and _ID.fullmatch(value),
                    f'"{name}" with value "{value}" is not valid. Use an id from the hub.',
                )
        check(metadata.get("license", "mit") in LICENSES, f'"license" must be one of {sorted(LICENSES)}')
        check(metadata.get("license") != "other" or metadata.get("license_name"), '"license_name" is required')
        tags = metadata.get("tags", [])
        check(isinstance(tags, list) and all(isinstance(tag, str) for tag in tags), '"tags" must be strings')
        for name in ("library_name", "pipeline_tag"):
            check(isinstance(metadata.get(name, ""), str), f'"{name}" must be a string')
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return (400 if errors else 200), {"errors": errors, "warnings": warnings}

    def _check_write(self, repo_id, body):
        if repo_id not in self.hub.repositories:
            return 404, {"error": "Repository not found"}, "RepoNotFound"
        return (200, {}) if self._may_write(repo_id) else (403, {"error": "You don't have write access"})

    def _info(self, repo_id, body):
        if repo_id in self.hub.repositories:
            repository = self.hub.repositories[repo_id]
            siblings = [{"rfilename": name} for name in sorted(repository.files)]
            return 200, {"id": repo_id, "private": repository.private, "siblings": siblings}
        if repo_id in self.hub.models:
            return 200, {"id": repo_id, "private": False, "cardData": self.hub.models[repo_id]}
        return 404, {"error": "Repository not found"}, "RepoNotFound"

    def _head(self, repo_id, body):
        commits = self.hub.repositories[repo_id].commits
        return 200, {"id": repo_id, "sha": f"{len(commits):040x}"}

    def _preupload(self, repo_id, body):
        known = self.hub.repositories[repo_id].files
        answers = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            large = path.endswith(".safetensors")
            entry = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if path in known:
                content = known[path]
                entry["oid"] = (
                    hashlib.sha256(content).hexdigest()
                    if large
                    else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                )
            answers.append(entry)
        return 200, {"files": answers}

    def _batch(self, repo_id, body):
        objects = []
        for wanted in json.loads(body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.large:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.endpoint}/large/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.endpoint}/large-verify"},
                }
            objects.append(answer)
        return 200, {"transfer": "basic", "objects": objects}

    def _store(self, oid, body):
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "the content is not that of the oid"}
        self.hub.large[oid] = body
        return 200, {}

    def _verify(self, body):
        wanted = json.loads(body)
        right = len(self.hub.large.get(wanted["oid"], b"")) == wanted["size"]
        return (200, {}) if right else (404, {"error": "not stored"})

    def _commit(self, repo_id, body):
        repository = self.hub.repositories[repo_id]
        header, *operations = [json.loads(line) for line in body.splitlines()]
        files = {}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile" and value["oid"] in self.hub.large:
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                return 400, {"error": f"cannot commit {operation['key']} {value.get('path')}"}
        repository.files |= files
        repository.commits.append({"message": header["value"]["summary"], "files": sorted(files)})
        oid = f"{len(repository.commits):040x}"
        url = f"{self.hub.endpoint}/{repo_id}/commit/{oid}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": url}

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _error(self, status, message):
        self._answer(status, {"error": message}, **{"X-Error-Message": message})

    def _answer(self, status, content=None, code=None, **headers):
        payload = b"<html>trouble</html>" if content is None else json.dumps(content).encode()
        kind = "text/html" if content is None else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(payload), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(payload)

    def _hang_up(self):
        """Close the line as a broken network does: with a reset, not a farewell."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RDWR)
