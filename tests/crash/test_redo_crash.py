"""The redo log under crashes: at every operation, inside recovery, in a row, after failed syncs.

For every image: what was promised is there, byte for byte; what survives is a gap-free prefix of
what was submitted (but for the holes that recovery documents); nothing is invented; a crash is
never taken for damage; recovering again changes nothing. `CDP_TEST_SEED` replays a run.
"""

from __future__ import annotations

import errno
import random

import pytest

from journal.errors import JournalFull, Poisoned
from journal.redo import RedoWriter
from tests.crash.redo_model import DISK, SEGMENT_BYTES, Driver, read_all
from tests.crash.sim_storage import Crash, SimStorage

pytestmark = pytest.mark.crash


def run(driver: Driver, actions: int) -> bool:
    """A life of a recorder; whether it came to its end."""
    try:
        driver.go_on(driver.recover())
        driver.work(actions)
    except Crash:
        return False
    return True


def operations_of(seed: int, actions: int) -> int:
    """How many operations a run without a crash takes."""
    driver = Driver(seed, SimStorage(seed))
    assert run(driver, actions)
    return driver.storage.operations


def recover_through_crashes(driver: Driver, crash_at: int) -> None:
    """Recover with a power loss at an operation of the recovery, then without one."""
    driver.storage.crash_at = crash_at
    try:
        recovered = driver.recover()
    except Crash:
        driver.storage = driver.storage.crash()
        recovered = driver.recover()
    else:
        driver.storage.crash_at = 0
    driver.go_on(recovered)


@pytest.mark.parametrize("number", range(4))
def test_power_loss_at_every_operation(seed: int, number: int) -> None:
    seed += number
    for crash_at in range(1, operations_of(seed, 20) + 1):
        driver = Driver(seed, SimStorage(seed, crash_at=crash_at))
        assert not run(driver, 20)
        driver.storage = driver.storage.crash()
        driver.go_on(driver.recover())


@pytest.mark.parametrize("number", range(3))
def test_power_loss_inside_recovery(seed: int, number: int) -> None:
    seed += number
    for first in range(1, operations_of(seed, 15) + 1, 3):
        for second in range(1, 30):
            driver = Driver(seed, SimStorage(seed, crash_at=first))
            assert not run(driver, 15)
            driver.storage = driver.storage.crash()
            recover_through_crashes(driver, second)
            if driver.storage.operations < second and not driver.storage.crash_at:
                break  # the recovery has fewer operations


@pytest.mark.parametrize("number", range(40))
def test_crash_after_crash(seed: int, number: int) -> None:
    """What lies behind a cut never comes back to life, however often the power goes."""
    choose = random.Random(seed + number)
    driver = Driver(seed + number, SimStorage(seed + number, crash_at=choose.randint(1, 60)))
    for _ in range(5):
        run(driver, choose.randint(1, 12))
        driver.storage = driver.storage.crash()
        driver.storage.crash_at = choose.randint(1, 50)
    driver.storage.crash_at = 0
    driver.go_on(driver.recover())
    driver.work(3)
    while driver.rollback:
        driver.end_rollback()
    assert driver.writer is not None
    driver.writer.close()
    recovered = driver.recover()
    assert recovered.clean
    assert recovered.lost is None
    driver.go_on(recovered)


def test_process_death_loses_nothing(seed: int) -> None:
    for crash_at in range(1, operations_of(seed, 20) + 1):
        driver = Driver(seed, SimStorage(seed, crash_at=crash_at))
        assert not run(driver, 20)
        last = driver.writer.last_seq if driver.writer else 0
        durable = driver.writer.durable if driver.writer else 0
        driver.storage = driver.storage.kill()
        recovered = driver.recover(durable_hint=durable)
        assert recovered.start.segment.header.cut >= last
        assert recovered.lost is None or recovered.lost.first_seq > last
        driver.go_on(recovered)
        # All of it was made durable again: the power may go now.
        driver.storage = driver.storage.crash()
        again = driver.recover()
        assert again.start.segment.header.cut >= last
        driver.go_on(again)


