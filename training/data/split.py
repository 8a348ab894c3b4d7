"""Which rows are duplicates, which are held out and which are repeated: arithmetic on 8-byte hashes.

Each row is hashed once, when it is read. Results depend on content and seed alone; memory is a few numbers per row.
"""

import hashlib
import unicodedata
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from training.errors import DatasetError

Hashes = NDArray[np.uint64]
Mask = NDArray[np.bool_]
Index = NDArray[np.int64]


def hash_opening(text: str) -> int:
    """Hash a first user message, ignoring case and whitespace."""
    return _hash([" ".join(unicodedata.normalize("NFKC", text).casefold().split())])


def hash_content(texts: Iterable[str]) -> int:
    """Hash all texts of a row, ignoring whitespace."""
    return _hash(" ".join(unicodedata.normalize("NFC", text).split()) for text in texts)


def find_duplicates(contents: Hashes) -> tuple[Mask, Index]:
    """Which rows have the content of an earlier row, and for each row the first with its content."""
    _, first, inverse = np.unique(contents, return_index=True, return_inverse=True)
    first_copy = first[inverse].astype(np.int64)
    return first_copy != np.arange(len(contents)), first_copy


def hold_out(openings: Hashes, held_out: float, seed: int) -> Mask:
    """Choose the rows to hold out, by a hash of their first user message.

    Rows with the same first message form a group and stay on one side, so no held-out question is trained on. Groups
    are put in an order that depends on `seed`, large ones towards the end, and held out from its start. Below 1,
    `held_out` is a fraction of the rows, which the held-out rows do not exceed; from 1 on it is a number of rows, and
    groups are held out until it is reached. A larger `held_out` holds out the same rows and more. 0 holds out nothing.

    Raises:
        DatasetError: there are too few different rows for one on each side, or for the number.
    """
    if held_out == 0:
        return np.zeros(len(openings), dtype=bool)
    if held_out >= max(1, len(openings)):
        raise DatasetError(
            f"data.held_out is {held_out:.0f}, but there are only {len(openings)} rows, which leaves none to train on: "
            "lower it, or give a fraction such as 0.1"
        )
    groups, group_of, sizes = np.unique(seeded_hashes(openings, seed), return_inverse=True, return_counts=True)
    if len(groups) < 2:
        raise DatasetError(
            f"{len(openings)} conversations with {len(groups)} different first user messages cannot be split into "
            "training and held-out rows: add different ones, or set data.held_out to 0"
        )
    order = np.argsort(groups.astype(np.float64) * sizes, kind="stable")
    smallest = order[np.argmin(sizes[order])]
    order = np.concatenate([[smallest], order[order != smallest]])  # held out even if no group fits the fraction
    num_rows = np.cumsum(sizes[order])  # [num_groups], rows of all groups up to this one
    if held_out < 1:
        max_rows = min(max(1, round(held_out * len(openings))), len(openings) - 1)
        num_held_out = max(1, int(np.searchsorted(num_rows, max_rows, side="right")))
    else:
        num_held_out = int(np.searchsorted(num_rows, held_out, side="left")) + 1
    if num_held_out == len(groups):
        raise DatasetError(
            f"data.held_out is {held_out:.0f} of {len(openings)} rows, but conversations with the same first user "
            f"message stay together, which leaves none to train on: set it to {num_rows[-2]} or less"
        )
    is_held_out = np.zeros(len(groups), dtype=bool)
    is_held_out[order[:num_held_out]] = True
    mask: Mask = is_held_out[group_of]
    return mask


def repeat_by_weight(index: Index, contents: Hashes, weight: float, seed: int) -> Index:
    """`round(weight * len(index))` row numbers of one source: complete copies of `index`, then a seeded part of it."""
    num_copies, remainder = divmod(round(weight * len(index)), len(index)) if len(index) else (0, 0)
    order = np.argsort(seeded_hashes(contents[index], seed), kind="stable")
    return np.concatenate([*([index] * num_copies), np.sort(index[order[:remainder]])])


def seeded_hashes(hashes: Hashes, seed: int) -> Hashes:
    """Rehash with a seed: add the seed's own hash, then splitmix64's finalizer (doi:10.1145/2660193.2660195)."""
    salt = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest())
    value = hashes + np.uint64(salt)  # wraps around
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(value ^ (value >> np.uint64(31)), dtype=np.uint64)


def _hash(texts: Iterable[str]) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        content = text.encode(errors="surrogatepass")
        digest.update(len(content).to_bytes(8))
        digest.update(content)
    return int.from_bytes(digest.digest())
