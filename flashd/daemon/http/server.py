"""Serves an application on a Unix socket and on the ports that are configured, in a thread of its own."""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
import threading
from contextlib import suppress
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from flashd.daemon.http.connections import READ_BYTES, Connection
from flashd.errors import CannotWrite

log = logging.getLogger(__name__)

LISTEN_FDS_START = 3
"""sd_listen_fds(3): the first descriptor that systemd passes."""

HERE, ANY = "127.0.0.1", "0.0.0.0"

NOT_PASSED = (
    "api.%s: systemd does not listen on %s:%d; systemctl stop flashd, then"
    " systemctl enable --now flashd-%s.socket, which listens on %d"
)
PORTS = {"loopback": 8080, "network": 8088}
"""What deploy/flashd-*.socket listen on."""


class Server:
    """uvicorn on sockets that are bound when this is made, so that a client waits rather than fails while we load.

    systemd's sockets, where it passed any, are all there are: without a network we could bind no port. If a port is
    configured and was not passed, the journal says so.

    Args:
        path: the Unix socket.
        loopback: a port on 127.0.0.1.
        network: a port on every address.

    Raises CannotWrite where a socket cannot be bound.
    """

    def __init__(self, path: Path, loopback: int | None, network: int | None = None) -> None:
        self._path: Path | None = None
        self._sockets = _passed_sockets()
        wanted = (("loopback", HERE, loopback), ("network", ANY, network))
        ports = [(key, address, port) for key, address, port in wanted if port is not None]
        if self._sockets:
            for key, address, port in ports:
                if not any(_is_at(each, address, port) for each in self._sockets):
                    log.warning(NOT_PASSED, key, address, port, key, PORTS[key])
        else:
            self._sockets = [_unix_socket(path)]
            self._path = path
            self._sockets += [_port_socket(address, port) for _, address, port in ports]
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def start(self, application: Starlette) -> None:
        config = uvicorn.Config(
            application, log_config=None, access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=2,
            server_header=False, http=Connection, loop="asyncio", log_level="error",
            h11_max_incomplete_event_size=READ_BYTES,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=(self._sockets,), name="api")
        self._thread.start()

    def stop(self) -> None:
        """Ends what is being served, giving it two seconds."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join()

    def close(self) -> None:
        for each in self._sockets:
            each.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _passed_sockets() -> list[socket.socket]:
    """The sockets of systemd's socket activation."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS", "0"))
    return [socket.socket(fileno=fd) for fd in range(LISTEN_FDS_START, LISTEN_FDS_START + count)]


def _is_at(passed: socket.socket, address: str, port: int) -> bool:
    return passed.family == socket.AF_INET and passed.getsockname() == (address, port)


def _unix_socket(path: Path) -> socket.socket:
    bound = socket.socket(socket.AF_UNIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise CannotWrite(f"{path}: there is something else than a socket; remove it, or name another socket")
            if not _answers(path):
                path.unlink()
        bound.bind(str(path))
        path.chmod(0o660)
        bound.listen()
    except CannotWrite:
        bound.close()
        raise
    except OSError as error:
        bound.close()
        other = "; is another flashd running?" if error.errno == errno.EADDRINUSE else ""
        raise CannotWrite(f"{path}: {error.strerror or error}{other}") from error
    return bound


def _answers(path: Path) -> bool:
    """Whether a program listens on a socket that exists already.

    Another user's program counts, and so does one that is too busy to answer.
    """
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except (BlockingIOError, PermissionError):
            return True
    return True


def _port_socket(address: str, port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((address, port))
        bound.listen()
    except OSError as error:
        bound.close()
        raise CannotWrite(f"{address}:{port}: {error.strerror}") from error
    return bound
