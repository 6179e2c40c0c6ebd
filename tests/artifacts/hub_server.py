"""A stand-in for the Hugging Face hub on this machine: takes what `create_repo` and `upload_folder` send."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@dataclass
class Hub:
    """What was sent.

    Args:
        address: Of the server.
        created: Bodies of requests for a repository.
        files: Path -> content of what was committed.
        tokens: Every Authorization header.
        refuse: Status to answer the making of a repository with; 0 makes it.
    """

    address: str = ""
    created: list[dict] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    refuse: int = 0


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hub.tokens.add(self.headers["Authorization"])
            if self.path == "/api/repos/create":
                hub.created.append(json.loads(body))
                if hub.refuse:
                    self.answer(hub.refuse, {"error": "You may not write here"})
                    return
                sent = hub.created[-1]
                self.answer(200, {"url": f"{hub.address}/{sent['organization']}/{sent['name']}"})
            elif self.path == "/api/validate-yaml":
                self.answer(200, {"errors": [], "warnings": []})
            elif self.path.endswith("/preupload/main"):
                named = [file["path"] for file in json.loads(body)["files"]]
                modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in named]
                self.answer(200, {"files": modes})
            elif self.path.endswith("/commit/main"):
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self.answer(200, {"commitOid": "0" * 40, "commitUrl": f"{hub.address}/o/n/commit/0"})
            else:
                self.answer(404, {"error": self.path})

        def answer(self, status, content):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
