"""Which rows are duplicates, which are held out and which are taken twice: arithmetic on 8-byte hashes.

`training.data.prepare` hashes a row once while it is read. Everything here depends on content and seed alone, and needs
no more memory than a few numbers per row.
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
    """Of a first user message; the same whatever its case and whitespace."""
    return _hash([" ".join(unicodedata.normalize("NFKC", text).casefold().split())])


def hash_content(texts: Iterable[str]) -> int:
    """Of all that a row says; the same whatever its whitespace."""
    return _hash(" ".join(unicodedata.normalize("NFC", text).split()) for text in texts)


def repeats(contents: Hashes) -> tuple[Mask, Index]:
    """Which rows say the same as an earlier one, and for each row the first that says the same."""
    _, first, inverse = np.unique(contents, return_index=True, return_inverse=True)
    earliest = first[inverse].astype(np.int64)
    return earliest != np.arange(len(contents)), earliest


def hold_out(openings: Hashes, held_out: float, seed: int) -> Mask:
    """Choose the rows to hold out, by a hash of their first user message.

    Rows with the same first message stay on one side, so no held-out question was trained on. Groups of such rows have
    an order that `seed` chooses, large ones late, and are held out from its start: below 1, `held_out` is a share of
    the rows into which they fit; from 1 on a number of rows, and they are held out until there are at least so many.
    Either way, more of it holds out the same rows and more. 0 holds out nothing.

    Raises:
        DatasetError: there are too few different rows for one on each side, or for the number.
    """
    if held_out == 0:
        return np.zeros(len(openings), dtype=bool)
    if held_out >= max(1, len(openings)):
        raise DatasetError(
            f"data.held_out is {held_out:.0f} and there are {len(openings)} rows, so none would be left to train on: "
            "lower it, or write a share such as 0.1"
        )
    groups, group_of, sizes = np.unique(mixed(openings, seed), return_inverse=True, return_counts=True)
    if len(groups) < 2:
        raise DatasetError(
            f"{len(openings)} conversations with {len(groups)} different first user messages cannot be split into "
            "training and held-out rows: add different ones, or set data.held_out to 0"
        )
    order = np.argsort(groups.astype(np.float64) * sizes, kind="stable")
    smallest = order[np.argmin(sizes[order])]
    order = np.concatenate([[smallest], order[order != smallest]])  # it is held out even where nothing fits
    num_rows = np.cumsum(sizes[order])  # [num_groups], of the groups up to each
    if held_out < 1:
        room = min(max(1, round(held_out * len(openings))), len(openings) - 1)
        num_chosen = max(1, int(np.searchsorted(num_rows, room, side="right")))
    else:
        num_chosen = int(np.searchsorted(num_rows, held_out, side="left")) + 1
    if num_chosen == len(groups):
        raise DatasetError(
            f"data.held_out is {held_out:.0f} of {len(openings)} rows, and conversations with the same first user "
            f"message stay together, so none would be left to train on: set it to {num_rows[-2]} or less"
        )
    chosen = np.zeros(len(groups), dtype=bool)
    chosen[order[:num_chosen]] = True
    mask: Mask = chosen[group_of]
    return mask


def repeat_by_weight(index: Index, contents: Hashes, weight: float, seed: int) -> Index:
    """Row numbers of one source, `round(weight * len(index))` of them: whole copies, and a seeded part of one more."""
    copies, more = divmod(round(weight * len(index)), len(index)) if len(index) else (0, 0)
    order = np.argsort(mixed(contents[index], seed), kind="stable")
    return np.concatenate([*([index] * copies), np.sort(index[order[:more]])])


def mixed(hashes: Hashes, seed: int) -> Hashes:
    """Other hashes for every seed: its own is added, then splitmix64's finaliser (doi:10.1145/2660193.2660195)."""
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
