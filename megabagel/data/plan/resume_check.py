"""Comparison of the data sources with those of a checkpoint: unchanged, grown by appended samples, or incompatible."""

import logging
from collections.abc import Mapping

from megabagel.data.index.documents_view import Documents, known_samples, what_changed
from megabagel.data.index.index import Index
from megabagel.errors import UserError

logger = logging.getLogger(__name__)


def grown_sources(indexes: Mapping[str, Index], fingerprints: Mapping[str, str]) -> dict[str, int]:
    """Find the sources to which samples were appended since a checkpoint.

    Args:
        indexes: current index of every source.
        fingerprints: fingerprint of every source when the checkpoint was written.

    Returns:
        For every grown source, its number of samples at the checkpoint. The old samples come first and keep their
        numbers.

    Raises:
        UserError: a source is new, gone or changed in another way; the message names the source and the change.
    """
    grown, changes = {}, {}
    for name in sorted(indexes.keys() | fingerprints.keys()):
        if name not in fingerprints:
            changes[name] = "not in the checkpoint"
        elif name not in indexes:
            changes[name] = "not in data.sources"
        elif indexes[name].fingerprint != fingerprints[name]:
            documents = indexes[name].documents
            assert isinstance(documents, Documents)
            samples = known_samples(documents, fingerprints[name])
            if samples is None:
                changes[name] = what_changed(documents, fingerprints[name])
            else:
                grown[name] = samples
                logger.info("source %s: %d samples were appended to %d", name, len(documents) - samples, samples)
    if changes:
        raise UserError(
            f"data.sources: {', '.join(changes)} changed since the checkpoint was written"
            f" ({'; '.join(f'{name}: {change}' for name, change in changes.items())}), so its place in the data means"
            " nothing there. Restore the shards, the tokenizer and the list of sources, or start anew with"
            " run.resume=none. Only samples that come after all others in the order of shards may be added."
        )
    return grown
