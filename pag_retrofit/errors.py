"""Exceptions of the package. All derive from `PagError`, itself a `ValueError`."""

from __future__ import annotations


class PagError(ValueError):
    """Base class: an argument, a file or a state the package cannot work with."""


class BudgetError(PagError):
    """A compute budget that is not a fraction, or lies below what the network can reach."""


class NoSitesError(PagError):
    """A network in which nothing can be gated."""


class CheckpointError(PagError):
    """A checkpoint that is damaged, tampered with, or belongs to another network."""


class RecipeError(PagError):
    """A recipe file or an override with a key or a value that is not valid."""


class DataError(PagError):
    """A data folder or file that is missing, empty or mislabelled."""


class TrainingError(PagError):
    """A training run that cannot go on, such as a loss that is not finite."""
