"""Raw rows -> a row store: parses, tokenizes, counts and writes them in one stream.

At most a few hundred rows are in memory at a time.
"""

import bisect
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Literal

from training.chat.chat_format import ChatFormat, Rendered
from training.chat.messages import Message
from training.config.data_config import DataConfig, DataSource, RowKind
from training.data.examples import BadRow, Dialog, Example, PreferencePair, TextExample, UnpairedExample
from training.data.formats import ACCEPTED, parse_row
from training.data.report import LISTED, ReadFacts, RowNote
from training.data.row_store import StoredRow, StoreWriter, trained_spans
from training.data.sources import RawRow, read_rows, sha256_of, source_files
from training.data.split import hash_content, hash_opening
from training.errors import ChatFormatError, DatasetError

_CHUNK_ROWS = 256  # tokenized in one call, which uses all cores
_MARKUP = re.compile(
    r"<\|(im_start|im_end|eot_id|start_header_id|end_of_text|endoftext|begin_of_text)\|>|\[/?INST\]|<</?SYS>>|</s>"
)


def read_into(
    directory: Path, config: DataConfig, chat_format: ChatFormat, *, kind: RowKind, max_length: int
) -> ReadFacts:
    """Write every usable row of `config.sources` into a store in `directory`, which must exist.

    Raises:
        DatasetError: a source cannot be read, or `on_bad_row` or `on_too_long` makes a row an error.
    """
    builder = StoreBuilder(config, chat_format, kind, max_length)
    limits = _limits(config)
    with StoreWriter(directory) as store:
        for position, source in enumerate(config.sources):
            rows = itertools.islice(read_rows(source), limits.get(position))
            while chunk := [*itertools.islice(rows, _CHUNK_ROWS)]:
                for row in builder.stored_rows(position, source, chunk):
                    store.append(row)
    return builder.read_facts()


def _limits(config: DataConfig) -> dict[int, int]:
    """Rows to read per source: `max_rows` in equal shares; what a short source leaves goes to the longer ones."""
    if config.max_rows is None:
        return {}
    training = config.sources[: len(config.path)]
    if len(training) == 1:  # no need to count its rows
        return {0: config.max_rows}
    counts = [sum(1 for _ in itertools.islice(read_rows(source), config.max_rows)) for source in training]
    limits: dict[int, int] = {}
    for position in sorted(range(len(counts)), key=counts.__getitem__):
        share = (config.max_rows - sum(limits.values())) // (len(counts) - len(limits))
        limits[position] = min(counts[position], share)
    return limits


