"""Where pictures come from, and the one pipeline that turns any source into batches."""

from jdiff.data.reader import DeviceBatches, batches, to_device
from jdiff.data.source import BrokenRecord, DataError, Source, open_source

__all__ = ["BrokenRecord", "DataError", "DeviceBatches", "Source", "batches", "open_source", "to_device"]
