"""FASTA with lineages in the headers, as k-mer features."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from hiertune.data.format import RowBlocks, block_rows, write_dataset
from hiertune.data.importers.notes import known_rows, quiet
from hiertune.data.importers.ranks import clean_rank
from hiertune.data.importers.text import open_text
from hiertune.data.kmers import kmer_config, kmer_features
from hiertune.errors import InputError, about
from hiertune.taxonomy import Taxonomy


@dataclass(frozen=True)
class FastaRecord:
    id: str
    description: str
    """The header after the id."""
    sequence: bytes
    line: int
    """Line of the header, counted from 1."""


def read_fasta(path: str | Path) -> Iterator[FastaRecord]:
    """Records of a FASTA file (also gzipped: `.gz`), in order.

    The id ends at the first tab, or else at the first space. Raises InputError with the line
    for text before the first header, a header without id, an empty sequence, letters that are none,
    and for a file that cannot be read.
    """
    path = Path(path)
    header, header_line, parts = "", 0, list[str]()
    for line, text in _lines(path):
        if text.startswith(">"):
            if header_line:
                yield _record(path, header, header_line, parts)
            header, header_line, parts = text[1:], line, []
        elif not header_line:
            raise InputError("text before the first header", file=path, line=line, allowed=">ID<TAB>lineage")
        elif text.isascii() and text.isalpha():
            parts.append(text)
        else:
            wrong = next(letter for letter in text if not (letter.isascii() and letter.isalpha()))
            raise InputError(
                f"{wrong!r} in a sequence", file=path, line=line, allowed="letters; sequences without gaps"
            )
    if not header_line:
        raise InputError("has no sequences", file=path, allowed=">ID<TAB>lineage, then the sequence")
    yield _record(path, header, header_line, parts)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank."""
    try:
        with open_text(path) as file:
            for line, text in enumerate(file, start=1):
                if stripped := text.strip():
                    yield line, stripped
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", file=path, allowed="text, or gzipped text") from error


def _record(path: Path, header: str, line: int, parts: list[str]) -> FastaRecord:
    name, _, description = header.partition("\t" if "\t" in header else " ")
    if not name.strip():
        raise InputError("a header without an id", file=path, line=line, allowed=">ID<TAB>lineage")
    if not parts:
        raise InputError(f"{name!r} has no sequence", file=path, line=line)
    return FastaRecord(name.strip(), description.strip(), "".join(parts).encode(), line)


def import_fasta(
    path: str | Path,
    out: str | Path,
    levels: Sequence[str],
    *,
    k: int = 6,
    transform: str = "sqrt",
    separator: str = ";",
    unknown: Sequence[str] = (),
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Write a data set of k-mer features from FASTA whose headers are `>ID<TAB>domain;phylum;...`.

    levels: names of the ranks, coarse -> fine; a shorter lineage is unknown in its last ranks.
    k, transform: see `kmer_features`. separator: between ranks. unknown: more names that mean
    "unknown" (see `clean_rank`). Records unknown at all ranks are left out, and `console` says how many.
    Raises InputError with file and line for a bad record.
    """
    path = Path(path)
    kmer = kmer_config(k, transform)
    records = list(read_fasta(path))
    lines: dict[str, int] = {}
    lineages = []
    for record in records:
        if record.id in lines:
            problem = f"the id {record.id!r} occurred in line {lines[record.id]}"
            raise InputError(problem, file=path, line=record.line, allowed="ids that are all different")
        lines[record.id] = record.line
        lineages.append(_lineage(path, record, len(levels), separator, unknown))
    with about(path):
        taxonomy = Taxonomy.from_lineages(lineages, levels)
    labels = taxonomy.encode(lineages)
    kept = known_rows(labels, console or quiet())
    records = [records[row] for row in kept]
    inputs = _kmer_blocks(path, records, k, transform)
    ids = [record.id for record in records]
    return write_dataset(out, inputs, labels[kept], taxonomy, ids, kmer=kmer, overwrite=overwrite)


def _lineage(
    path: Path, record: FastaRecord, num_levels: int, separator: str, unknown: Sequence[str]
) -> list[str | None]:
    ranks = record.description.removesuffix(separator).split(separator)
    if not record.description or len(ranks) > num_levels:
        found = f"{len(ranks)} ranks" if record.description else "no lineage"
        raise InputError(
            f"{record.id!r} has {found}",
            file=path,
            line=record.line,
            allowed=f"1 to {num_levels} ranks, with {separator!r} between them",
        )
    return [clean_rank(rank, unknown) for rank in ranks] + [None] * (num_levels - len(ranks))


def _kmer_blocks(path: Path, records: Sequence[FastaRecord], k: int, transform: str) -> RowBlocks:
    shape = (len(records), 4**k)
    step = block_rows(shape, np.dtype(np.float32).itemsize)

    def blocks() -> Iterator[np.ndarray]:
        for first in range(0, len(records), step):
            here = records[first : first + step]
            features = kmer_features([record.sequence for record in here], k, transform)
            empty = ~features.any(axis=1)
            if empty.any():
                record = here[int(np.argmax(empty))]
                raise InputError(
                    f"{record.id!r} has no word of {k} letters A, C, G, T", file=path, line=record.line
                )
            yield features

    return RowBlocks(shape, np.dtype(np.float32), blocks())
