"""What became of the sources since a checkpoint was written: the same, grown by appended samples, or another thing."""

import logging
from collections.abc import Mapping

from megabagel.data.index.documents_view import Documents, known_samples, what_changed
from megabagel.data.index.index import Index
from megabagel.errors import UserError

logger = logging.getLogger(__name__)


def grown_sources(indexes: Mapping[str, Index], fingerprints: Mapping[str, str]) -> dict[str, int]:
    """How many samples each source had that has grown since: the old ones are its first ones and keep their numbers.

    Args:
        indexes: of all sources, now.
        fingerprints: of all sources, then.

    Raises:
        UserError: a source is new or gone, or has changed in another way; the message says which and how.
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
