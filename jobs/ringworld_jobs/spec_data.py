"""Where training rows come from: a recipe, prepared datasets, and bands of either."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import model_validator

from ringworld_jobs.spec_base import Name, Spec
from ringworld_jobs.units import Bytes, Tokens


class DocumentsSpec(Spec):
    """Which examples are taken, by their length."""

    min_tokens: Tokens | None = None
    """Shorter examples are left out."""
    max_tokens: Tokens | None = None
    """Examples of this length and longer ones are left out."""

    @model_validator(mode="after")
    def _ordered(self) -> DocumentsSpec:
        least, most = self.min_tokens, self.max_tokens
        if least is not None and most is not None and most <= least:
            raise ValueError(
                f"max_tokens {most:,} is not above min_tokens {least:,}; nothing would be left"
            )
        return self

    def keeps(self, length: int) -> bool:
        """Whether an example of so many tokens is kept."""
        return (self.min_tokens or 0) <= length and (
            self.max_tokens is None or length < self.max_tokens
        )


class SourceSpec(Spec):
    """Something that a mixture may draw from: a dataset that is prepared already, or the examples
    of a certain length of one."""

    shards: str | None = None
    """A prepared dataset: a folder (it holds meta.json) as `ringworld data build` wrote it,
    relative to this file, or s3://BUCKET/FOLDER, whose shards are fetched as they are needed."""
    dataset: Name | None = None
    """Instead of shards: a dataset of data.recipe, to take only some of its examples."""
    documents: DocumentsSpec = DocumentsSpec()
    """Which training examples are drawn, by their length; the others are left out. Held-out
    examples are scored whatever their length, so that stages can be compared."""

    @model_validator(mode="after")
    def _one(self) -> SourceSpec:
        if (self.shards is None) == (self.dataset is None):
            raise ValueError(
                "give shards (a prepared dataset) or dataset (one of data.recipe), one of them"
            )
        return self


class ShardCacheSpec(Spec):
    """Where the shards of remote datasets are kept on each node, shared by its workers."""

    folder: str = ".ringworld/shards"
    """A folder on the node's own disk. Relative to the working directory."""
    max_bytes: Bytes = 64 * 2**30
    """Most bytes that the folder takes; shards that were not used for longest go first. It holds
    the shards that are shuffled together, eight of each remote source, at least."""


class DataSpec(Spec):
    """Where training rows come from."""

    recipe: str | None = None
    """Data recipe (YAML) that is built before the first stage, if it is not in the cache yet; each
    of its datasets is a source. Relative to this file."""
    cache: str = ".ringworld/data"
    """Folder of prepared data, one entry a content digest. Relative to the working directory."""
    sources: dict[str, SourceSpec] = {}
    """Further sources by name: prepared datasets, and parts of datasets."""
    shard_cache: ShardCacheSpec = ShardCacheSpec()
    """Where the shards of remote datasets are kept."""

    def places(self, prepared: Mapping[str, str]) -> dict[str, str]:
        """The folder or URL of every source.

        Args:
            prepared: folder of each of the recipe's datasets.

        Raises:
            KeyError: a source is of a dataset that the recipe does not have.
        """
        return dict(prepared) | {
            name: prepared[source.dataset or ""] if source.shards is None else source.shards
            for name, source in self.sources.items()
        }
