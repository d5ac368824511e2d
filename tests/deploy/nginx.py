"""Runs the real nginx with the shipped deploy/nginx.conf, in which only paths and ports are replaced."""

import os
import signal
import subprocess
from pathlib import Path

import requests
import trustme

from tests.conftest import require_program
from tests.service import ROOT, free_port, wait_until

SHIPPED = ROOT / "deploy" / "nginx.conf"


class Nginx:
    """nginx in front of instances on these ports; `url` is https, and `certificate` verifies it."""

    def __init__(self, folder: Path, ports: list[int], **replacements: str) -> None:
        self._program = require_program("nginx", "nginx-light")
        self._folder = folder
        self._replacements = replacements
        self.port, self.plain_port = free_port(), free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        authority = trustme.CA()
        issued = authority.issue_cert("127.0.0.1")
        issued.private_key_pem.write_to_path(folder / "tls.key")
        for index, blob in enumerate(issued.cert_chain_pems):
            blob.write_to_path(folder / "tls.crt", append=index > 0)
        self.certificate = str(folder / "authority.pem")
        authority.cert_pem.write_to_path(self.certificate)
        self._write(ports)
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_until(self._answers, f"nginx ({self.log()})")

    @property
    def _log_path(self) -> Path:
        return self._folder / "nginx.log"

    def log(self) -> str:
        """nginx's output and error log."""
        error_log = self._folder / "error.log"
        return self._log_path.read_text() + (error_log.read_text() if error_log.exists() else "")

    def access_log(self) -> str:
        """One line per request."""
        return (self._folder / "access.log").read_text()

    def send_to(self, ports: list[int]) -> None:
        """Switch to other instances without losing a request."""
        before = self._workers()
        self._write(ports)
        self.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self._workers() - before, "workers with the new configuration")

    def stop(self) -> None:
        """Finish the requests in flight, then stop."""
        self.process.send_signal(signal.SIGQUIT)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            self.process.wait(60)

    def _workers(self) -> set[int]:
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return set(map(int, children))

    def _write(self, ports: list[int]) -> None:
        servers = "\n        ".join(f"server 127.0.0.1:{port} max_fails=0;" for port in ports)
        places = {
            "server embedding:8001 max_fails=0;": servers,
            "listen 443 ssl": f"listen 127.0.0.1:{self.port} ssl",
            "listen 80;": f"listen 127.0.0.1:{self.plain_port};",
            "/etc/nginx/tls/": f"{self._folder}/",
            "/run/nginx.pid": f"{self._folder}/nginx.pid",
            "/var/log/nginx/": f"{self._folder}/",
            "/etc/nginx/locations/": f"{self._folder}/locations/",
            # Only the system's nginx may write to the package's own temporary folders.
            "http {\n": f"http {{\n    client_body_temp_path {self._folder}/body;\n"
            f"    proxy_temp_path {self._folder}/proxy;\n",
        }
        text = SHIPPED.read_text()
        for old, new in (places | self._replacements).items():
            assert old in text, f"deploy/nginx.conf no longer has {old!r}"
            text = text.replace(old, new)
        (self._folder / "nginx.conf").write_text(text)

    def _command(self) -> list[str]:
        settings = "daemon off;" + ("user root;" if os.geteuid() == 0 else "")
        return [
            self._program,
            "-p",
            str(self._folder),
            "-c",
            str(self._folder / "nginx.conf"),
            "-g",
            settings,
        ]

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log()
        try:
            requests.get(f"http://127.0.0.1:{self.plain_port}/", allow_redirects=False, timeout=60)
        except requests.ConnectionError:
            return False
        return True
