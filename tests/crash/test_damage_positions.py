"""Damage at every structural position of every kind of file: never served, never silent.

Of a small but complete journal each word that means something gets a bit flipped, each sector and
page is zeroed, each page cannot be read, each file is gone; one at a time. Then both who live on
(readers, scrub) and who start anew (recovery, the curator) must find every openable point as it
was, or say what is lost: file, offset, seqs, never more than what was hit.

`CDP_CRASH_FULL=1` (`make test-crash`) tries all positions, else it is a seeded sample of them.
"""

from __future__ import annotations

import collections
import os
import random
from pathlib import Path

import pytest

from journal.format import Kind
from replay.scrub import Damage, Effect, Scrub
from tests.crash.damage_positions import Hurt, Map, Region, sample
from tests.crash.damage_world import BLOCKS, Frozen, Patient, Seen, freeze

pytestmark = [pytest.mark.crash, pytest.mark.expect_log(".", required=False)]

FULL = os.environ.get("CDP_CRASH_FULL") == "1"
SAMPLE = 80
POINTS = 6  # that are read of each patient, of the openable ones
PARTS = 20  # of the full run, each a test


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Frozen:
    return freeze(tmp_path_factory.mktemp("frozen"), 1)


class Judge:
    """Looks at one patient after the other."""

    def __init__(self, frozen: Frozen, places: Map, root: Path, seed: int) -> None:
        self.frozen, self.map, self.root = frozen, places, root
        self.random = random.Random(seed)
        self.classes: collections.Counter[str] = collections.Counter()
        self.number = 0
        self.newest = max(name for name in frozen.files if name.startswith("redo/0"))

    def judge(self, hurt: Hurt) -> None:
        """
        :raises AssertionError: it was served, or cost more than it should, or nobody said so.
        """
        regions = self.map.at(hurt)
        points = self._points(regions)
        lives_on = self._lives_on(hurt, regions, points)
        points -= self._untold(hurt, regions)
        starts = self._starts(hurt, regions, points)
        verdict = max(lives_on, starts, key=("harmless", "repaired", "reported").index)
        self.classes[verdict] += 1

    def _untold(self, hurt: Hurt, regions: list[Region]) -> set[int]:
        """Seqs that no start can know to have been durable: at once with the newest records all is
        hit that says so, or the newest file left no trace, not even its name.
        """
        told = [region for region in regions if region.kind == "batch" and not region.seqs]
        if hurt.file != self.newest or not (told or hurt.kind == "gone"):
            return set()
        return {seq for region in regions for seq in region.seqs}

    def _points(self, regions: list[Region]) -> set[int]:
        """Those just around what was hit, and some others."""
        seqs = {seq + step for each in regions for seq in each.seqs[:3] for step in (-1, 0, 1)}
        near = sorted(seqs & set(self.frozen.points))
        chosen = set(self.random.sample(near, min(len(near), POINTS // 2)))
        chosen |= set(self.random.sample(self.frozen.points, POINTS - len(chosen)))
        return chosen

    def _patient(self, hurt: Hurt) -> Patient:
        self.number += 1
        damage = {hurt.file: hurt.done(self.frozen.content(hurt.file))}
        if hurt.kind == "unreadable":
            damage = {}
        patient = Patient(self.frozen, self.root / f"{self.number}", damage)
        if hurt.kind == "unreadable":
            patient.sim.bad_pages.add((hurt.file, hurt.at // 4096))
        return patient

    def _lives_on(self, hurt: Hurt, regions: list[Region], points: set[int]) -> str:
        patient = self._patient(hurt)
        try:
            patient.alive()
            seen = patient.look(points)
            scrub = patient.scrub()
            self._check(f"{hurt}, alive", hurt, regions, seen, scrub)
            return "reported" if _lost(scrub) else "harmless"
        finally:
            patient.close()

    def _starts(self, hurt: Hurt, regions: list[Region], points: set[int]) -> str:
        patient = self._patient(hurt)
        try:
            patient.start()
            scrub = self._look(f"{hurt}, started", hurt, regions, points, patient)
            self._check_live(hurt, regions, patient, scrub)
            patient.work()
            after = self._look(f"{hurt}, at work", hurt, regions, points, patient)
            patient.restart()
            again = self._look(f"{hurt}, started again", hurt, regions, points, patient)
            self._check_live(hurt, regions, patient, again)
            if any(map(_lost, (scrub, after, again))):
                return "reported"
            return "repaired" if scrub.damaged and not after.damaged else "harmless"
        finally:
            patient.close()

    def _look(
        self, what: str, hurt: Hurt, regions: list[Region], points: set[int], patient: Patient
    ) -> Scrub:
        """Every point is there, as it was, or refused for a reason that is told."""
        missing = points - patient.openable()
        assert not missing, f"{what}: {missing} are not openable any more"
        seen = patient.look(points & patient.openable())
        scrub = patient.scrub()
        self._check(what, hurt, regions, seen, scrub)
        return scrub

    def _check(
        self, what: str, hurt: Hurt, regions: list[Region], seen: Seen, scrub: Scrub
    ) -> None:
        assert not seen.wrong, f"{what}: served {seen.wrong[0]}"
        lost = _lost(scrub)
        explained = {
            (seq, block) for seq, block in seen.refused
            if any(self._concerns(each, seq, block) for each in lost)
        }  # fmt: skip
        assert seen.refused <= explained, (
            f"{what}: refused {sorted(seen.refused - explained)}, reported {scrub.damaged}"
        )
        hit = {seq for region in regions if region.needed for seq in region.seqs}
        both = {region.kind for region in regions} & {"batch", "footer", "trailer"}
        if len(both) > 1 or hurt.kind == "gone":
            hit |= {seq for region in regions for seq in region.seqs}
        assert bool(lost) <= bool(hit), f"{what}: nothing was lost, reported {lost}"
        for each in lost:
            assert each.file == hurt.file, f"{what}: reported {each}"
            assert each.last_seq, f"{what}: no seqs in {each}"
            if each.file.startswith("redo/"):
                reported = (
                    set(range(each.first_seq, each.last_seq + 1)) & self.frozen.versions.keys()
                )
                assert reported <= hit, f"{what}: reported {each}, hit {sorted(hit)}"

    def _concerns(self, damage: Damage, seq: int, block: int) -> bool:
        """Whether what is damaged may be what a block is made of at a point."""
        version = self.frozen.version(block, seq)
        record = self.frozen.versions.get(version)
        if damage.file.startswith("undo/"):
            if record is not None and record.kind == Kind.REF and seq >= damage.last_seq:
                return self._concerns(damage, record.arg, block)
            return seq < damage.last_seq
        if damage.first_seq <= version <= damage.last_seq:
            return True
        if (
            record is not None
            and record.kind == Kind.REF
            and self._concerns(damage, record.arg, block)
        ):
            return True
        # Of a record that is not known at all nobody can say which blocks it was about.
        unknown = damage.what not in ("checksum mismatch", "cannot be read")
        return unknown and damage.first_seq <= seq and version <= damage.last_seq

    def _check_live(
        self, hurt: Hurt, regions: list[Region], patient: Patient, scrub: Scrub
    ) -> None:
        expected = self.frozen.model[self.frozen.durable]
        assert expected is not None
        if self._untold(hurt, regions):
            return
        for block, value in patient.live():
            if value is None:
                assert _lost(scrub), f"{hurt}: block {block} cannot be read, nothing reported"
            else:
                assert value == expected[block], f"{hurt}: block {block} is {value} to clients"


def _lost(scrub: Scrub) -> list[Damage]:
    return [each for each in scrub.damaged if each.effect is Effect.LOST]


def run(frozen: Frozen, places: list[Hurt], root: Path, seed: int) -> collections.Counter[str]:
    """Judge all of them; every failure is told."""
    judge = Judge(frozen, Map(frozen), root, seed)
    failures = []
    for hurt in places:
        try:
            judge.judge(hurt)
        except Exception as error:
            failures.append(f"{hurt}: {type(error).__name__}: {str(error)[:600]}")
    print(f"{len(places)} positions: {dict(judge.classes)}")
    assert not failures, f"{len(failures)} of {len(places)}:\n" + "\n".join(failures[:20])
    return judge.classes


def test_a_whole_journal_is_whole(frozen: Frozen, tmp_path: Path) -> None:
    patient = Patient(frozen, tmp_path / "p", {})
    patient.alive()
    assert patient.look(set(frozen.points)) == Seen(set(frozen.points))
    assert patient.scrub().damaged == []
    patient.close()
    patient = Patient(frozen, tmp_path / "p", {})
    patient.start()
    assert patient.openable() == set(frozen.points)
    expected = frozen.model[frozen.durable]
    assert expected is not None
    assert list(patient.live()) == list(enumerate(expected))
    patient.work()
    assert patient.look(set(frozen.points)) == Seen(set(frozen.points))
    assert patient.scrub().damaged == []
    patient.close()
    assert len(expected) == BLOCKS


@pytest.mark.skipif(FULL, reason="all of them are tried")
def test_a_sample_of_positions(frozen: Frozen, tmp_path: Path, seed: int) -> None:
    places = sample(Map(frozen).all(seed), SAMPLE, seed)
    classes = run(frozen, places, tmp_path, seed)
    assert set(classes) == {"harmless", "repaired", "reported"}


@pytest.mark.skipif(not FULL, reason="CDP_CRASH_FULL=1 tries them")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("part", range(PARTS))
def test_all_positions(frozen: Frozen, tmp_path: Path, part: int) -> None:
    places = Map(frozen).all(part)
    assert len(places) >= 10_000
    run(frozen, places[part::PARTS], tmp_path, part)


def test_the_end_of_the_log_is_missed_by_those_who_live(frozen: Frozen, tmp_path: Path) -> None:
    """! With the newest segment gone a reader took the newest of what was left for the answer."""
    newest = max(name for name in frozen.files if name.startswith("redo/0"))
    patient = Patient(frozen, tmp_path / "p", {newest: None})
    patient.alive()
    seen = patient.look({frozen.durable})
    assert seen.wrong == []
    assert len(seen.refused) == BLOCKS
    (lost,) = _lost(patient.scrub())
    assert (lost.file, lost.last_seq) == (newest, frozen.durable)
    patient.close()