class StoreBuilder:
    """Turns the raw rows of all sources into stored rows, chunk by chunk, and counts what it sees."""

    def __init__(self, config: DataConfig, chat_format: ChatFormat, kind: RowKind, max_length: int) -> None:
        self.facts = ReadFacts(rows_read=[0] * len(config.sources))
        self._config = config
        self._chat_format = chat_format
        self._kind = kind
        self._max_length = max_length
        self._formats: Counter[str] = Counter()
        self._roles: Counter[str] = Counter()
        self._turns: Counter[int] = Counter()
        self._too_long: Counter[int] = Counter()
        self._unused: Counter[str] = Counter()
        self._files = [source_files(source.path) for source in config.sources]
        self._hub_sha256 = sha256()

    def read_facts(self) -> ReadFacts:
        """The counts, complete once all rows have been read."""
        digest = sha256_of([*itertools.chain(*self._files)])
        if not all(self._files):
            self._hub_sha256.update(digest.encode())
            digest = self._hub_sha256.hexdigest()
        return self.facts.model_copy(
            update={
                "formats": dict(self._formats.most_common()),
                "roles": dict(self._roles.most_common()),
                "unused_keys": dict(self._unused.most_common()),
                "turns": dict(sorted(self._turns.items())),
                "lengths_too_long": dict(sorted(self._too_long.items())),
                "sha256": digest,
            }
        )

    def stored_rows(self, position: int, source: DataSource, chunk: Sequence[RawRow]) -> Iterator[StoredRow]:
        """The usable rows of a chunk; unusable ones raise DatasetError or are skipped and counted."""
        self.facts.rows_read[position] += len(chunk)
        parsed: list[tuple[RawRow, Example]] = []
        for raw in chunk:
            if not self._files[position]:
                self._hub_sha256.update(json.dumps(raw.content, default=str).encode())
            try:
                row = parse_row(raw, source, self._kind)
            except BadRow as bad:
                self._skip_bad(RowNote(source=raw.location, reason=str(bad), excerpt=raw.excerpt))
                continue
            self._formats[row.format] += 1
            self._count_unused(row.unused_keys)
            parsed.append((raw, row.example))
        inputs = [_render_inputs(example) for _, example in parsed]
        results = iter(self._chat_format.render_all([*itertools.chain(*inputs)]))
        for (raw, example), example_inputs in zip(parsed, inputs, strict=True):
            example_results = [next(results) for _ in example_inputs]
            if error := next((r for r in example_results if isinstance(r, ChatFormatError)), None):
                reason = f"not a valid dialog for training: {error}"
                self._skip_bad(RowNote(source=raw.location, reason=reason, excerpt=raw.excerpt))
                continue
            yield from self._to_stored(position, raw, example, [r for r in example_results if isinstance(r, Rendered)])

    def _to_stored(self, position: int, raw: RawRow, example: Example, rendered: list[Rendered]) -> Iterator[StoredRow]:
        if isinstance(example, TextExample):
            yield from self._split_text(position, raw, example, rendered[0])
            return
        length = max(len(one.input_ids) for one in rendered)
        messages = _dialog_of(example)
        truncate = isinstance(example, Dialog) and self._config.on_too_long == "truncate"
        if length > self._max_length and truncate and (prefix := self._truncated(messages)):
            reason = f"{length} tokens: the last {len(messages) - len(prefix[0])} messages are dropped"
            self.facts.num_truncated += 1
            self.facts.note(self.facts.truncated, RowNote(source=raw.location, reason=reason, excerpt=raw.excerpt))
            messages, rendered = prefix[0], [prefix[1]]
            length = len(rendered[0].input_ids)
        if length > self._max_length:
            self._skip_too_long(raw, length)
            return
        self._count_messages(messages)
        tokens, num_trained = _token_lists(example, rendered)
        if isinstance(example, Dialog):
            spans = tokens["spans"]
            self.facts.short_answers += sum(e - b <= 2 for b, e in zip(spans[::2], spans[1::2], strict=True))
        content = [text for message in messages for text in (message.role, *message.texts)]
        # dialogs that differ only in which answers are trained are not duplicates
        content += [f"untrained {at}" for at, m in enumerate(messages) if m.role == "assistant" and not m.trained]
        if isinstance(example, PreferencePair):
            content += example.rejected.texts
        if isinstance(example, UnpairedExample):
            content.append(str(example.label))
        yield StoredRow(
            tokens,
            label=getattr(example, "label", None),
            location=raw.location,
            messages=messages,
            source=position,
            opening=hash_opening(next(message.content for message in messages if message.role == "user")),
            content=hash_content(content),
            length=length,
            num_trained=num_trained,
        )

    def _split_text(self, position: int, raw: RawRow, example: TextExample, rendered: Rendered) -> Iterator[StoredRow]:
        """Split a text that is too long into rows of about the same length; no token is dropped."""
        ids = rendered.input_ids
        num_pieces = -(-len(ids) // self._max_length)
        self.facts.num_split += num_pieces > 1
        self._turns[0] += 1
        bounds = [number * len(ids) // num_pieces for number in range(num_pieces + 1)]
        for start, end in itertools.pairwise(bounds):
            piece = ids[start:end]
            trained = [start + at > 0 for at in range(len(piece))]  # all but the first token of the text
            yield StoredRow(
                {"input_ids": piece, "spans": trained_spans(trained)},
                label=None,
                location=raw.location,
                messages=None,
                source=position,
                opening=hash_opening(example.text),
                content=hash_content([example.text, str(start)]),
                length=len(piece),
                num_trained=sum(trained),
            )

    def _truncated(self, messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], Rendered] | None:
        """The longest prefix that fits and ends with a trained answer to a question; None if there is none."""
        question = next(at for at, message in enumerate(messages) if message.role == "user")
        followers = [*(message.role for message in messages[1:]), ""]
        ends = [at for at, m in enumerate(messages) if at > question and m.learned and followers[at] != "assistant"]

        def rendered_to(end: int) -> Rendered:
            return self._chat_format.render_training(messages[: end + 1])

        num_fit = bisect.bisect_right(ends, self._max_length, key=lambda end: len(rendered_to(end).input_ids))
        return (messages[: ends[num_fit - 1] + 1], rendered_to(ends[num_fit - 1])) if num_fit else None

    def _count_messages(self, messages: Sequence[Message]) -> None:
        self._roles.update(message.role for message in messages)
        self._turns[sum(message.role == "assistant" for message in messages)] += 1
        self.facts.empty_system += any(m.role == "system" and not m.content.strip() for m in messages)
        self.facts.markup += any(_MARKUP.search(message.content) for message in messages)

    def _count_unused(self, keys: Iterable[str]) -> None:
        """Count unused keys; only the first thousand, since every row may have keys of its own."""
        self._unused.update(key for key in keys if key in self._unused or len(self._unused) < LISTED)

    def _skip_bad(self, note: RowNote) -> None:
        if self._config.on_bad_row == "error":
            raise row_error(note, "on_bad_row", self._kind)
        self.facts.num_skipped += 1
        self.facts.note(self.facts.skipped, note)

    def _skip_too_long(self, raw: RawRow, length: int) -> None:
        reason = f"too long: {length} tokens, max_length is {self._max_length}"
        note = RowNote(source=raw.location, reason=reason, excerpt=raw.excerpt)
        if too_long_is_error(self._config):
            raise row_error(note, "on_too_long", self._kind)
        self.facts.num_too_long += 1
        self._too_long[length] += 1
        self.facts.note(self.facts.too_long, note)


def too_long_is_error(config: DataConfig) -> bool:
    """Whether a row of more than max_length tokens is an error; `on_bad_row` decides where it cannot be truncated."""
    policy = config.on_bad_row if config.on_too_long in (None, "truncate") else config.on_too_long
    return policy == "error"


def row_error(note: RowNote, key: Literal["on_bad_row", "on_too_long"], kind: RowKind) -> DatasetError:
    """The error for a row that the setting `key` forbids to skip."""
    fix = "fix the row, or set data.on_bad_row to skip"
    if key == "on_too_long":
        fix = "raise max_length, or set data.on_too_long to skip or truncate"
    return DatasetError(f"{note.source}: {note.reason}; the row starts with {note.excerpt!r}; {ACCEPTED[kind]}; {fix}")


def _render_inputs(example: Example) -> list[Sequence[Message] | str]:
    """The dialogs or the text to render for an example."""
    if isinstance(example, TextExample):
        return [example.text]
    if isinstance(example, PreferencePair):
        return [(*example.prompt, example.chosen), (*example.prompt, example.rejected)]
    return [_dialog_of(example)]


def _dialog_of(example: Example) -> tuple[Message, ...]:
    assert not isinstance(example, TextExample)
    if isinstance(example, Dialog):
        return example.messages
    return (*example.prompt, example.chosen if isinstance(example, PreferencePair) else example.completion)


def _token_lists(example: Example, rendered: Sequence[Rendered]) -> tuple[dict[str, list[int]], int]:
    """The token lists of a row, and how many of the tokens carry loss.

    An answer is the last trained span: its text and the end of turn. What precedes it is what `render_prompt` gives.
    """
    if isinstance(example, Dialog):
        return {"input_ids": rendered[0].input_ids, "spans": trained_spans(rendered[0].loss_mask)}, sum(
            rendered[0].loss_mask
        )
    answers = []
    for one in rendered:
        begin, end = trained_spans(one.loss_mask)[-2:]
        answers.append(one.input_ids[begin:end])
    names = ("chosen_ids", "rejected_ids") if isinstance(example, PreferencePair) else ("completion_ids",)
    prompt_ids = rendered[0].input_ids[: trained_spans(rendered[0].loss_mask)[-2]]
    return {"prompt_ids": prompt_ids, **dict(zip(names, answers, strict=True))}, sum(map(len, answers))
