"""Recovery by gradient of what compression lost: one file per method."""

from trifold.tuning.bqpo import BQPO
from trifold.tuning.distill import Distill
from trifold.tuning.e2e_oqp import E2EOQP

__all__ = ["BQPO", "E2EOQP", "Distill"]
