"""What a moment of a run can be spent on."""

from __future__ import annotations

from enum import StrEnum


class Category(StrEnum):
    """In order of priority: where several go on at one moment, it belongs to the first of them."""

    TEE = "TEE compute"
    SERIALISATION = "serialisation"
    MESSAGING = "messaging"
    GPU = "waiting for GPU compute"
    WIRE = "waiting for communication"
    PYTHON = "Python and event loop"


COMMUNICATION = (Category.SERIALISATION, Category.MESSAGING, Category.WIRE)
