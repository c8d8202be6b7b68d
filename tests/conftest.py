"""Tests run on the CPU, whatever else the machine has."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# libtpu, where it is installed without a TPU, would look for one.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
