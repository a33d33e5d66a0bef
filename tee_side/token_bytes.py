"""The bytes that a token stands for, which need not be whole characters."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's byte fallback
SPACE = "\u2581"  # SentencePiece's sign for it


class TokenBytes:
    """Of a byte-level vocabulary (GPT-2's, Llama 3's), or of SentencePiece's with byte fallback (Llama 2's)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items()}
        self._bytes = {sign: byte for byte, sign in bytes_to_unicode().items()} if _is_byte_level(tokenizer) else None

    def of(self, token: int) -> bytes:
        """Empty for an id that the model has and the tokenizer has not."""
        if token in self._added:
            return self._added[token].encode()
        piece: str | None = self._tokenizer.convert_ids_to_tokens(token)  # type: ignore[assignment]  # one for one
        if piece is None:
            return b""
        if self._bytes is not None and all(sign in self._bytes for sign in piece):
            return bytes(self._bytes[sign] for sign in piece)
        byte = BYTE_TOKEN.fullmatch(piece)
        return bytes((int(byte[1], 16),)) if byte else piece.replace(SPACE, " ").encode()


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether its vocabulary writes each byte as one sign: only then is a G with a dot a space."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = None if backend is None else backend.decoder
    return decoder is not None and decoder.decode(["a\u0120a"]) == "a a"
