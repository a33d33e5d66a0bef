"""Parameters that are not supported: which of them are errors, and which change nothing."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from asynctsqp.service.api_errors import unsupported

# Of no consequence for an answer here
IGNORED = frozenset(
    (
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    )
)
# What says "as usual", in parameters that mean something otherwise. null always does.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}


def only_supported(content: dict[str, Any], supported: Collection[str]) -> dict[str, Any]:
    """The supported parameters. Raises ApiError for any other that would change the answer."""
    for name, value in content.items():
        if name in supported or name in IGNORED or value is None:
            continue
        if name not in NEUTRAL:
            shown = name[:40] if name.isidentifier() and name.isascii() else "?"
            raise unsupported(shown, "there is no such parameter")
        if value not in NEUTRAL[name]:
            raise unsupported(name, f"{name} is not supported by this service")
    return {name: content[name] for name in content if name in supported}
