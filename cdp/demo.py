"""The product in half a minute: ``python -m cdp.demo``, or ``make demo``.

A daemon of its own on a scratch directory, a disk full of files, an attack, and the way back. Every
command it shows is a real one that a reader can type. What it claims it checks, by checksum; if
something does not hold, it says so and exits with status 1. It needs no root and nothing beyond
Python, and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Final, NamedTuple

from cdp.nbd.client import NbdClient

SEED: Final = 20260301
DISK: Final = "disk0"
LABEL: Final = "before-attack"
MIB: Final = 1 << 20
DISK_BYTES: Final = 96 * MIB
TABLE_BYTES: Final = 64 << 10
BLOCK: Final = 4096
SECTOR: Final = 512
FILES: Final = 200
DELETED: Final = 50
EDITED: Final = 40
FILE_BYTES_MAX: Final = 512 << 10
WRITE_BYTES: Final = 64 << 10
START_SECONDS_MAX: Final = 60.0
STOP_SECONDS_MAX: Final = 60.0
COMMAND_SECONDS_MAX: Final = 60.0
NBD_SECONDS_MAX: Final = 30.0
POLL_SECONDS: Final = 0.02
LOG_LINES_SHOWN: Final = 30

Read = Callable[[int, int], bytes]


class DemoFailed(Exception):
    """Something that the demo claims does not hold."""


# --------------------------------------------------------------------------------------- the story
class Story:
    """Prints what happens: chapters, sentences, commands with their output, and proofs."""

    def __init__(self) -> None:
        self._styled = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._chapter = 0
        self.proofs = 0

    def _style(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._styled else text

    def chapter(self, title: str) -> None:
        """A new part."""
        self._chapter += 1
        self._put(f"\n{self._style(f'{self._chapter}. {title}', '1')}\n")

    def tell(self, text: str) -> None:
        """Some sentences."""
        self._put(
            textwrap.fill(" ".join(text.split()), 92, initial_indent="   ", subsequent_indent="   ")
            + "\n"
        )

    def command(self, words: Sequence[str]) -> None:
        """A command, before it is run."""
        self._put(f"\n   {self._style('$ ' + shlex.join(words), '36')}\n")

    def output(self, text: str) -> None:
        """What a command printed."""
        self._put("".join(f"   {line}".rstrip() + "\n" for line in text.splitlines()))

    def prove(self, claim: str, holds: bool, otherwise: str = "") -> None:
        """Check a claim.

        :raises DemoFailed: it does not hold.
        """
        if not holds:
            raise DemoFailed(f"this should hold and does not: {claim}. {otherwise}".rstrip(". "))
        self.proofs += 1
        self._put(f"   {self._style('[ok]', '32')} {claim}\n")

    @staticmethod
    def _put(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


# --------------------------------------------------------------------------------------- the files
class Placed(NamedTuple):
    """A file and where it lies on the disk."""

    name: str
    offset: int
    length: int

    @property
    def room(self) -> int:
        """Bytes up to where the next file may begin."""
        return -(-self.length // BLOCK) * BLOCK


class Checked(NamedTuple):
    """What became of the files: how many are as they should be, changed, and not in the table."""

    intact: int
    changed: int
    missing: int


class Office:
    """A file system simple enough for a demo: a table of names, and each file in one piece.

    `digests` is what the demo itself remembers of every file: nothing on the disk is believed.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.files: dict[str, Placed] = {}
        self.digests: dict[str, str] = {}
        offset = TABLE_BYTES
        for number in range(FILES):
            kind = ("invoices/invoice", "photos/photo", "mail/message", "plans/plan")[number % 4]
            length = min(FILE_BYTES_MAX, int(rng.lognormvariate(10.5, 1.2)) + 100)
            placed = Placed(f"{kind}-{number:03d}", offset, length)
            self.files[placed.name] = placed
            offset += placed.room + rng.randrange(8) * BLOCK
        assert offset <= DISK_BYTES

    @property
    def total_bytes(self) -> int:
        """Of all files."""
        return sum(placed.length for placed in self.files.values())

    def fill(self, disk: NbdClient) -> None:
        """Write the table and all files."""
        self._write_table(disk, list(self.files.values()))
        for placed in self.files.values():
            self._write_file(disk, placed, edition=1)
        disk.flush()

    def edit(self, disk: NbdClient) -> None:
        """A day's work: some files get new content."""
        for name in self._rng.sample(sorted(self.files), EDITED):
            self._write_file(disk, self.files[name], edition=2)
        disk.flush()

    def _write_file(self, disk: NbdClient, placed: Placed, *, edition: int) -> None:
        line = f"{placed.name}, edition {edition}: {self._rng.getrandbits(64):016x}\n"
        content = (line * (placed.length // len(line) + 1)).encode()[: placed.length]
        self.digests[placed.name] = hashlib.sha256(content).hexdigest()
        write(disk, placed.offset, content)

    def _write_table(self, disk: NbdClient, files: Sequence[Placed], note: str = "") -> None:
        text = json.dumps({"note": note, "files": [list(placed) for placed in files]})
        assert len(text) <= TABLE_BYTES
        disk.write(0, text.encode().ljust(TABLE_BYTES, b"\0"))

    def attack(self, disk: NbdClient) -> None:
        """What ransomware does: encrypt most, delete the rest, leave a note."""
        names = sorted(self.files)
        self._rng.shuffle(names)
        for name in names[:-DELETED]:
            placed = self.files[name]
            write(disk, placed.offset, self._rng.randbytes(placed.length))
        for name in names[-DELETED:]:
            disk.trim(self.files[name].offset, self.files[name].room)
        left = [
            placed._replace(name=placed.name + ".locked")
            for placed in self.files.values()
            if placed.name not in set(names[-DELETED:])
        ]
        self._write_table(disk, left, "Your files are encrypted. Pay, or lose them.")
        disk.flush()

    def content(self, read: Read, name: str) -> bytes:
        """A file's content, as the place where it lies tells."""
        placed = self.files[name]
        return read(placed.offset, placed.length)

    def is_intact(self, read: Read, name: str) -> bool:
        """Whether a file is what was written last before the attack."""
        return hashlib.sha256(self.content(read, name)).hexdigest() == self.digests[name]

    def check(self, read: Read) -> Checked:
        """Compare all files, by the table on the disk, with what the demo remembers."""
        table = json.loads(read(0, TABLE_BYTES).rstrip(b"\0"))
        there = {str(name).removesuffix(".locked") for name, _, _ in table["files"]}
        intact = sum(name in there and self.is_intact(read, name) for name in self.files)
        missing = len(self.files.keys() - there)
        return Checked(intact, FILES - intact - missing, missing)

    def note(self, read: Read) -> str:
        """The note that somebody left in the table."""
        return str(json.loads(read(0, TABLE_BYTES).rstrip(b"\0"))["note"])


def write(disk: NbdClient, offset: int, content: bytes) -> None:
    """Write content in pieces, padded to whole sectors."""
    content = content.ljust(-(-len(content) // SECTOR) * SECTOR, b"\0")
    for at in range(0, len(content), WRITE_BYTES):
        disk.write(offset + at, content[at : at + WRITE_BYTES])


def digest(read: Read) -> str:
    """Checksum of everything on a disk."""
    total = hashlib.sha256()
    for at in range(0, DISK_BYTES, MIB):
        total.update(read(at, MIB))
    return total.hexdigest()


# -------------------------------------------------------------------------------------- the daemon
class Daemon:
    """Our own `cdpd`: started, asked, stopped, and in any case gone at the end."""

    def __init__(self, scratch: Path, story: Story) -> None:
        self.scratch = scratch
        self.directory = scratch / "state"
        self._story = story
        self._process: subprocess.Popen[bytes] | None = None
        # Without a settings file or a state directory of whoever runs the demo.
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("CDP_")}
        self._environment["CDP_STATE_DIR"] = str(self.directory)

    @property
    def nbd_socket(self) -> Path:
        """Where NBD clients connect."""
        return self.directory / "nbd.sock"

    def start(self) -> None:
        """Start it and wait until it says that it is ready."""
        self.directory.mkdir(mode=0o700, exist_ok=True)
        arguments = ["--state-dir", str(self.directory)]
        self._story.command(["cdpd", *arguments])
        with open(self.scratch / "cdpd.out", "ab") as out, open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cdp.supervisor.main", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                env=self._environment,
                start_new_session=True,  # an interrupt at the terminal is the demo's alone
            )
        end = time.monotonic() + START_SECONDS_MAX
        while True:
            said = (self.scratch / "cdpd.out").read_text(errors="replace")
            if ready := next((line for line in said.splitlines() if "ready" in line), None):
                self._story.output(ready)
                return
            if self._process.poll() is not None:
                raise DemoFailed(f"cdpd ended with status {self._process.returncode} at its start")
            if time.monotonic() > end:
                raise DemoFailed(f"cdpd is not ready after {START_SECONDS_MAX:.0f} s")
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """A clean stop: SIGTERM, and wait."""
        assert self._process is not None
        self._story.command(["kill", "-TERM", str(self._process.pid)])
        self._process.terminate()
        try:
            status = self._process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"cdpd has not stopped after {STOP_SECONDS_MAX:.0f} s") from None
        self._story.prove("cdpd has stopped with status 0", status == 0, f"It was {status}")
        left = dict(self._ours())
        self._story.prove("and so have all its processes", not left, f"Left: {left}")

    def cdp(self, *words: str) -> str:
        """Run a command, as a person would, and show it with what it prints."""
        self._story.command(["cdp", *words])
        output = self._run(words)
        self._story.output(output)
        return output

    def _run(self, words: Sequence[str]) -> str:
        arguments = [sys.executable, "-m", "cdp.cli.main", *words]
        try:
            done = subprocess.run(
                arguments,
                check=False,
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                timeout=COMMAND_SECONDS_MAX,
            )
        except subprocess.TimeoutExpired:
            raise DemoFailed(
                f"'cdp {shlex.join(words)}' has not ended after {COMMAND_SECONDS_MAX:.0f} s"
            ) from None
        if done.returncode:
            raise DemoFailed(
                f"'cdp {shlex.join(words)}' ended with status {done.returncode}: "
                f"{done.stderr.strip() or done.stdout.strip() or 'it said nothing'}"
            )
        return done.stdout

    @contextlib.contextmanager
    def disk(self, point: str = "") -> Iterator[NbdClient]:
        """An NBD connection to the disk, or to one of its points."""
        export = f"{DISK}@{point}" if point else DISK
        with NbdClient.connect(self.nbd_socket, export, timeout=NBD_SECONDS_MAX) as client:
            yield client

    @property
    def _log(self) -> Path:
        return self.scratch / "cdpd.log"

    def last_words(self) -> str:
        """The end of the daemon's log."""
        try:
            lines = self._log.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-LOG_LINES_SHOWN:])

    def _ours(self) -> Iterator[tuple[int, str]]:
        """Processes that carry our scratch directory's name among their arguments."""
        mark = os.fsencode(self.directory)
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal() or int(entry.name) == os.getpid():
                continue
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue  # it ended meanwhile
            if any(part == mark or part.startswith(mark + b"/") for part in arguments):
                yield int(entry.name), os.fsdecode(b" ".join(arguments).strip())

    def end(self) -> None:
        """Whatever happened: no process of ours is left, and no file."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS_MAX / 4)
        pages = [page for page in map(_frontier, self.directory.glob("disks/*/disk.json")) if page]
        for pid, _ in self._ours():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        for page in pages:
            page.unlink(missing_ok=True)
        shutil.rmtree(self.scratch, ignore_errors=True)


def _frontier(configuration: Path) -> Path | None:
    """The shared page of a disk, which lies outside of its directory."""
    try:
        uuid = str(json.loads(configuration.read_bytes())["uuid"])
    except (OSError, ValueError, KeyError):
        return None
    return Path("/dev/shm") / f"cdp-{uuid}.frontier"


def find(pattern: str, text: str) -> str:
    """The group of a pattern in what a command printed.

    :raises DemoFailed: it is not there.
    """
    found = re.search(pattern, text)
    if found is None:
        raise DemoFailed(f"a command was to print something like {pattern!r}, and printed {text!r}")
    return found[1]


# ------------------------------------------------------------------------------------ the chapters
class Demo:
    """The chapters, in their order; each leaves what the next ones compare with."""

    def __init__(self, daemon: Daemon, story: Story) -> None:
        self.daemon, self.story = daemon, story
        self.office = Office(random.Random(SEED))
        self.digests: dict[str, str] = {}
        self.good_seq = self.bad_seq = 0

    def protect(self) -> None:
        """A daemon and a disk."""
        story = self.story
        story.chapter("A disk is protected")
        story.tell("""The daemon needs a directory for its state; this one is thrown away at the
            end. All commands find it by an environment variable:""")
        story.command(["export", f"CDP_STATE_DIR={self.daemon.directory}"])
        self.daemon.start()
        self.daemon.cdp("disk", "add", DISK, "--size", f"{DISK_BYTES // MIB}MiB", "--window", "1h")
        story.tell("""Its content lies in a plain file, since no --backing was named. An image or a
            device that exists is protected the same way, at once and without a copy.""")

    def work(self) -> None:
        """Files, edits, and a bookmark."""
        story, office = self.story, self.office
        story.chapter("It is used, by any NBD client")
        story.tell(f"""A virtual machine, or the kernel with nbd-client, would use it like this. The
            demo has a client of its own: it writes {FILES} files,
            {office.total_bytes / MIB:.0f} MiB, and then edits {EDITED} of them.""")
        with self.daemon.disk() as disk:
            office.fill(disk)
            office.edit(disk)
            checked = office.check(disk.read)
            story.prove(f"all {FILES} files are there", checked.intact == FILES, f"{checked}")
            self.digests["good"] = digest(disk.read)
        story.tell("Somebody is about to do something risky, and gives this moment a name:")
        answer = self.daemon.cdp("bookmark", "add", DISK, LABEL)
        self.good_seq = int(find(r"seq:(\d+)", answer))

    def suffer(self) -> None:
        """The attack."""
        story, office = self.story, self.office
        story.chapter("Ransomware")
        story.tell(f"""It overwrites {FILES - DELETED} files with what cannot be told from noise,
            and deletes the other {DELETED} by trimming them, as an SSD would be told to.""")
        with self.daemon.disk() as disk:
            office.attack(disk)
            checked = office.check(disk.read)
            story.prove(
                f"no file is left: {checked.changed} encrypted, {checked.missing} deleted, "
                f"and a note: {office.note(disk.read)!r}",
                checked == Checked(0, FILES - DELETED, DELETED),
                f"{checked}",
            )
            self.digests["wrecked"] = digest(disk.read)
        self.bad_seq = int(find(r"up to seq:(\d+)", self.daemon.cdp("timeline", DISK)))

    def look_back(self) -> None:
        """A view, and the write that did it."""
        story, office = self.story, self.office
        story.chapter("The past is still there")
        story.tell("A view is the disk as it was, as an NBD export of its own; the disk goes on:")
        uri = self.daemon.cdp("view", "open", DISK, "--at", LABEL).strip()
        victim = next(iter(office.files))
        with NbdClient.connect(uri, timeout=NBD_SECONDS_MAX) as view, self.daemon.disk() as live:
            story.prove(f"{victim} is intact in the view", office.is_intact(view.read, victim))
            story.prove("and noise on the live disk", not office.is_intact(live.read, victim))
            first = office.content(view.read, victim).split(b"\n")[0].decode()
            story.tell(f"It begins: {first!r}")
        self.daemon.cdp("view", "close", find(r"@view:([^?]+)", uri))
        seq = self._find_first_bad(victim)
        story.tell(f"""Every single write can be opened, so a bisection of a few steps finds the one
            that began to ruin this file: write number {seq}. Its last good version is the export
            {DISK}@seq:{seq - 1}, its first bad one {DISK}@seq:{seq}.""")
        holds = self._intact_at(seq - 1, victim) and not self._intact_at(seq, victim)
        story.prove(f"intact at seq:{seq - 1}, not intact at seq:{seq}", holds)

    def _intact_at(self, seq: int, name: str) -> bool:
        with self.daemon.disk(f"seq:{seq}") as past:
            return self.office.is_intact(past.read, name)

    def _find_first_bad(self, name: str) -> int:
        """The first seq at which a file is not intact any more."""
        good, bad = self.good_seq, self.bad_seq
        while bad - good > 1:
            middle = (good + bad) // 2
            if self._intact_at(middle, name):
                good = middle
            else:
                bad = middle
        return bad

    def roll_back(self) -> str:
        """Back, and what undoes it."""
        story = self.story
        story.chapter("Rolled back")
        story.tell("First what it would do, then doing it:")
        self.daemon.cdp("rollback", DISK, "--to", LABEL, "--dry-run")
        answer = self.daemon.cdp("rollback", DISK, "--to", LABEL, "--yes")
        self._prove_all_is_back()
        return find(r"undo with: cdp (rollback .*--to seq:\d+)", answer)

    def _prove_all_is_back(self) -> None:
        with self.daemon.disk() as disk:
            checked = self.office.check(disk.read)
            whole = digest(disk.read)
        self.story.prove(f"all {FILES} files are back", checked.intact == FILES, f"{checked}")
        claim = f"every byte of the disk is as it was at {LABEL}"
        self.story.prove(claim, whole == self.digests["good"])

    def roll_forward(self, undo: str) -> None:
        """The rollback undone, and done again."""
        story = self.story
        story.chapter("The rollback undone, to look for traces")
        story.tell("""A rollback appends to history and never rewrites it, so the wrecked disk is a
            point as any other. What the rollback printed leads there:""")
        self.daemon.cdp(*shlex.split(undo), "--yes")
        with self.daemon.disk() as disk:
            whole = digest(disk.read)
        claim = "every byte of the disk is as the attack left it"
        story.prove(claim, whole == self.digests["wrecked"])
        story.tell("""(A copy would have done: 'cdp restore' writes any point to an image file, and
            the disk stays in use.)""")
        self.daemon.cdp("rollback", DISK, "--to", LABEL, "--yes")
        self._prove_all_is_back()
        evidence = self.daemon.scratch / "evidence.img"
        point = undo.rsplit(maxsplit=1)[-1]
        self.daemon.cdp("restore", DISK, "--to", point, "--output", str(evidence))
        with _image(evidence) as read:
            whole = digest(read)
        claim = "every byte of the image is as the attack left it"
        story.prove(claim, whole == self.digests["wrecked"])

    def stop(self) -> None:
        """A clean stop; the backing alone is the disk."""
        story = self.story
        story.chapter("Without the daemon")
        self.daemon.cdp("scrub", DISK)
        backing = self.daemon.directory / "disks" / DISK / "backing.img"
        self.daemon.stop()
        story.tell(f"""A clean stop applies everything, so the plain file {backing.name} is the
            whole disk, for whoever wants to do without cdpd:""")
        with _image(backing) as read:
            checked = self.office.check(read)
        claim = f"all {FILES} files are in {backing.name}"
        story.prove(claim, checked.intact == FILES, f"{checked}")


@contextlib.contextmanager
def _image(path: Path) -> Iterator[Read]:
    """Reads of an image file, which may be shorter than the disk where it ends with zeroes."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield lambda offset, length: os.pread(fd, length, offset).ljust(length, b"\0")
    finally:
        os.close(fd)


