"""Adapters as files, in and out of every stack: export, import, verify, inspect, compress. No training."""

from adalora.export.adapter import Adapter, Factor
from adalora.export.cleanup import clean, truncate
from adalora.export.compression import CompressionReport, compress_adapter
from adalora.export.exporting import FORMATS, ExportReport, export_adapter
from adalora.export.importing import adapter_from_adalora, adapter_from_loralib, read_loralib
from adalora.export.inspection import Inspection, inspect_adapter
from adalora.export.reading import adapter_from_lora, read_adapter
from adalora.export.stacks import StackResult, check_forward, verify_adapter

__all__ = [
    "FORMATS",
    "Adapter",
    "CompressionReport",
    "ExportReport",
    "Factor",
    "Inspection",
    "StackResult",
    "adapter_from_adalora",
    "adapter_from_lora",
    "adapter_from_loralib",
    "check_forward",
    "clean",
    "compress_adapter",
    "export_adapter",
    "inspect_adapter",
    "read_adapter",
    "read_loralib",
    "truncate",
    "verify_adapter",
]
