"""Data sets: the HDF5 format, the ones that come with hiertune, importers, and what training reads."""

from hiertune.data.builtin import builtin_names
from hiertune.data.dataset import HierarchicalDataset, Inputs, MemoryInputs, open_dataset, read_taxonomy
from hiertune.data.describe import Description, describe
from hiertune.data.format import write_dataset
from hiertune.data.importers.fasta import import_fasta
from hiertune.data.importers.images import import_images
from hiertune.data.importers.inaturalist import import_inat
from hiertune.data.importers.linnaeus import import_linnaeus
from hiertune.data.importers.pixels import ImageOptions
from hiertune.data.importers.table import import_table
from hiertune.data.nearest import nearest_neighbour_predictions
from hiertune.data.splits import SPLITS, split_of_ids

__all__ = [
    "SPLITS",
    "Description",
    "HierarchicalDataset",
    "ImageOptions",
    "Inputs",
    "MemoryInputs",
    "builtin_names",
    "describe",
    "import_fasta",
    "import_images",
    "import_inat",
    "import_linnaeus",
    "import_table",
    "nearest_neighbour_predictions",
    "open_dataset",
    "read_taxonomy",
    "split_of_ids",
    "write_dataset",
]