@pytest.mark.parametrize("evict", [False, True], ids=["cached", "evicted"])
def test_failed_sync_poisons_until_recovered(seed: int, evict: bool) -> None:
    """After a failed sync the kernel calls the pages clean: syncing again would prove nothing."""
    for failing in range(2, 12):
        driver = Driver(seed, SimStorage(seed))
        driver.go_on(driver.recover())
        assert driver.writer is not None
        driver.writer.spares.count = 0  # a failed sync of one of those is no harm
        driver.storage.faults["sync", driver.storage.counts["sync"] + failing] = errno.EIO
        with pytest.raises(Poisoned):
            driver.work(400)
        writer = driver.writer
        assert writer is not None
        durable = writer.durable
        assert durable == driver.synced
        with pytest.raises(Poisoned):
            writer.sync()
        with pytest.raises(Poisoned):
            driver.append(1)
        driver.storage = driver.storage.kill(evict=evict)
        recovered = driver.recover(durable_hint=durable)
        driver.go_on(recovered)
        kept = recovered.durable
        driver.storage = driver.storage.crash()
        again = driver.recover()
        assert again.start.segment.header.cut >= kept
        driver.go_on(again)


def test_failed_sync_of_the_directory_poisons(seed: int) -> None:
    driver = Driver(seed, SimStorage(seed))
    driver.go_on(driver.recover())
    driver.storage.faults["sync_dir", driver.storage.counts["sync_dir"] + 1] = errno.EIO
    with pytest.raises(Poisoned):
        driver.work(400)
    driver.storage = driver.storage.kill()
    driver.go_on(driver.recover(durable_hint=driver.synced))


def test_no_space_appends_nothing(seed: int) -> None:
    driver = Driver(seed, SimStorage(seed, space=400_000))
    driver.go_on(driver.recover())
    driver.work(300)
    assert driver.full > 5
    driver.storage.space = 1 << 40
    full = driver.full
    driver.work(50)
    assert driver.full == full
    driver.storage = driver.storage.crash()
    driver.storage.space = 1 << 40
    driver.go_on(driver.recover())


def test_no_space_for_recovery_changes_nothing(seed: int) -> None:
    """It fails, says so, and works once there is space; nothing is lost by the attempt."""
    driver = Driver(seed, SimStorage(seed))
    driver.go_on(driver.recover())
    for _ in range(12):
        driver.append(2)
    durable = driver.synced
    driver.storage = driver.storage.kill()
    driver.storage.space = driver.storage.used() + 10_000
    with pytest.raises(JournalFull):
        driver.recover(durable_hint=durable)
    assert not [name for name in driver.storage.live if name.endswith(".tmp")]
    driver.storage.space = 1 << 40
    recovered = driver.recover(durable_hint=durable)
    assert recovered.lost is None
    driver.go_on(recovered)


def test_failed_sync_in_recovery_is_reported(seed: int) -> None:
    for failing in range(1, 5):
        driver = Driver(seed, SimStorage(seed))
        driver.go_on(driver.recover())
        driver.append(5)
        driver.append(5)
        durable = driver.synced
        driver.storage = driver.storage.kill()
        driver.storage.faults["sync", failing] = errno.EIO
        try:
            recovered = driver.recover(durable_hint=durable)
        except Poisoned:
            driver.storage = driver.storage.kill(evict=True)
            recovered = driver.recover(durable_hint=durable)
        driver.go_on(recovered)
        driver.storage = driver.storage.crash()
        driver.go_on(driver.recover())


def test_recovery_is_idempotent(seed: int) -> None:
    """Recovering an unclean end again and again adds a crash record each time, and nothing else."""
    driver = Driver(seed, SimStorage(seed, crash_at=50))
    run(driver, 100)
    driver.storage = driver.storage.crash()
    driver.go_on(driver.recover())
    before = {seq: r for seq, r in read_all(driver.storage, driver.synced).items() if r.kind < 16}
    for _ in range(3):
        files = len(driver.storage.live)
        driver.go_on(driver.recover())
        now = {seq: r for seq, r in read_all(driver.storage, driver.synced).items() if r.kind < 16}
        assert now == before
        assert len(driver.storage.live) == files + 1  # its crash record needs a segment
    writer = driver.writer
    assert writer is not None
    writer.close()
    for _ in range(3):
        recovered = driver.recover()
        assert recovered.clean
        driver.go_on(recovered)
        RedoWriter(
            driver.storage, DISK, recovered.start, segment_bytes=SEGMENT_BYTES,
            identity=lambda: driver.random.randbytes(16),
        ).close()  # fmt: skip
    assert len(driver.storage.live) <= files + 2  # segments without records do not pile up
