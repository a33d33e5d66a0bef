"""Whether a quote's signature leads to Intel: asked of the dcap-qvl library (pip install dcap-qvl).

Covered: a quote passes only if the library verified it against collateral (certificates, revocation lists and TCB
levels, which Intel signs), and the platform's status is one that the policy names.
Not covered: the library itself, and how old a collateral may be (it checks its own dates).
"""

from __future__ import annotations

import asyncio
import importlib
import time
from pathlib import Path
from typing import Any

from asynctsqp.errors import AttestationError, BadInputError, one_line

LIBRARY = "dcap_qvl"


def verify(quote: bytes, collateral: Path | None, pccs: str | None, statuses: tuple[str, ...]) -> str:
    """-> the platform's status. collateral: a JSON file; without one it is fetched from `pccs`.

    Raises AttestationError where the quote is not genuine, or where nothing here can tell.
    """
    library = _library()
    text = None if collateral is None else _text(collateral)
    if text is None and pccs is None:
        raise AttestationError("to verify a quote, give --collateral FILE or --pccs URL")
    try:
        known = asyncio.run(_fetch(library, pccs, quote)) if text is None else library.QuoteCollateralV3.from_json(text)
    except Exception as error:  # the library's errors are ValueError and RuntimeError, and may come to be others
        raise AttestationError(f"there is no collateral to verify the quote with: {one_line(error)}") from None
    try:
        report = library.verify(quote, known, int(time.time()))
    except Exception as error:
        raise AttestationError(f"the quote is not genuine: {one_line(error)}") from None
    status = str(report.status)
    if status not in statuses:
        advisories = ", ".join(map(str, report.advisory_ids)) or "none"
        raise AttestationError(
            f"the platform is {status!r} (advisories: {one_line(advisories)}), which the policy forbids"
        )
    return status


def _library() -> Any:
    try:
        return importlib.import_module(LIBRARY)
    except ImportError:
        raise AttestationError(
            "no DCAP verifier is installed, so nobody knows whether the quote is genuine: pip install dcap-qvl"
        ) from None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"the collateral {file} cannot be read: {error}") from None


async def _fetch(library: Any, pccs: str | None, quote: bytes) -> Any:
    return await library.get_collateral(pccs, quote)
