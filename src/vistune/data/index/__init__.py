"""What is known of every row before training: one pass over a source, kept on disk."""

from vistune.data.index.columns import RowColumns, SourceIndex
from vistune.data.index.open import index_source
from vistune.data.index.scan import RowScan

__all__ = ["RowColumns", "RowScan", "SourceIndex", "index_source"]
