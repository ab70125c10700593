"""A Hugging Face hub on this machine: enough of its protocol for huggingface_hub to look up, download and upload."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class TinyHub:
    """`publish` makes a commit; `asked` are the requests so far."""

    def __init__(self):
        self.commits = {}  # repository -> [(commit, {name: bytes})], the newest last
        self.asked = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

            def do_POST(self):
                hub.take(self)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def publish(self, repository, contents, commit=None):
        """A commit of {name: bytes}, or of a folder; returns its hash."""
        if not isinstance(contents, dict):
            files = (path for path in contents.rglob("*") if path.is_file())
            contents = {str(path.relative_to(contents)): path.read_bytes() for path in files}
        before = self.commits.setdefault(repository, [])
        commit = commit or hashlib.sha1(f"{repository} {len(before)}".encode()).hexdigest()
        before.append((commit, contents))
        return commit

    def find(self, repository, revision):
        for commit, contents in reversed(self.commits.get(repository, [])):
            if revision in ("main", commit):
                return commit, contents
        return None

    def answer(self, request):
        path = unquote(urlsplit(request.path).path).strip("/")
        self.asked.append(path)
        if path.startswith("api/models/"):
            owner, name, *rest = path.removeprefix("api/models/").split("/")
            found = self.find(f"{owner}/{name}", rest[1] if len(rest) > 1 else "main")
            if found is None:
                return self.send(request, 404, error="RepoNotFound")
            commit, contents = found
            if rest[:1] == ["tree"]:
                body = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in contents.items()
                ]
            else:
                body = {
                    "id": f"{owner}/{name}",
                    "sha": commit,
                    "siblings": [{"rfilename": name} for name in contents],
                }
            return self.send(request, 200, json.dumps(body).encode())
        if path.count("/") < 4:
            return self.send(request, 404)
        owner, name, _, revision, *parts = path.split("/")
        found = self.find(f"{owner}/{name}", revision)
        if found is None or "/".join(parts) not in found[1]:
            return self.send(request, 404, error="EntryNotFound")
        data = found[1]["/".join(parts)]
        etag = hashlib.sha1(data).hexdigest()
        return self.send(request, 200, data, **{"ETag": f'"{etag}"', "X-Repo-Commit": found[0]})

    def take(self, request):
        """Make a repository, tell how files are to be sent (all within the commit), take a commit."""
        path = unquote(urlsplit(request.path).path).strip("/")
        self.asked.append(path)
        body = request.rfile.read(int(request.headers["Content-Length"]))
        if path == "api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            if name in self.commits:
                return self.send(request, 409, json.dumps({"url": f"{self.url}/{name}"}).encode())
            self.publish(name, {})
            return self.send(request, 200, json.dumps({"url": f"{self.url}/{name}"}).encode())
        if path == "api/validate-yaml":
            return self.send(request, 200, b'{"errors": [], "warnings": []}')
        owner, name, task = path.removeprefix("api/models/").split("/")[:3]
        if task == "preupload":
            files = [
                {**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
            ]
            return self.send(request, 200, json.dumps({"files": files}).encode())
        lines = [json.loads(line) for line in body.splitlines()]
        files = [line["value"] for line in lines if line["key"] == "file"]
        contents = dict(self.commits[f"{owner}/{name}"][-1][1])
        contents |= {file["path"]: base64.b64decode(file["content"]) for file in files}
        commit = self.publish(f"{owner}/{name}", contents)
        answer = {
            "commitOid": commit,
            "commitUrl": f"{self.url}/{owner}/{name}/commit/{commit}",
            "success": True,
        }
        return self.send(request, 200, json.dumps(answer).encode())

    @staticmethod
    def send(request, status, body=b"", error=None, **headers):
        request.send_response(status)
        headers |= {"Content-Length": str(len(body)), "Content-Type": "application/json"}
        if error is not None:
            headers |= {"X-Error-Code": error, "X-Error-Message": error}
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)