def tell_all(daemon: Daemon, story: Story) -> None:
    """The whole story.

    :raises DemoFailed: something does not hold.
    """
    began = time.monotonic()
    demo = Demo(daemon, story)
    demo.protect()
    demo.work()
    demo.suffer()
    demo.look_back()
    undo = demo.roll_back()
    demo.roll_forward(undo)
    demo.stop()
    seconds = time.monotonic() - began
    story.tell("")
    story.prove(f"demo: {story.proofs} claims checked, all hold, in {seconds:.1f} s", True)


def _terminated(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run it; the exit status."""
    signal.signal(signal.SIGTERM, _terminated)
    story = Story()
    # The names of unix sockets must be short: not below TMPDIR, which may be anywhere.
    scratch = Path(tempfile.mkdtemp(prefix="cdp-demo-", dir="/tmp"))
    daemon = Daemon(scratch, story)
    try:
        tell_all(daemon, story)
        return 0
    except KeyboardInterrupt:
        sys.stderr.write("\ndemo: interrupted\n")
        return 130
    except Exception as error:
        sys.stdout.flush()
        what = str(error) if isinstance(error, DemoFailed) else f"{type(error).__name__}: {error}"
        sys.stderr.write(f"\ndemo: FAILED: {what}\n")
        if words := daemon.last_words():
            sys.stderr.write(f"\nThe daemon's log ends with:\n{words}\n")
        return 1
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        daemon.end()


if __name__ == "__main__":
    sys.exit(main())
