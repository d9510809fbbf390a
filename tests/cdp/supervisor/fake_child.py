"""A process that speaks the RPC of a recorder, curator or viewer and does nothing else.

Only the standard library, so that it is up in a few hundredths of a second. What it shall do is in
the directory of its disk, so that a successor does the same:

    ROLE.behaviour   {"state", "reason", "refuse": {method: [kind, message]}, "die_on": method,
                      "hang_on": method, "answers": {method: result}}, read at every call
    calls.log        one line per call, of all roles: what a test looks at
    pins.json, open_rollback.json   what a real one keeps in its journal
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

SYNC = {"durable": 100, "stamp": 1 << 62}
EXPORT = {"size": 1 << 20, "flags": 0x1 | 0x4 | 0x100, "meta_contexts": ["base:allocation"]}


class Dies(Exception):
    """This process ends without an answer."""


class Refused(Exception):
    """The call is answered with an error: kind and message."""


class Fake:
    def __init__(self, role: str, directory: Path, fd: int) -> None:
        self.role, self.directory, self.fd = role, directory, fd
        self.uuid = json.loads((directory / "disk.json").read_text())["uuid"]
        self.views: dict[str, dict[str, Any]] = {}
        self.attached: list[socket.socket] = []
        self.stopping = False

    # ------------------------------------------------------------------------------------- files

    def behaviour(self) -> dict[str, Any]:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return dict(json.loads((self.directory / f"{self.role}.behaviour").read_text()))
        return {}

    def load(self, name: str) -> Any:
        try:
            return json.loads((self.directory / name).read_text())
        except FileNotFoundError:
            return None

    def save(self, name: str, value: Any) -> None:
        # In one step: a test may look at any time.
        temporary = self.directory / f"{name}.{os.getpid()}"
        temporary.write_text(json.dumps(value))
        temporary.rename(self.directory / name)

    def log(self, method: str, params: dict[str, Any], fds: int) -> None:
        entry = {
            "role": self.role,
            "pid": os.getpid(),
            "method": method,
            "params": params,
            "fds": fds,
        }
        with open(self.directory / "calls.log", "a") as file:
            file.write(json.dumps(entry) + "\n")

    # ------------------------------------------------------------------------------------- calls

    def answer(self, method: str, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        behaviour = self.behaviour()
        if method not in ("hello", "status"):
            self.log(method, params, len(fds))
        if behaviour.get("die_on") == method:
            raise Dies
        if behaviour.get("hang_on") == method:
            signal.pause()
        if method in behaviour.get("refuse", {}):
            raise Refused(*behaviour["refuse"][method])
        if method in behaviour.get("answers", {}):
            return dict(behaviour["answers"][method])
        known = getattr(self, f"on_{method}", None)
        return known(params, fds) if known is not None else {}

    def on_hello(self, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        behaviour = self.behaviour()
        hello = {
            "role": self.role,
            "pid": os.getpid(),
            "uuid": behaviour.get("uuid", self.uuid),
            "protocol": 1,
            "state": behaviour.get("state", "ready"),
            "reason": behaviour.get("reason"),
        }
        if self.role == "recorder":
            hello["open_rollback"] = self.load("open_rollback.json")
        return hello

    def on_stop(self, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        self.stopping = True
        return {}

    def on_sync(self, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        return SYNC

    def on_export(self, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        return {**EXPORT, "served": True}

    def on_attach(self, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        client = socket.socket(fileno=fds.pop(0))
        with contextlib.suppress(OSError):
            client.sendall(f"{self.role} has it\n".encode())
        self.attached.append(client)
        if "view" in params:
            self.views[params["view"]]["connections"] += 1
        return {}

    def on_status(self, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        if self.role == "recorder":
            return {"served": True, "connections": len(self.attached), "durable": 100}
        return {"connections": len(self.attached)} if self.role == "viewer" else {"applied": 100}

    def on_resolve(self, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        spec = str(params.get("spec", ""))
        if spec.startswith("bookmark:") and spec != "bookmark:good":
            raise Refused("not_found", f"no {spec}")
        seq = int(spec[4:]) if spec.startswith("seq:") else 42
        return {"seq": seq, "stamp": 1000 + seq, "wall_ns": 10**18 + seq, "size": 1 << 20}

    def on_pin(self, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        self.save("pins.json", {**(self.load("pins.json") or {}), params["id"]: params})
        return {}

    def on_unpin(self, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        pins = self.load("pins.json") or {}
        pins.pop(params["id"], None)
        self.save("pins.json", pins)
        return {}

    def on_pins(self, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        return {"pins": list((self.load("pins.json") or {}).values())}

    def on_bookmarks(self, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        return {"bookmarks": [{"label": "good", "seq": 7}]}

    def on_bookmark(self, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        return {"seq": 101, "stamp": 5000}

    def on_drain(self, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        return {"applied": 100}

    def on_open(self, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        self.views[params["id"]] = {**params, "connections": 0, "overlay_bytes": 0}
        return {}

    def on_close(self, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        if self.views.pop(params["id"], None) is None:
            raise Refused("not_found", "no such view")
        return {}

    def on_list(self, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        return {"views": list(self.views.values())}

    def on_plan_rollback(self, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        fds.append(os.memfd_create("plan"))
        return {"extents": 1, "bytes": 4096}

    def on_rollback_prepare(self, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        self.save("open_rollback.json", {"id": params["id"]})
        return {"begin_seq": 101, "last_seq": 102}

    def _close_rollback(self, identity: str) -> None:
        waiting = self.load("open_rollback.json")
        if waiting is None or waiting["id"] != identity:
            raise Refused("conflict", f"no rollback {identity} is prepared here")
        os.unlink(self.directory / "open_rollback.json")

    def on_rollback_commit(self, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        self._close_rollback(params["id"])
        return {"commit_seq": 103}

    def on_rollback_abort(self, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        self._close_rollback(params["id"])
        return {}

    # -------------------------------------------------------------------------------------- loop

    def serve(self) -> None:
        path = self.directory / f"{self.role}.sock"
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(os.fspath(path))
        listener.listen()
        clients: list[socket.socket] = []
        while not self.stopping:
            watched = [listener, *clients, *self.attached]
            for ready in select.select(watched, [], [])[0]:
                if ready is listener:
                    clients.append(listener.accept()[0])
                elif ready in self.attached:
                    self.hear_client(ready)
                elif not self.hear(ready):
                    clients.remove(ready)
                    ready.close()

    def hear_client(self, client: socket.socket) -> None:
        """Echoes what an NBD client sends; its view has a connection less when it goes."""
        data = b""
        with contextlib.suppress(OSError):
            data = client.recv(4096)
            client.sendall(data)
        if data:
            return
        self.attached.remove(client)
        client.close()
        for view in self.views.values():
            view["connections"] = max(0, view["connections"] - 1)

    def hear(self, client: socket.socket) -> bool:
        try:
            data, fds, _, _ = socket.recv_fds(client, 1 << 17, 16)
        except ConnectionResetError:  # the supervisor died with an answer unread
            return False
        if not data:
            return False
        message = json.loads(data)
        if "cancel" in message:
            return True
        method = message["method"]
        try:
            result = self.answer(method, message["params"], fds)
        except Dies:
            os._exit(3)
        except Refused as refused:
            kind, text = refused.args
            answer = {"id": message["id"], "error": {"kind": kind, "message": text}}
            with contextlib.suppress(OSError):
                client.send(json.dumps(answer).encode())
            for fd in fds:
                os.close(fd)
            return True
        mine = [self.fd] if method == "hello" else fds if method == "plan_rollback" else []
        answer = {"id": message["id"], "result": result}
        try:
            socket.send_fds(client, [json.dumps(answer).encode()], mine)
        except OSError:
            return False
        finally:
            for fd in fds:
                os.close(fd)
        return True


def main() -> None:
    role, *arguments = sys.argv[1:]
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    directory = Path(given["--disk-dir"])
    with open(directory / "pids", "a") as file:
        file.write(f"{os.getpid()}\n")
    lock = os.open(directory / f"{role}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    fake = Fake(role, directory, int(given["--fd"]))
    if "exit" in fake.behaviour():
        sys.exit(fake.behaviour()["exit"])
    fake.log("started", {"offset": given["--clock-offset"], "at": time.monotonic()}, 0)
    fake.serve()


if __name__ == "__main__":
    main()
