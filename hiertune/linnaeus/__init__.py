"""Experiments of Linnaeus (https://github.com/polli-labs/linnaeus) as configs of hiertune."""

from hiertune.linnaeus.context import DataFacts, look_at
from hiertune.linnaeus.convert import Imported, convert, import_experiment
from hiertune.linnaeus.settings import Outcome, Settings, read_settings

__all__ = [
    "DataFacts",
    "Imported",
    "Outcome",
    "Settings",
    "convert",
    "import_experiment",
    "look_at",
    "read_settings",
]
