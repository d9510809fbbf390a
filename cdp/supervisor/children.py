"""The processes of a disk: started, adopted, watched and restarted.

A child outlives its supervisor and is adopted by the next one over its socket. Nobody is ever
declared dead by a time-out: a successor waits in the kernel for the role's lock, which its
predecessor holds until its last thread has ended. So the worst that a wrong guess of ours can do is
a process that waits.

States, of one role of one disk:

    stopped   nobody wants it (a viewer without views, a released disk), or it was stopped
    starting  a process is being started, waits for its predecessor, or recovers
    ready     it answers calls
    failed    it answers, and says that it will not work and why
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import site
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Protocol

import trio

from cdp.rpc import ConnectionLost, OnProgress, Reply, RpcClient, close_all
from journal.errors import Busy, CdpError, Conflict

log = logging.getLogger(__name__)

PROTOCOL: Final = 1
STDERR: Final = 2
VIEWER_OOM_SCORE: Final = "500"
RESTART_SECONDS_MIN: Final = 0.1
RESTART_SECONDS_MAX: Final = 10.0
# A child that worked so long starts anew with the shortest back-off.
RESTART_RESET_SECONDS: Final = 60.0
CONNECT_SECONDS: Final = 0.02
CONNECT_SECONDS_MAX: Final = 0.25
GREET_SECONDS: Final = 0.05
GREET_SECONDS_MAX: Final = 0.5
RECONNECT_SECONDS: Final = 1.0
# Calls wait so long for a process that is coming up: a restart takes about a second.
CALL_PATIENCE_SECONDS: Final = 20.0
# A process that is alive and does not answer this long is shown, not killed.
GREET_PATIENCE_SECONDS: Final = 30.0


class Role(StrEnum):
    """What a process does for its disk."""

    RECORDER = "recorder"
    CURATOR = "curator"
    VIEWER = "viewer"


class State(StrEnum):
    """See the module."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"


class BackingHolder(Protocol):
    """Where the descriptor of the backing comes from, and goes to on adoption."""

    def acquire(self) -> int:
        """The descriptor, opened now if nobody has it; CdpError if that is not possible."""
        ...

    def offer(self, fd: int) -> None:
        """Takes over a descriptor that a child handed back."""
        ...


@dataclass(frozen=True, slots=True)
class Launcher:
    """How processes are started; tests start others."""

    commands: Mapping[Role, Sequence[str]] = field(
        default_factory=lambda: {role: (sys.executable, "-m", f"cdp.{role}") for role in Role}
    )

    def launch(
        self, role: Role, directory: Path, fd: int, clock_offset_ns: int
    ) -> subprocess.Popen[bytes]:
        """Starts a process in a session of its own: no signal to us is one to it."""
        command = [
            *self.commands[role],
            *("--disk-dir", os.fspath(directory)),
            *("--fd", str(fd)),
            *("--clock-offset", str(clock_offset_ns)),
        ]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            # Our standard output is for who started us; what a child prints belongs to the log.
            stdout=STDERR,
            cwd="/",
            env=_environment(),
            pass_fds=(fd,),
            start_new_session=True,
        )
        if role is Role.VIEWER:
            # When memory runs out: it can be started again, and nobody's writes depend on it.
            with contextlib.suppress(OSError):
                Path(f"/proc/{process.pid}/oom_score_adj").write_text(VIEWER_OOM_SCORE)
        return process


def _environment() -> dict[str, str]:
    """Ours; in a checkout that is not installed, a child finds the same code as we did."""
    root = os.fspath(Path(__file__).resolve().parents[2])
    if root in site.getsitepackages():
        return dict(os.environ)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


Hook = Callable[["Child", dict[str, Any]], Awaitable[None]]


async def _no_hook(child: Child, hello: dict[str, Any]) -> None:
    """Nothing to be done."""


@dataclass(slots=True)
class Hooks:
    """Called by a child's task. `greeted`: at every hello until it is ready; `ready`: once then,
    before others may use it. A CdpError ends this attempt."""

    greeted: Hook = _no_hook
    ready: Hook = _no_hook


