"""A server that answers like the hub, as far as an upload needs it: what was sent is what the real client sent."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """endpoint: its address. repos: by kind and id, how it was made. files: what a repository holds. refuse: answer 403."""

    endpoint: str = ""
    repos: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    refuse: bool = False


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub on this machine; it has the whole of one repository's files."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, value: Any, code: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            if "/tree/" in self.path:
                entries = [
                    {"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in hub.files.items()
                ]
                return self.answer(entries)
            siblings = [{"rfilename": name} for name in hub.files]
            return self.answer({"id": "me/mine", "sha": "0" * 40, "siblings": siblings})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if hub.refuse:
                return self.answer({"error": "you may not write here"}, 403)
            if self.path.startswith("/api/repos/create"):
                made = json.loads(body)
                name = f"{made['organization']}/{made['name']}" if made.get("organization") else made["name"]
                hub.repos[made.get("type", "model"), name] = made
                return self.answer({"url": f"{hub.endpoint}/{name}", "id": name, "name": name})
            if self.path.startswith("/api/validate-yaml"):
                return self.answer({"errors": [], "warnings": []})
            if re.search(r"/preupload/", self.path):
                named = json.loads(body)["files"]
                wanted = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in named]
                return self.answer({"files": wanted})
            if re.search(r"/commit/", self.path):
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                    elif entry["key"] == "deletedFile":
                        del hub.files[entry["value"]["path"]]
                url = f"{hub.endpoint}/me/mine/commit/{'0' * 40}"
                return self.answer({"success": True, "commitUrl": url, "commitOid": "0" * 40, "hookOutput": ""})
            return self.answer({"error": f"unknown {self.path}"}, 404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
