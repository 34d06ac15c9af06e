"""A Hub on this machine: answers the requests of huggingface_hub from a folder, reached through HF_ENDPOINT.

    with LoopbackHub(folder) as hub:      # folder/org/name/... are repositories
        os.environ["HF_ENDPOINT"] = hub.endpoint

Unlike a local folder it shows what a real download asks for and what it leaves out. A commit writes into the folder.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


REPOSITORY = r"(?P<repository>[\w.-]+/[\w.-]+)"


class LoopbackHub:
    """Serves the repositories in a folder, and keeps a list of the requests.

    Args:
        folder: holds one folder per organisation, with one folder per repository.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(self))
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "LoopbackHub":
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def list_files(self, repository: str) -> list[Path]:
        folder = self.folder / repository
        return sorted(file for file in folder.rglob("*") if file.is_file())

    def get_commit(self, repository: str) -> str:
        """A hash that follows from the names and sizes of the files."""
        folder = self.folder / repository
        listing = [f"{file.relative_to(folder)} {file.stat().st_size}" for file in self.list_files(repository)]
        return hashlib.sha1("\n".join([repository, *listing]).encode()).hexdigest()

    def describe(self, repository: str) -> dict:
        folder = self.folder / repository
        siblings = [{"rfilename": file.relative_to(folder).as_posix()} for file in self.list_files(repository)]
        return {
            "id": repository,
            "modelId": repository,
            "sha": self.get_commit(repository),
            "siblings": siblings,
            "private": False,
            "tags": [],
        }

    def list_tree(self, repository: str, path: str) -> list[dict]:
        folder = self.folder / repository
        return [
            {
                "type": "file",
                "path": file.relative_to(folder).as_posix(),
                "size": file.stat().st_size,
                "oid": get_etag(file),
            }
            for file in self.list_files(repository)
            if file.relative_to(folder).as_posix().startswith(path)
        ]

    def commit(self, repository: str, lines: list[dict]) -> None:
        """Write the files of a commit, all of which are sent inline."""
        for line in lines:
            if line["key"] == "file":
                file = self.folder / repository / line["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(line["value"]["content"]))


def get_etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def make_handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    """A request handler class for one hub."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            hub.requests.append(format % args)

        def answer(self, content: object, status: int = 200, **headers: str) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, code: str) -> None:
            self.answer({"error": code}, 404, X_Error_Code=code, X_Error_Message=code)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if match := re.fullmatch(rf"/api/models/{REPOSITORY}(?:/revision/[^/]+)?", path):
                if (hub.folder / match["repository"]).is_dir():
                    self.answer(hub.describe(match["repository"]))
                else:
                    self.refuse("RepoNotFound")
            elif match := re.fullmatch(rf"/api/models/{REPOSITORY}/tree/[^/]+/?(?P<path>.*)", path):
                self.answer(hub.list_tree(match["repository"], match["path"]))
            elif match := re.fullmatch(rf"/{REPOSITORY}/resolve/[^/]+/(?P<path>.+)", path):
                self.send_file(match["repository"], match["path"])
            else:
                self.refuse("EntryNotFound")

        do_HEAD = do_GET

        def send_file(self, repository: str, path: str) -> None:
            file = hub.folder / repository / path
            if not (hub.folder / repository).is_dir():
                self.refuse("RepoNotFound")
            elif not file.is_file():
                self.refuse("EntryNotFound")
            else:
                headers = {"ETag": f'"{get_etag(file)}"', "X_Repo_Commit": hub.get_commit(repository)}
                content = file.read_bytes()
                if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                    first, last = int(match[1]), min(int(match[2]), len(content) - 1)
                    headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
                    self.answer(content[first : last + 1], 206, **headers)
                else:
                    self.answer(content, **headers)

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            if path == "/api/repos/create":
                request = json.loads(body)
                repository = f"{request['organization']}/{request['name']}"
                (hub.folder / repository).mkdir(parents=True, exist_ok=True)
                self.answer({"url": f"{hub.endpoint}/{repository}", "id": repository})
            elif path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif match := re.fullmatch(rf"/api/models/{REPOSITORY}/preupload/[^/]+", path):
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                self.answer({"files": files})
            elif match := re.fullmatch(rf"/api/models/{REPOSITORY}/commit/[^/]+", path):
                hub.commit(match["repository"], [json.loads(line) for line in body.splitlines() if line])
                commit = hub.get_commit(match["repository"])
                url = f"{hub.endpoint}/{match['repository']}/commit/{commit}"
                self.answer({"commitOid": commit, "commitUrl": url, "hookOutput": ""})
            elif match := re.fullmatch(rf"/api/models/{REPOSITORY}/paths-info/[^/]+", path):
                paths = json.loads(body)["paths"]
                self.answer([entry for entry in hub.list_tree(match["repository"], "") if entry["path"] in paths])
            else:
                self.refuse("EntryNotFound")

    return Handler
