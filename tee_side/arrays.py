"""The TEE side's own memory: numpy arrays. torch works on the same memory where its kernels are worth a call."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Rows: TypeAlias = npt.NDArray[np.float32]  # activations and weights
Tokens: TypeAlias = npt.NDArray[np.int64]  # [n] ids
Array: TypeAlias = npt.NDArray[np.float32] | npt.NDArray[np.int32] | npt.NDArray[np.int64]  # what a call may carry
