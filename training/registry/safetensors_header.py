"""The header of a safetensors file, read without the library and without trusting it.

Every offset is checked against the file before anything is read at it.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NoReturn

from training.errors import AdapterRefused

_MAX_HEADER_BYTES = 10_000_000  # the format allows 100 MB; a LoRA of 80 layers needs 200 kB
_FORMATS = {  # dtype: (bytes per value, bits that are all set in NaN and Inf only)
    "F32": (4, 0x7F800000),
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors header; `start` and `end` count from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, whose data fill the rest of the file without gap or overlap.

    Raises:
        AdapterRefused: the header is too large, not what the format says, or leads outside the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            refuse(path, f"is cut off: {size} bytes, of which the header alone would take {length + 8}")
        if length > _MAX_HEADER_BYTES:
            refuse(path, f"has a header of {length} bytes, at most {_MAX_HEADER_BYTES} are read")
        header = read_json(path, file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        refuse(path, f"has metadata {shortened(metadata)} where the format knows only texts by name")
    entries = {name: _tensor_entry(path, name, fields, 8 + length) for name, fields in header.items()}
    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            refuse(path, f"has a {'gap' if entry.start > position else 'overlap'} in its data before {name!r:.120}")
        position = entry.end
    if position != size:
        refuse(path, f"holds {size} bytes, its header describes {position}")
    return entries


def zero_tensors(path: Path, entries: Iterable[tuple[str, TensorEntry]]) -> set[str]:
    import numpy as np

    zero = set()
    data = np.memmap(path, dtype=np.uint8, mode="r")
    for name, entry in entries:
        width, exponent = _FORMATS[entry.dtype]
        values = np.frombuffer(data[entry.start : entry.end].tobytes(), dtype=f"<u{width}")
        bad = (values & exponent) == exponent
        if bad.any():
            refuse(path, f"has {int(bad.sum())} NaN or infinite values in {name!r}: the training run diverged")
        sign = 1 << (8 * width - 1)
        if not (values & (sign - 1)).any():
            zero.add(name)
    return zero


def _tensor_entry(path: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    match fields:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]} if len(fields) == 3:
            pass
        case _:
            refuse(path, f"describes {name!r:.120} in a way that the format does not know: {shortened(fields)}")
    if dtype not in _FORMATS:
        refuse(path, f"has {name!r:.120} in {shortened(dtype)}: only {', '.join(_FORMATS)} are read")
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in (*shape, start, end)) or len(shape) > 2:
        refuse(path, f"gives {name!r:.120} the shape {shortened(shape)} and the place {shortened([start, end])}")
    needed = math.prod(shape) * _FORMATS[dtype][0]
    if end - start != needed:
        refuse(path, f"gives {name!r:.120} {end - start} bytes, {dtype} of shape {shortened(shape)} takes {needed}")
    return TensorEntry(dtype, tuple(shape), data_start + start, data_start + end)


def read_json(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise ValueError("a key is given twice")
        return fields

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a JSON number")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except RecursionError:
        refuse(path, "is nested too deeply")
    except ValueError as error:
        refuse(path, f"is not the JSON it should be: {str(error)[:120]}")
    if not isinstance(value, dict):
        refuse(path, f"holds {shortened(value)} where a JSON object belongs")
    return value


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def refuse(path: PurePath, reason: str) -> NoReturn:
    raise AdapterRefused(f"{path} {reason}")
