"""Quantized checkpoints in the layouts of other libraries: `dq export`."""

from dq.export.exporter import Exporter, exporters
from dq.export.report import Exported, ExportedLayer
from dq.export.write import check, export

__all__ = ["Exported", "ExportedLayer", "Exporter", "check", "export", "exporters"]
