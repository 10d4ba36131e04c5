"""hiertune: search the settings of hierarchical classifiers, and prove which settings win."""

from hiertune.taxonomy import Taxonomy

__all__ = ["Taxonomy"]
