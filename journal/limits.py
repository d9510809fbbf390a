"""Limits of the journal, units last, and the relations between them that other code relies on.

Bytes unless the name says otherwise. What a limit protects is said beside it; raising one means
reading that first.
"""

from __future__ import annotations

from typing import Final

from journal.format import (
    ALIGN,
    BATCH_HEADER,
    BLOCK,
    ENTRY,
    FOOTER_HEADER,
    HEADER_PAGE,
    SEGMENT_ID_MAX,
    SUM_LARGE,
    TRAILER,
)

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

# ------------------------------------------------------------------------------------- segments
# Small ones are for tests and tiny disks. Of large ones a reclaim copies more at once, and the
# offsets inside must fit the index.
SEGMENT_BYTES_MIN: Final = 1 * MIB
SEGMENT_BYTES_DEFAULT: Final = 64 * MIB
SEGMENT_BYTES_MAX: Final = 256 * MIB

# What one append may carry: the recorder's receive buffer bounds it in practice.
BATCH_RECORDS_MAX: Final = 1 << 16
# A record with content; zeroes and trims carry none and may cover 4 GiB.
RECORD_BYTES_MAX: Final = 32 * MIB
CONTROL_BODY_BYTES_MAX: Final = 64 * KIB
# A batch that fits no segment gets one of its own; readers take no larger table for believable.
BATCH_PAYLOAD_BYTES_MAX: Final = 64 * MIB

# ----------------------------------------------------------------------------------------- tail
# Work that may wait for apply: what must be saved and what must be written.
TAIL_BYTES_MIN: Final = 64 * MIB
TAIL_BYTES_DEFAULT: Final = 1 * GIB
# Appended and not yet durable: a recovery copies that much before the disk is served again.
TAIL_UNSYNCED_BYTES_MAX: Final = 256 * MIB

# --------------------------------------------------------------------------------------- undo log
UNDO_SEGMENT_BYTES_DEFAULT: Final = 64 * MIB
# One append of before-images. Apply and reclaim work in slices of about this size.
UNDO_BATCH_BYTES_MAX: Final = 16 * MIB
# `undo_published` of the frontier: segment in the upper 28 bits, offset / ALIGN in the lower 36.
UNDO_POSITION_BITS: Final = 36

# ---------------------------------------------------------------------------------------- catalog
CATALOG_ALIGN: Final = 512  # entries begin at multiples of this
CATALOG_FILE_BYTES_MIN: Final = 1 * MIB
CATALOG_FILE_STATES_MIN: Final = 4  # a file holds this many times the state before it is compacted
# Room behind the state when there is no space for more.
CATALOG_FILE_BYTES_TIGHT: Final = 64 * KIB
CATALOG_ENTRY_BYTES_MAX: Final = 64 * MIB  # a state with some 300,000 bookmarks

# ----------------------------------------------------------------------------------------- caches
# Segment files of one follower; a process has two. One that is mapped takes two descriptors, and of
# what was read of it 1/512 of memory for the kernel's page tables.
FILES_OPEN_MAX: Final = 256
TABLE_ROWS_CACHED_MAX: Final = 4_000_000  # rows of 40 bytes in a follower's cache
TABLE_ROWS_RESTING_MAX: Final = 200_000  # of them, while nobody reads

# ------------------------------------------------------------------------- relations relied upon
assert SEGMENT_BYTES_MIN <= SEGMENT_BYTES_DEFAULT <= SEGMENT_BYTES_MAX
assert SEGMENT_BYTES_MAX < 1 << 32, "the index keeps a row's number in 32 bits"
assert SEGMENT_BYTES_MAX // ENTRY.size < 1 << 32
assert HEADER_PAGE + BATCH_HEADER.size + FOOTER_HEADER.size + TRAILER.size <= SEGMENT_BYTES_MIN
assert RECORD_BYTES_MAX % SUM_LARGE == 0 == RECORD_BYTES_MAX % BLOCK
assert RECORD_BYTES_MAX < 1 << 32, "payload lengths are counted in blocks of a 32-bit field"
assert CONTROL_BODY_BYTES_MAX <= RECORD_BYTES_MAX <= BATCH_PAYLOAD_BYTES_MAX
assert UNDO_BATCH_BYTES_MAX <= BATCH_PAYLOAD_BYTES_MAX
assert UNDO_BATCH_BYTES_MAX < UNDO_SEGMENT_BYTES_DEFAULT <= SEGMENT_BYTES_MAX
# A tail of one segment could never be reclaimed while the next one fills.
assert TAIL_UNSYNCED_BYTES_MAX < TAIL_BYTES_DEFAULT
assert TAIL_BYTES_MIN <= TAIL_BYTES_DEFAULT
assert RECORD_BYTES_MAX < TAIL_UNSYNCED_BYTES_MAX, "a record must fit the tail"
assert RECORD_BYTES_MAX <= TAIL_BYTES_MIN
# The largest segment number and the largest offset fit one 8-byte store.
assert SEGMENT_ID_MAX <= 1 << (64 - UNDO_POSITION_BITS)
assert (SEGMENT_BYTES_MAX + BATCH_PAYLOAD_BYTES_MAX) // ALIGN < 1 << UNDO_POSITION_BITS
assert CATALOG_ALIGN <= CATALOG_FILE_BYTES_TIGHT < CATALOG_FILE_BYTES_MIN
assert CATALOG_FILE_STATES_MIN >= 2, "or compactions would cost more than commits"
assert TABLE_ROWS_RESTING_MAX <= TABLE_ROWS_CACHED_MAX
assert CATALOG_ENTRY_BYTES_MAX < 1 << 32, "an entry's length is a 32-bit field"