class Child:
    """One role of one disk, whatever process fills it at the moment."""

    def __init__(
        self,
        role: Role,
        disk: str,
        directory: Path,
        uuid: str,
        *,
        launcher: Launcher,
        clock_offset_ns: int,
        backing: BackingHolder,
        hooks: Hooks | None = None,
    ) -> None:
        self.role, self.disk = role, disk
        self.state = State.STOPPED
        self.reason: str | None = None
        self.restarts = 0
        self.pid: int | None = None
        self.settled = trio.Event()
        self._directory, self._uuid = directory, uuid
        self._launcher, self._clock_offset_ns = launcher, clock_offset_ns
        self._backing = backing
        self._hooks = hooks or Hooks()
        self._wanted = False
        self._lived = False
        self._nobody_left = False
        self._stop_params: dict[str, Any] | None = None
        self._changed = trio.Event()
        self._client: RpcClient | None = None
        self._adopted: RpcClient | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1

    def __str__(self) -> str:
        return f"{self.role} of {self.disk}"

    # ---------------------------------------------------------------------------------- for others

    def _is_wanted(self) -> bool:
        return self._wanted

    def want(self) -> None:
        """It shall run."""
        if not self._wanted:
            self._wanted = True
            self._notify()

    async def adopt(self) -> bool:
        """Takes over a living process, and the backing's descriptor from it. Before `run`."""
        client = await self._connect_nowait()
        if client is None:
            return False
        try:
            # It may be stuck: then its lock keeps a successor waiting, which is shown.
            with trio.move_on_after(GREET_PATIENCE_SECONDS):
                await self._hello(client)
                self._adopted = client
        except CdpError as error:
            log.warning("the %s cannot be adopted: %s", self, error)
        if self._adopted is None:
            client.close()
        return self._adopted is not None

    @property
    def is_ready(self) -> bool:
        """Whether it can be called now, as far as we know."""
        if self._client is None or self._client.closed.is_set():
            return False
        return self.state is State.READY

    async def wait_ready(self) -> None:
        """Waits until it can be used.

        :raises CdpError: it is not wanted, or says that it will not work.
        """
        while not self.is_ready:
            if self.state is State.FAILED:
                raise Conflict(f"{self.disk}: {self.reason or f'its {self.role} has failed'}")
            if not self._wanted:
                raise Conflict(f"{self.disk}: its {self.role} is stopped")
            await self._changed.wait()

    async def wait_decided(self, *, other_than: State | None = None) -> None:
        """Waits until it is ready or has failed; `other_than`: until that is over, too."""
        while self.state not in (State.READY, State.FAILED) or self.state is other_than:
            if not self._wanted:
                raise Conflict(f"{self.disk}: its {self.role} is stopped")
            await self._changed.wait()

    async def call(
        self,
        method: str,
        params: dict[str, Any] | None = None,
        fds: Sequence[int] = (),
        on_progress: OnProgress | None = None,
        *,
        again: bool = False,
    ) -> Reply:
        """Calls the process; see `RpcClient.call`. One that is coming up is waited for, a while.

        `again`: the call may be repeated when the process ends before it answers.

        :raises Busy: it does not come up, or is not wanted.
        :raises Conflict: it says that it will not work.
        """
        deadline = trio.current_time() + CALL_PATIENCE_SECONDS
        while True:
            with trio.move_on_at(deadline):
                await self.wait_ready()
            client = self._client
            if client is None or not self.is_ready:
                why = self.reason or "try again in a moment"
                raise Busy(f"{self.disk}: its {self.role} is {self.state}: {why}")
            try:
                return await client.call(method, params, fds, on_progress)
            except ConnectionLost:
                if not again or trio.current_time() >= deadline:
                    raise

    async def call_early(self, method: str, params: dict[str, Any] | None = None) -> Reply | None:
        """Calls it even if it is not ready, from its hooks; None when nobody can be asked."""
        return await self._client.call(method, params) if self._client is not None else None

    async def stop(
        self, params: dict[str, Any] | None = None, on_progress: OnProgress | None = None
    ) -> None:
        """Ends the process cleanly and waits for that, however long it takes.

        :raises CdpError: it refuses; it goes on then, and is wanted again.
        """
        self._wanted = False
        self._stop_params = params
        self._notify()
        if self._client is not None:
            try:
                await self._client.call("stop", params, on_progress=on_progress)
            except ConnectionLost:
                pass
            except CdpError:
                self._wanted = True
                self._notify()
                raise
        while not self._nobody_left and not self._is_wanted():
            await self._changed.wait()

    # -------------------------------------------------------------------------------- its own task

    async def run(self) -> None:
        """Keeps a process in this role whenever one is wanted. When cancelled, that goes on."""
        backoff = RESTART_SECONDS_MIN
        try:
            while True:
                while not self._is_wanted():
                    await self._end()
                    self._lived, self._nobody_left = False, True
                    self._become(State.STOPPED, None)
                    self._notify()
                    await self._changed.wait()
                self._nobody_left = False
                began = trio.current_time()
                reason = await self._live()
                if not self._is_wanted():
                    continue
                self._lived = True
                self._become(State.STARTING, reason)
                self.settled.set()
                log.warning("the %s: %s", self, reason)
                if trio.current_time() - began >= RESTART_RESET_SECONDS:
                    backoff = RESTART_SECONDS_MIN
                await self._pause(backoff)
                backoff = min(2 * backoff, RESTART_SECONDS_MAX)
        finally:
            self._forget_process()

    async def _pause(self, seconds: float) -> None:
        """Waits, but not for a process that is no longer wanted."""
        with trio.move_on_after(seconds):
            while self._is_wanted():
                await self._changed.wait()

    async def _live(self) -> str:
        """The life of one process, from its start to its end; returns why it ended."""
        self._become(State.STARTING, self.reason)
        client: RpcClient | None = None
        try:
            client, self._adopted = self._adopted, None
            if client is None:
                client = await self._connect()
            if client is None:
                return self._ending()
            self._client = client
            self._notify()
            await self._greet(client)
            await client.closed.wait()
            self._become(State.STARTING, "its process has ended")
        except ConnectionLost:
            pass
        except (CdpError, OSError) as error:
            return str(error)
        finally:
            self._client = None
            if client is not None:
                client.close()
        await self._wait_gone()
        return self._ending()

    async def _connect(self) -> RpcClient | None:
        """A connection to whoever has the role, started if need be; None when it ended at once."""
        pause = CONNECT_SECONDS
        while self._is_wanted():
            client = await self._connect_nowait()
            if client is not None:
                return client
            if self._process is None:
                self.restarts += self._lived
                fd = self._backing.acquire()
                self._process = self._launcher.launch(
                    self.role, self._directory, fd, self._clock_offset_ns
                )
            elif self._process.poll() is not None:
                return None
            await trio.sleep(pause)
            pause = min(2 * pause, CONNECT_SECONDS_MAX)
        return None

    async def _end(self) -> None:
        """Ends whoever has the role although nobody wants one, and waits for that.

        It need not be a process of ours: one that a supervisor started just before it was killed
        could not be adopted yet when we looked.
        """
        while self._pidfd >= 0 or self._is_starting() or self._is_held():
            client = await self._connect_nowait()
            if client is not None:
                await self._end_politely(client)
            elif self._process is not None and self._process.poll() is None:
                # It waits for the role, or has not come far: nothing of it is lost.
                self._process.send_signal(signal.SIGTERM)
            if self._pidfd < 0 and self._process is not None and self._process.poll() is None:
                self._pidfd = os.pidfd_open(self._process.pid)
            with trio.move_on_after(RECONNECT_SECONDS if self._pidfd >= 0 else CONNECT_SECONDS):
                if self._pidfd >= 0:
                    await trio.lowlevel.wait_readable(self._pidfd)
                    self._close_pidfd()
                else:
                    await trio.sleep_forever()
        if self._adopted is not None:
            self._adopted.close()
            self._adopted = None
        self._ending()

    def _is_held(self) -> bool:
        """Whether some process has the role's lock."""
        try:
            fd = os.open(self._directory / f"{self.role}.lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    async def _end_politely(self, client: RpcClient) -> None:
        with contextlib.closing(client):
            try:
                await client.call("stop", self._stop_params)
            except ConnectionLost:
                return
            except CdpError as error:
                log.error("the %s does not want to stop: %s", self, error)
                self._stop_params = {"drain": False}

    def _is_starting(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def _connect_nowait(self) -> RpcClient | None:
        try:
            return await RpcClient.connect(
                self._directory / f"{self.role}.sock", name=f"the {self}"
            )
        except OSError:
            return None

    async def _hello(self, client: RpcClient) -> dict[str, Any]:
        reply = await client.call("hello")
        hello = reply.result
        described = (hello.get("role"), hello.get("uuid"), hello.get("protocol"))
        if described != (self.role, self._uuid, PROTOCOL) or not isinstance(hello.get("pid"), int):
            close_all(reply.fds)
            raise Conflict(
                f"what answers as the {self} is {described}: stop the process that an older "
                "cdpd left, and start again"
            )
        close_all(reply.fds[1:])
        for fd in reply.fds[:1]:
            self._backing.offer(fd)
        if self.pid != hello["pid"] or self._pidfd < 0:
            self._close_pidfd()
            self.pid = hello["pid"]
            try:
                self._pidfd = os.pidfd_open(hello["pid"])
            except ProcessLookupError:
                raise ConnectionLost(f"the {self} has just ended") from None
        return hello

    async def _greet(self, client: RpcClient) -> None:
        """Waits until the process is ready, or is gone, or will never be."""
        pause = GREET_SECONDS
        while True:
            hello: dict[str, Any] = {}
            with trio.move_on_after(GREET_PATIENCE_SECONDS):
                hello = await self._hello(client)
            if not hello:
                self._become(State.STARTING, "its process does not answer")
                continue
            await self._hooks.greeted(self, hello)
            if hello.get("state") == State.READY:
                await self._hooks.ready(self, hello)
                self._become(State.READY, None)
                return
            reason = str(hello["reason"]) if hello.get("reason") else None
            failed = hello.get("state") == State.FAILED
            self._become(State.FAILED if failed else State.STARTING, reason)
            with trio.move_on_after(pause):
                await client.closed.wait()
                return
            pause = min(2 * pause, GREET_SECONDS_MAX)

    async def _wait_gone(self) -> None:
        """Waits until the process has ended, or can be reached again."""
        while self._pidfd >= 0:
            with trio.move_on_after(RECONNECT_SECONDS):
                await trio.lowlevel.wait_readable(self._pidfd)
                self._close_pidfd()
                return
            client = await self._connect_nowait()
            if client is not None:
                self._adopted = client
                return

    def _ending(self) -> str:
        """How the process ended; it is reaped if it was ours."""
        self.pid = None
        status = self._process.poll() if self._process is not None else None
        if status is None:
            return "its process has ended"
        self._process = None
        if status < 0:
            return f"its process was ended by {signal.Signals(-status).name}"
        return f"its process ended with status {status}: see the log"

    def _become(self, state: State, reason: str | None) -> None:
        if (state, reason) == (self.state, self.reason):
            return
        self.state, self.reason = state, reason
        if state in (State.READY, State.FAILED):
            self.settled.set()
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _close_pidfd(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _forget_process(self) -> None:
        """We end, it goes on: nobody of ours will wait for it."""
        self._close_pidfd()
        if self._adopted is not None:
            self._adopted.close()
        if self._process is not None and self._process.poll() is None:
            # Its parent is the init process soon; Popen would complain that it still runs.
            self._process.returncode = 0
