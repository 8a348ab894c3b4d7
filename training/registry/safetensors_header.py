"""Reads the header of an untrusted safetensors file, without the safetensors library.

Every offset is checked against the file's size before it is used.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NoReturn

from training.errors import AdapterRefused

_MAX_HEADER_BYTES = 10_000_000  # the format allows 100 MB; a LoRA of 80 layers needs 200 kB
_FORMATS = {  # dtype: (bytes per value, exponent bits: all set only in NaN and Inf)
    "F32": (4, 0x7F800000),
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors header; `start` and `end` are byte offsets from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, by name; their data must fill the file without gap or overlap.

    Raises:
        AdapterRefused: the header is too large or invalid, or an offset is outside the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            refuse(path, f"is truncated: it has {size} bytes, but its header alone needs {length + 8}")
        if length > _MAX_HEADER_BYTES:
            refuse(path, f"has a header of {length} bytes, the limit is {_MAX_HEADER_BYTES}")
        header = read_json(path, file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        refuse(path, f"has metadata {shortened(metadata)}, but the format allows only string values by name")
    entries = {name: _tensor_entry(path, name, fields, 8 + length) for name, fields in header.items()}
    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            refuse(path, f"has a {'gap' if entry.start > position else 'overlap'} in its data before {name!r:.120}")
        position = entry.end
    if position != size:
        refuse(path, f"has {size} bytes, but its header describes {position}")
    return entries


def zero_tensors(path: Path, entries: Iterable[tuple[str, TensorEntry]]) -> set[str]:
    """The names of tensors that are all zeros.

    Raises:
        AdapterRefused: a tensor has NaN or infinite values.
    """
    import numpy as np

    names = set()
    data = np.memmap(path, dtype=np.uint8, mode="r")
    for name, entry in entries:
        width, exponent_mask = _FORMATS[entry.dtype]
        values = np.frombuffer(data[entry.start : entry.end].tobytes(), dtype=f"<u{width}")
        not_finite = (values & exponent_mask) == exponent_mask
        if not_finite.any():
            refuse(path, f"has {int(not_finite.sum())} NaN or infinite values in {name!r}: the training run diverged")
        sign_bit = 1 << (8 * width - 1)
        if not (values & (sign_bit - 1)).any():  # -0.0 counts as zero
            names.add(name)
    return names


def _tensor_entry(path: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    match fields:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]} if len(fields) == 3:
            pass
        case _:
            refuse(path, f"has an invalid entry for {name!r:.120}: {shortened(fields)}")
    if dtype not in _FORMATS:
        refuse(path, f"has {name!r:.120} in {shortened(dtype)}: only {', '.join(_FORMATS)} are supported")
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in (*shape, start, end)) or len(shape) > 2:
        refuse(path, f"has {name!r:.120} with invalid shape {shortened(shape)} or offsets {shortened([start, end])}")
    needed = math.prod(shape) * _FORMATS[dtype][0]
    if end - start != needed:
        refuse(
            path, f"has {end - start} bytes for {name!r:.120}, but {dtype} of shape {shortened(shape)} takes {needed}"
        )
    return TensorEntry(dtype, tuple(shape), data_start + start, data_start + end)


def read_json(path: Path, text: bytes) -> dict[str, Any]:
    """Parse strict JSON: an object without duplicate keys, NaN or infinities.

    Raises:
        AdapterRefused: `text` is anything else; the message names `path`.
    """

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise ValueError("duplicate key")
        return fields

    def reject_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a JSON number")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=reject_constant)
    except RecursionError:
        refuse(path, "is nested too deeply")
    except ValueError as error:
        refuse(path, f"is not valid JSON: {str(error)[:120]}")
    if not isinstance(value, dict):
        refuse(path, f"has {shortened(value)}, expected a JSON object")
    return value


def shortened(value: Any) -> str:
    """The repr of `value`, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def refuse(path: PurePath, reason: str) -> NoReturn:
    """Raise AdapterRefused with `path` and `reason`."""
    raise AdapterRefused(f"{path} {reason}")
