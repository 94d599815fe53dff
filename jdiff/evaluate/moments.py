"""Mean and covariance of features, gathered batch by batch in float64: what the Fréchet distance compares."""

import dataclasses
import functools
import operator
from functools import cached_property

import numpy as np

BLOCK = 4096
"""Rows that are brought to float64 at once."""


@dataclasses.dataclass(frozen=True)
class Moments:
    """Of `count` features of D numbers. scatter_DD: the sum of the outer products of their deviations from the mean."""

    count: int
    mean_D: np.ndarray
    scatter_DD: np.ndarray

    @classmethod
    def of(cls, features_ND: np.ndarray) -> "Moments":
        """Those of all rows, BLOCK at a time: memory beside the features does not grow with their number."""
        blocks = (features_ND[start : start + BLOCK] for start in range(0, len(features_ND), BLOCK))
        return functools.reduce(operator.add, map(cls._of_block, blocks))

    @classmethod
    def _of_block(cls, features_ND: np.ndarray) -> "Moments":
        features_ND = np.asarray(features_ND, np.float64)
        mean_D = features_ND.mean(0)
        deviations_ND = features_ND - mean_D
        return cls(len(features_ND), mean_D, deviations_ND.T @ deviations_ND)

    @classmethod
    def from_statistics(cls, count: int, mean_D: np.ndarray, covariance_DD: np.ndarray) -> "Moments":
        """Those of which the mean and the unbiased covariance are known."""
        return cls(count, np.asarray(mean_D, np.float64), np.asarray(covariance_DD, np.float64) * (count - 1))

    @property
    def covariance_DD(self) -> np.ndarray:
        """Unbiased, as numpy.cov. ValueError for fewer than two features."""
        if self.count < 2:
            raise ValueError(f"a covariance takes two features or more, found {self.count}")
        return self.scatter_DD / (self.count - 1)

    @cached_property
    def root_DD(self) -> np.ndarray:
        """The covariance's symmetric root."""
        values_D, vectors_DD = np.linalg.eigh(self.covariance_DD)
        return (vectors_DD * np.sqrt(np.maximum(values_D, 0))) @ vectors_DD.T

    def __add__(self, other: "Moments") -> "Moments":
        """Those of both sets together (Chan et al., 1979), whatever the order and the sizes."""
        if self.mean_D.shape != other.mean_D.shape:
            raise ValueError(f"features of {len(self.mean_D)} and of {len(other.mean_D)} numbers do not go together")
        count = self.count + other.count
        step_D = other.mean_D - self.mean_D
        mean_D = self.mean_D + step_D * (other.count / count)
        between_DD = np.outer(step_D, step_D) * (self.count * other.count / count)
        return Moments(count, mean_D, self.scatter_DD + other.scatter_DD + between_DD)
